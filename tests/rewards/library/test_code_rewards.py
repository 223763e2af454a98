"""Rewards for programs: where the program is, what the tests say, and what nobody can tell."""

import asyncio
import inspect
import time

import pytest

from posttrain.errors import UserError
from posttrain.rewards.failures import POLICY_KEYS
from posttrain.rewards.library import MAKERS, PRESETS
from posttrain.rewards.library.code import code, passes_tests, program_in
from posttrain.rewards.library.code_tests import read_tests
from posttrain.rewards.rubric import Rubric
from posttrain.sandbox import Asserts, Call, InputOutput, strongest
from posttrain.sandbox.isolation import Level
from posttrain.types import Completion, Group, StopReason, Task

LEVEL = pytest.mark.skipif(strongest().level < Level.NAMESPACES, reason=f"the strongest here is {strongest()}")
RIGHT = "Here:\n```python\ndef square(n):\n    return n * n\n```\nDone."
WRONG = "```\ndef square(n):\n    return 2 * n\n```"


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\nx\n```", "x\n"),
        ("```\nx\n```", "x\n"),
        ("```py\nx\n```\ntext\n```Python3\ny\n```", "y\n"),
        ("```python\nx\n```\nrun it:\n```bash\npip install y\n```", "x\n"),
        ("```python\nx\n", "x\n"),
        ("````python\n```\nx\n````", "```\nx\n"),
        ("~~~python\nx\n~~~", "x\n"),
        ("```python\nx\n```python\ny\n```", "x\n```python\ny\n"),
        ("```json\n{}\n```", None),
        ("```python\n  \n```", None),
        ("```", None),
        ("no program", None),
        ("", None),
        ("inline ```x``` code", None),
        ("```python title=x\ny\n```  \ntext", "y\n"),
        ("```python `x`\ny\n```", None),
        ("```\r\nx\r\n```\r\n", "x\r\n"),
        ("   ```  py\nx\n   ```", "x\n"),
        ("    ```\nx\n```", None),
    ],
)
def test_the_program_is_the_last_python_block(completion, program):
    assert program_in(completion) == program


def test_without_the_rule_of_fences_the_whole_text_may_be_the_program():
    assert program_in("x = 1", fence=False) == "x = 1"
    assert program_in("```json\n{}\n```", fence=False) is None


def test_finding_the_program_takes_linear_time():
    started = time.process_time()
    for text in (
        "`" * 100_000,
        "```python\n" * 20_000,
        "```" + " " * 100_000,
        "\x00" * 100_000,
        "```" + "a" * 50_000 + "`",
        "~~~" + "~ " * 50_000 + "`",
    ):
        program_in(text)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("tests", "entry_point", "read"),
    [
        (None, None, []),
        ("", "f", []),
        ("assert f(1)", None, [Asserts("assert f(1)")]),
        (["assert f(1)", "assert f(2)"], None, [Asserts("assert f(1)"), Asserts("assert f(2)")]),
        ("def check(candidate):\n    assert candidate(1)", "f", [Asserts("def check(candidate):\n    assert candidate(1)\n\ncheck(f)\n")]),
        ([{"input": "1", "output": "2"}], None, [InputOutput("1", "2")]),
        ([{"input": "1", "output": "2", "args": None, "expected": None}], None, [InputOutput("1", "2")]),
        ([{"args": [1], "expected": None}], "f", [Call("f", [1], None)]),
        ([{"function": "g", "args": [1], "kwargs": {"b": 2, "c": None}, "expected": 3}], "f", [Call("g", [1], 3, {"b": 2})]),
        ([{"input": "1\n[2]", "output": "3", "testtype": "functional"}], "Solution().f", [Call("Solution.f", [1, [2]], 3)]),
        ({"inputs": ["1\n"], "outputs": ["2\n"]}, None, [InputOutput("1\n", "2\n")]),
        ('{"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}', None, [Call("add", [1, 2], 3)]),
        ({"inputs": [["1", "2"]], "outputs": [["3"]]}, None, [InputOutput("1\n2", "3")]),
        ({"inputs": [[5, "6"], 7], "outputs": [[3], 0.5]}, None, [InputOutput("5\n6", "3"), InputOutput("7", "0.5")]),
        ([{"input": 1, "output": 2}], None, [InputOutput("1", "2")]),
        (
            {"inputs": [["a"], ["b"]], "outputs": [[True], [[]]], "fn_name": "f"},
            None,
            [Call("f", ["a"], [True], also=[True]), Call("f", ["b"], [[]], also=[[]])],
        ),
        ({"inputs": [["a"], ["b"]], "outputs": [[1], []], "fn_name": "f"}, None, [Call("f", ["a"], [1]), Call("f", ["b"], [])]),
    ],
)
def test_tests_are_read_as_datasets_write_them(tests, entry_point, read):
    assert read_tests(tests, entry_point) == read


@pytest.mark.parametrize(
    ("tests", "entry_point"),
    [
        (5, None),
        ([5], None),
        ("{broken", None),
        ([{"args": [1], "expected": 2}], None),
        ([{"args": [1]}], "f"),
        ([{"input": "1", "output": "2"}, "assert f()"], None),
        ({"inputs": ["1"], "outputs": []}, None),
        ({"inputs": ["1"], "outputs": [[[1]]]}, None),
        ({"inputs": [["1"]], "outputs": [[1]], "fn_name": "f; import os"}, None),
        ("assert f()", "f(); import os"),
        ([{"input": "x", "output": "3", "testtype": "functional"}], "f"),
    ],
)
def test_tests_in_no_known_form_are_the_users_mistake(tests, entry_point):
    with pytest.raises(UserError):
        read_tests(tests, entry_point)


def scored(rubric, texts, **columns):
    group = Group(Task(0, "p", columns), [Completion([], [], [], [], [], StopReason.STOP, text) for text in texts])
    return group, rubric.score([group])


@LEVEL
def test_the_preset_gives_a_tenth_for_a_program_and_one_for_a_right_one():
    rubric = Rubric.from_config(["code"])
    group, _ = scored(rubric, [RIGHT, WRONG, "42", "```python\nimport sys; sys.exit(0)\n```"], tests=["assert square(3) == 9"])
    assert [completion.reward for completion in group.completions] == pytest.approx([1.1, 0.1, 0.0, 0.1])
    assert [rubric.is_right(completion) for completion in group.completions] == [True, False, False, False]
    assert rubric.range == pytest.approx((0.0, 1.1))


@LEVEL
@pytest.mark.parametrize("scoring", ["fraction", "share"])
@pytest.mark.filterwarnings("ignore:.*is called fraction now:FutureWarning")
def test_the_fraction_of_tests_passed(scoring):
    rubric = Rubric(passes_tests(scoring=scoring))
    assert rubric.names == ["fraction_of_tests"]
    group, _ = scored(rubric, [RIGHT, WRONG, "42"], tests=[f"assert square({n}) == {n * n}" for n in (1, 2, 3, 4)])
    assert [completion.reward for completion in group.completions] == [1.0, 0.25, 0.0]


@LEVEL
@pytest.mark.parametrize("tests", [None, "def check(f):\n    assert f(3) == 9", "assert ("])
def test_what_tests_cannot_tell_is_not_scored(tests):
    group, report = scored(Rubric(passes_tests()), [RIGHT], tests=tests)
    assert group.completions[0].reward is None
    assert report.metrics.get("code/unusable_tests", [1.0]) == [1.0]


ANAGRAM = "def is_anagram(a, b):\n    return sorted(a) == sorted(b)\n"
ANAGRAMS = '{"fn_name": "is_anagram", "inputs": [["foefet", "toffee"], ["Buckethead", "DeathCubeK"]], "outputs": [[true], [false]]}'
ROTATED = '{"fn_name": "rotate", "inputs": [[[1, 2]], [[3]]], "outputs": [[2, 1], [3]]}'
SOLUTION = "class Solution:\n    def is_anagram(self, a, b):\n        return sorted(a) == sorted(b)\n"


@LEVEL
@pytest.mark.parametrize(
    ("program", "tests", "is_right"),
    [
        (ANAGRAM, ANAGRAMS, 1.0),
        (SOLUTION, ANAGRAMS, 1.0),
        (ANAGRAM.replace("==", "!="), ANAGRAMS, 0.0),
        (SOLUTION.replace("==", "!="), ANAGRAMS, 0.0),
        (SOLUTION.replace("is_anagram", "other"), ANAGRAMS, 0.0),
        (SOLUTION.replace("==", "!=") + ANAGRAM, ANAGRAMS, 1.0),
        ("def rotate(items):\n    return items[::-1]\n", ROTATED, 1.0),
        ("def rotate(items):\n    return items[::-1] if len(items) > 1 else items[0]\n", ROTATED, 0.0),
        ("print(int(input()) + 1)\n", '{"inputs": [[2], ["3"]], "outputs": [[3], ["4"]]}', 1.0),
    ],
)
def test_rows_of_apps_and_taco_are_judged_right_and_wrong(program, tests, is_right):
    group, _ = scored(Rubric(passes_tests()), [f"```python\n{program}```"], tests=tests)
    assert group.completions[0].reward == is_right


@LEVEL
def test_a_recipe_says_how_many_programs_run_at_once():
    rubric = Rubric.from_config([{"reward": "code", "programs_at_once": 1}])
    started = time.perf_counter()
    group, _ = scored(rubric, ["```\nimport time\ntime.sleep(0.4)\n```"] * 3, tests=[{"input": "", "output": ""}])
    assert time.perf_counter() - started >= 1.2
    assert [completion.reward for completion in group.completions] == pytest.approx([1.1] * 3)


@pytest.mark.parametrize("name", [*MAKERS, *PRESETS])
def test_no_setting_has_the_name_of_a_policy(name):
    """In a recipe both stand in one entry, and the policy would take it."""
    assert not set(inspect.signature({**MAKERS, **PRESETS}[name]).parameters) & set(POLICY_KEYS)


@LEVEL
def test_columns_named_like_settings_are_not_taken_for_settings():
    group, _ = scored(Rubric(passes_tests()), [RIGHT], tests="assert square(3) == 9", level="hard", limits="none", scoring="b")
    assert group.completions[0].reward == 1.0


@LEVEL
def test_it_can_be_called_like_a_function():
    judge = passes_tests()
    assert asyncio.run(judge(RIGHT, tests="assert square(3) == 9", log_metric=lambda name, value: None)) is True


@pytest.mark.parametrize("settings", [{"scoring": "most"}, {"level": "strong"}, {"limits": {"memory": 3}}, {"programs_at_once": 0}])
def test_settings_that_cannot_be_meant_are_refused(settings):
    with pytest.raises(UserError):
        code(**settings)
