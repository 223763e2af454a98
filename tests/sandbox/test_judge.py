"""Verdicts on honest programs, right and wrong, by each kind of test; and on tests that cannot judge."""

import os
import resource
import sys
import time

import pytest

from posttrain.errors import UserError
from posttrain.sandbox import Asserts, Call, InputOutput, Job, Limits, Sandbox, strongest
from posttrain.sandbox.isolation import Level
from posttrain.sandbox.spawn import Forked
from posttrain.sandbox.view import package_paths

pytestmark = pytest.mark.skipif(strongest().level < Level.NAMESPACES, reason=f"the strongest here is {strongest()}")

PROGRAM = """
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def pop(self): return self.items.pop()
class Solution:
    def twice(self, x): return 2 * x
def add(a, b=1): return a + b
def pairs(d): return {(k, v) for k, v in d.items()}
def refuse(x): raise ValueError(f"not {x}")
def odd(x): raise type("Odd", (Exception,), {})("odd")
"""


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox("namespaces")


def results(sandbox, tests, program=PROGRAM, **settings):
    verdict = sandbox.judge(Job(program, tests, **settings))
    assert verdict.error is None
    return [result.passed for result in verdict.results]


def test_calls_pass_plain_values_both_ways(sandbox):
    tests = [
        Call("add", [1], 2),
        Call("add", [1], 3),
        Call("add", ["a"], "ab", {"b": "b"}),
        Call("Solution.twice", [10**30], 2 * 10**30),
        Call("pairs", [{1: (2, 3)}], {(1, (2, 3))}),
        Call("refuse", [1], None),
        Call("missing", [], None),
        Call("twice", [2], 4),
        Call("add", [1], [2], also=[2]),
        Call("add", [1], [2]),
    ]
    assert results(sandbox, tests) == [True, False, True, True, True, False, False, True, True, False]


def test_the_tests_after_an_exception_still_count_and_those_after_an_end_do_not(sandbox):
    program = "import os\ndef f(x):\n    if x == 1: raise ValueError\n    if x == 3: os._exit(0)\n    return x"
    assert results(sandbox, [Call("f", [x], x) for x in range(5)], program) == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        ("assert add(1) == 2", True),
        ("assert add(1) == 3", False),
        ("def check(f):\n    for i in range(50):\n        assert f(i, i) == 2 * i\ncheck(add)", True),
        ("s = Stack()\ns.push((1, 2))\nassert s.pop() == (1, 2)", True),
        ("assert Solution().twice(4) == 8", True),
        ("try:\n    refuse(7)\n    raise AssertionError\nexcept ValueError as error:\n    assert str(error) == 'not 7'", True),
        ("try:\n    odd(7)\nexcept ValueError:\n    pass", False),
        ("assert math.isclose(add(0.1, 0.2), 0.3)", True),
        ("import math\nassert abs(add(0.1, 0.2) - 0.3) < 1e-9 and math", True),
        ("assert add", False),
        ("assert Stack() == Stack()", False),
        ("assert Stack() != 3", False),
        ("assert [x for x in map(add, [1, 2])] == [2, 3]", True),
        ("assert pairs({1: 2}) == {(1, 2)}", True),
    ],
)
def test_asserts_are_evaluated_as_python(sandbox, source, passes):
    assert results(sandbox, [Asserts("assert add(0) == 1"), Asserts(source)]) == [True, passes]


IN_PLACE = """
from collections import deque
def add_one(l): l.append(1)
def rotate(rows): rows[:] = [list(row) for row in zip(*rows[::-1])]
def fill(rows, **more):
    rows[0][0] = 7
    more["d"]["x"] = (1, [2]); more["s"].add(4); more["b"][0] = 65; more["q"].popleft()
def unique(numbers):
    kept = sorted(set(numbers)); numbers[:len(kept)] = kept
    return len(kept)
def spoil(l):
    l.clear()
    raise ValueError("spoilt")
def squares(n):
    for i in range(n): yield i * i
class Bag:
    kept = 0
    def __init__(self, size): self.size = size
    def __str__(self): return f"a bag of {self.size}"
    def __len__(self): return self.size
    def __getitem__(self, index): return index * self.size
    def __setitem__(self, index, value): self.size = value
    def me(self): return self
    @classmethod
    def of_five(cls): return cls(5)
"""


@pytest.mark.parametrize(
    "source",
    [
        "l = []\nadd_one(l)\nassert l == [1]",
        "l = [0]\nsame = l\nadd_one(l)\nassert same == [0, 1]",
        "rows = [[1, 2], [3, 4]]\nrotate(rows)\nassert rows == [[3, 1], [4, 2]]",
        "rows = [[1, 2]]\nrow = rows[0]\nfill(rows, d=(d := {}), s=(s := {1}), b=(b := bytearray(b'x')), q=(q := deque([1, 2])))\n"
        "assert (row, d, s, b, q) == ([7, 2], {'x': (1, [2])}, {1, 4}, b'A', deque([2]))",
        "numbers = [1, 1, 2, 3, 3]\ncount = unique(numbers)\nassert numbers[:count] == [1, 2, 3]",
        "l = [1]\ntry: spoil(l)\nexcept ValueError: pass\nassert l == []",
        "bag = Bag(2)\nbag.x = 1\nassert bag.x == 1\ndel bag.x\ntry: bag.x\nexcept AttributeError: pass\nelse: raise AssertionError",
        "Bag.kept = 3\nassert Bag(1).kept == 3",
        "bag = Bag(2)\nbag[0] = 9\nassert bag.size == len(bag) == bag[1] == 9\nassert str(bag) == 'a bag of 9'\nassert bag.me() is bag",
        "assert Bag.of_five().size == 5",
        "assert list(squares(3)) == [0, 1, 4] and 4 in squares(3) and sorted(squares(3))[-1] == 4",
        "answers = squares(1)\nassert next(answers) == 0\ntry: next(answers)\nexcept StopIteration: pass\nelse: raise AssertionError",
    ],
)
def test_what_a_test_changes_and_has_changed_is_as_in_python(sandbox, source):
    """Each passes where program and test are one module of Python's; and fails when it expects something else."""
    module = {}
    exec(f"{IN_PLACE}\n{source}", module)
    assert results(sandbox, [Asserts(source)], IN_PLACE, setup="from collections import deque") == [True]


@pytest.mark.parametrize(
    "source",
    [
        "l = []\nadd_one(l)\nassert l == []",
        "rows = [[1, 2], [3, 4]]\nrotate(rows)\nassert rows == [[1, 2], [3, 4]]",
        "bag = Bag(2)\nbag.x = 1\nassert bag.x == 2",
    ],
)
def test_a_change_that_is_not_the_expected_one_is_wrong(sandbox, source):
    assert results(sandbox, [Asserts(source)], IN_PLACE) == [False]


@pytest.mark.parametrize("value", ["Fraction(16)", "Decimal(16)", "16 + 0j", "16.0", "Decimal('16.00')"])
def test_a_number_that_python_calls_equal_is_right(sandbox, value):
    program = f"from fractions import Fraction\nfrom decimal import Decimal\ndef square(n): return {value}"
    assert results(sandbox, [Call("square", [4], 16), Call("square", [4], 17)], program) == [True, False]
    assert results(sandbox, [Asserts("assert square(4) == 16"), Asserts("assert square(4) == 17")], program) == [True, False]


@pytest.mark.skipif(not any(os.path.isdir(f"{path}/numpy") for path in package_paths()), reason="numpy is not installed beside this interpreter")
def test_a_number_of_numpy_is_what_it_equals():
    program = "import numpy as np\ndef f(k): return [np.int64(16), np.float32(0.5), np.bool_(True), np.array([16, 17])][k]"
    tests = [Call("f", [0], 16), Call("f", [1], 0.5), Call("f", [2], True), Call("f", [3], [16, 17])]
    verdict = Sandbox("namespaces", packages=True).judge(Job(program, tests, limits=Limits(memory_mb=2048, processes=16)))
    assert [result.passed for result in verdict.results] == [True, True, True, False]


@pytest.mark.parametrize("program", ["square = 5", "square = None", "x = 1", "square = [lambda: 1]", "import math as square"])
def test_a_name_that_is_not_what_the_tests_take_it_for_is_wrong_and_no_error(sandbox, program):
    """The tests hand it back to the program, which may have named anything so."""
    assert results(sandbox, [Asserts("assert apply(square, 3) == 9")], program + "\ndef apply(f, x): return f(x)") == [False]


LIAR = """
class Liar:
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    def __abs__(self): return 0.0
    def __lt__(self, other): return True
    def __contains__(self, other): return True
    def __iter__(self): return iter([Liar()])
    def __getitem__(self, index): return Liar()
    def __bool__(self): return True
def square(n): return Liar()
"""


@pytest.mark.parametrize(
    "condition",
    [
        "square(3) == 9",
        "abs(square(3) - 9) < 1e-6",
        "square(3)",
        "9 in square(3)",
        "square(3)[0] == 9",
        "not square(3) != 9",
        "list(square(3)) == [9]",
    ],
)
def test_an_object_that_lies_is_wrong(sandbox, condition):
    assert results(sandbox, [Asserts(f"assert {condition}")], LIAR) == [False]


def test_tests_share_their_names_and_the_setup_runs_first(sandbox):
    assert results(sandbox, [Asserts("x = add(two)"), Asserts("assert x == 3")], setup="two = 2") == [True, True]


def test_input_and_output_need_a_clean_end(sandbox):
    program = "n = int(input())\nprint(2 * n)\nif n == 3: raise SystemExit(1)"
    tests = [InputOutput("1\n", "2\n"), InputOutput("2", "5"), InputOutput("3", "6")]
    assert results(sandbox, tests, program) == [True, False, False]


LATE = {
    "input_output": Job("print('late')", [InputOutput("", "late")]),
    "calls": Job("def f(): return 'late'", [Call("f", [], "late")]),
}


@pytest.fixture
def stalled(monkeypatch):
    """Holds up what a program wrote last on its way into this process, as it is held up where nothing of this process runs."""

    def stall(seconds, times):
        read, left = os.read, [None] * times

        def late(descriptor, count):
            piece = read(descriptor, count)
            if b"late" in piece and left:
                left.pop()
                time.sleep(seconds)
            return piece

        monkeypatch.setattr(os, "read", late)

    return stall


@pytest.mark.parametrize("kind", LATE)
def test_an_output_is_judged_whole_also_by_a_process_that_was_stalled(sandbox, stalled, kind):
    stalled(1.0, times=1)
    assert sandbox.judge(LATE[kind]).passed


def test_an_output_that_is_not_read_to_its_end_is_an_error_and_tried_once_more(sandbox, stalled, monkeypatch):
    monkeypatch.setattr("posttrain.sandbox.run.LAST_BYTES_S", 0.3)
    stalled(0.8, times=3)
    verdict = sandbox.judge(LATE["input_output"])
    assert "not read to its end" in verdict.error
    assert not verdict.is_unusable
    assert sandbox.judge(LATE["input_output"]).passed


def test_tests_after_the_first_failure_are_not_run_when_only_all_count(sandbox):
    verdict = sandbox.judge(Job("print(1)", [InputOutput("", "2"), InputOutput("", "1")], stop_at_failure=True))
    assert [result.passed for result in verdict.results] == [False, False]
    assert "not run" in verdict.results[1].why


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("assert (", "not Python"),
        ("def check(candidate):\n    assert candidate(1) == 2", "never called the program"),
        ("assert add(lambda: 1) == 2", "cannot be sent"),
        ("import sys, os\nos._exit(0)", "before they called"),
        (
            "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'[]\\n{\"result\": true}\\nx\\n')\n    except OSError: pass\nassert add(1) == 2",
            "wrote to",
        ),
    ],
)
def test_tests_that_cannot_judge_are_an_error_and_no_failure(sandbox, source, cause):
    verdict = sandbox.judge(Job(PROGRAM, [Asserts(source)]))
    assert cause in verdict.error
    assert verdict.is_unusable
    assert not verdict.passed
    assert verdict.fraction is None


def test_a_setup_that_breaks_is_an_error(sandbox):
    verdict = sandbox.judge(Job(PROGRAM, [Asserts("assert add(1) == 2")], setup="1 / 0"))
    assert "ZeroDivisionError" in verdict.error


def test_a_program_that_waits_for_the_clock_ends_with_it(sandbox):
    verdict = sandbox.judge(Job("while True: pass", [Asserts("add(1)"), Asserts("add(1)")], limits=Limits(wall_s=1.5)))
    assert [result.passed for result in verdict.results] == [False, False]
    assert verdict.seconds < 2.5


def test_the_same_program_says_the_same(sandbox):
    outputs = {sandbox.run("print({str(i) for i in range(20)}, list(map(hash, 'abc')))").stdout for _ in range(3)}
    assert len(outputs) == 1


def test_the_program_starts_in_an_empty_writable_directory(sandbox):
    said = (
        sandbox.run("import os\nprint(os.listdir('.'), sorted(os.environ))\nopen('x', 'w').write('x')\nprint(os.listdir('.'))")
        .stdout.decode()
        .split("\n")
    )
    assert said[0].startswith("[] ")
    assert "PATH" not in said[0]
    assert said[1] == "['x']"


@pytest.mark.parametrize("tests", [[], [Call("f", [], 1), Asserts("f()")], ["assert f()"]], ids=["none", "mixed", "text"])
def test_a_job_without_tests_of_one_kind_is_refused(tests):
    with pytest.raises(UserError, match="all of one kind"):
        Job("x", tests)


@pytest.mark.parametrize("limits", [{"wall_s": 0}, {"memory_mb": 8}, {"cpu_s": float("nan")}, {"processes": True}, {"walls": 3}])
def test_limits_that_cannot_be_meant_are_refused(limits):
    with pytest.raises(UserError):
        Limits.from_config(limits)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs are held by a pidfd on Linux only")
def test_a_process_with_many_open_files_still_sees_programs_end():
    """`select` knows no descriptor above 1023; a trainer with many files open has them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        child = os.fork()
        if child == 0:
            os._exit(0)
        forked = Forked(child, os.pidfd_open(child))
        assert forked.wait(5) == 0
        assert forked.poll() == 0
        os.waitpid(child, 0)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
