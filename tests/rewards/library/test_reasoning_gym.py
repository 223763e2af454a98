"""reasoning-gym's scorers, as they are and guarded. The figures for the unguarded ones were found by asking them."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from posttrain.data.sources import load_rows
from posttrain.errors import UserError
from posttrain.reasoning_gym_tasks import open_task, question
from posttrain.rewards import Rubric
from posttrain.rewards.library.reasoning_gym import _is_harmless, _terms, guarded_score, reasoning_gym
from posttrain.types import Completion, Group, StopReason, Task

factory = pytest.importorskip("reasoning_gym.factory")
MANY = sorted(set(factory.DATASETS) - {"composite", "arc_agi", "rearc", "group_anagrams", "figlet_font", "intermediate_integration", "codeio"})[::3]


def scores(task, index, answer):
    """(guarded, as the library scores it)"""
    completion, row = f"So: <answer>{answer}</answer>", {"reasoning_gym_task": task, "reasoning_gym_index": index}
    return reasoning_gym()(completion, **row), reasoning_gym(guarded=False)(completion, **row)


def gold(task, index=0):
    return question(task, index)["answer"]


def test_rows_name_their_questions_which_follow_from_the_seed():
    source = "reasoning-gym:leg_counting?size=5&seed=3&max_animals=4"
    rows = load_rows(source)
    assert len(rows) == 5
    for row in rows:
        entry = question(row["reasoning_gym_task"], row["reasoning_gym_index"])
        assert (row["prompt"], row["answer"]) == (entry["question"], entry["answer"])
    assert rows[0]["prompt"] != question("leg_counting?size=5&seed=4&max_animals=4", 0)["question"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("reasoning-gym:leg_countin", "Did you mean 'leg_counting'"),
        ("reasoning-gym:leg_counting?sise=5", "sise"),
        ('reasoning-gym:composite?datasets=[{"name": "simple_integration"}]', "give data.train a list"),
        ("reasoning-gym:leg_counting?size=none", "refuses"),
    ],
)
def test_a_task_that_is_not_there_is_refused(source, says):
    with pytest.raises(UserError, match=says):
        open_task(source.removeprefix("reasoning-gym:"))


def test_that_it_is_refused_is_heard_from_the_process_that_makes_the_rows():
    with pytest.raises(UserError, match="Did you mean 'leg_counting'"):
        load_rows("reasoning-gym:leg_countin")


@pytest.mark.parametrize("name", MANY)
def test_right_answers_earn_all_and_text_around_them_nothing(name):
    task = f"{name}?size=2&seed=1"
    answer = gold(task)
    if answer is None:
        pytest.skip("many answers are right")
    entry = question(task, 0)
    assert guarded_score(open_task(task), entry, answer) == 1.0
    for hostile in ("14 " + answer, "1" + answer, answer + " or so", answer * 3 + "x"):
        assert guarded_score(open_task(task), entry, hostile) == 0.0, hostile


@pytest.mark.parametrize("name", MANY)
def test_nonsense_earns_nothing(name):
    task = f"{name}?size=2&seed=1"
    for hostile in ("inf", "-inf", "nan", "1e999", "x", "", "9" * 400, "\0", "é" * 3000, "(" * 500, "9**9**9"):
        assert guarded_score(open_task(task), question(task, 0), hostile) == 0.0, hostile


def test_fourteen_for_four():
    task = "leg_counting?size=20&seed=1"
    answer = gold(task)
    assert scores(task, 0, answer) == (1.0, 1.0)
    guarded, lenient = scores(task, 0, "1" + answer)
    assert guarded == 0.0
    assert lenient > 0.5


def test_nan_for_a_complex_number():
    assert scores("complex_arithmetic?size=1&seed=1", 0, "nan") == (0.0, 1.0)


def test_zero_for_a_probability():
    assert scores("coin_flip?size=1&seed=1", 0, "0") == (0.0, 1.0)


def test_anything_but_true_for_false():
    task = "game_of_life_halting?size=20&seed=1"
    index = next(i for i in range(20) if gold(task, i) == "False")
    assert scores(task, index, "x") == (0.0, 1.0)
    assert scores(task, index, "False") == (1.0, 1.0)


def test_another_right_answer_than_the_known_one_earns_all():
    task = "countdown?size=1&seed=1"
    answer = gold(task)
    assert answer == "94*4 - 61 - 6"
    assert scores(task, 0, "4*94 - (61 + 6)") == (1.0, 1.0)
    assert scores("polynomial_multiplication?size=1&seed=1", 0, gold("polynomial_multiplication?size=1&seed=1").replace(" ", "")) == (1.0, 1.0)
    assert (
        scores("leg_counting?size=1&seed=1", 0, gold("leg_counting?size=1&seed=1") + ".0")[0]
        == scores("leg_counting?size=1&seed=1", 0, "0" + gold("leg_counting?size=1&seed=1"))[0]
    )


@pytest.mark.parametrize("answer", ["6*4*1*1", "3*8*1*1", "1*2*3*4", "24", "(5 - 1)*6*1"])
def test_four_numbers_that_make_24_are_right_only_where_they_were_given(answer):
    rows = [question("puzzle24?size=30&seed=1", index) for index in range(30)]
    right = [sorted(map(int, re.findall(r"[0-9]+", answer))) == sorted(row["metadata"]["numbers"]) for row in rows]
    assert [guarded_score(open_task("puzzle24?size=30&seed=1"), row, answer) == 1.0 for row in rows] == right


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [("3*(9-1)*1", True), ("(9 - 1)*3/1", True), ("3*9*1-1", False), ("3*8*1*1", False), ("3*(9-1)", False), ("3*9-1**1", False)],
)
def test_the_numbers_of_puzzle24_are_each_used_once_and_the_result_is_exact(answer, is_right):
    entry = {"question": "?", "answer": "1*3*(9 - 1)", "metadata": {"source_dataset": "puzzle24", "source_index": 0, "numbers": [1, 1, 3, 9]}}
    assert (guarded_score(open_task("puzzle24?size=2&seed=1"), entry, answer) == 1.0) is is_right
    assert (
        guarded_score(open_task("puzzle24?size=2&seed=1"), entry | {"metadata": entry["metadata"] | {"numbers": [5, 5, 3, 2]}}, "5*5-3/2") == 0.0
    )  # 23.5


class Forgetful:
    """A scorer that looks at the answer's form only, as a dataset of four questions."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"question": f"{index} + {index}?", "answer": str(2 * index), "metadata": {"source_dataset": "new", "source_index": index}}

    def score_answer(self, answer, entry):
        return 1.0 if answer.isdigit() else 0.0


def test_an_answer_that_is_right_for_every_question_is_no_answer_to_this_one():
    assert guarded_score(Forgetful(), Forgetful()[1], "2") == 1.0
    assert guarded_score(Forgetful(), Forgetful()[1], "7") == 0.0


def test_part_of_the_credit_stays_where_the_task_means_it():
    guarded, lenient = scores("rectangle_count?size=1&seed=1", 0, str(int(gold("rectangle_count?size=1&seed=1")) + 1))
    assert 0 < guarded == lenient < 1


@pytest.mark.parametrize("task", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "puzzle24", "countdown", "simple_integration"])
@pytest.mark.parametrize(
    "attack",
    [
        "__import__('os').mkdir('pwned')",
        "[__import__('os').mkdir('pwned')]",
        '\'__import__("os").mkdir("pwned")\'',  # sympy parses text that it is asked to differentiate
        'sin(\'__import__("os").mkdir("pwned")\')',
        "().__class__",
        "exec('1')",
        "9**9**9**9",
        "10**10**10 if 1 else 0",
    ],
)
def test_nothing_in_an_answer_is_executed(task, attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guarded_score(open_task(f"{task}?size=1&seed=1"), question(f"{task}?size=1&seed=1", 0), attack) == 0.0
    assert os.listdir() == []


@pytest.mark.parametrize("bomb", ["[0] * 9999999999", "9999999999 * 'a'", "((0,) + (0,)) * 9999999999", "'%9999999999d' % 1"])
def test_no_list_or_text_is_multiplied(bomb):
    assert not _is_harmless(bomb)


@pytest.mark.parametrize("answer", ["[['Q', '_'], ['_', 'Q']]", "['A', 'B']", "[1, 2, -3]", "(3 + 4) * 2 - 1", "sin(x)**2/2 + C", "{'a': 1}"])
def test_lists_of_plain_values_and_formulas_are_harmless(answer):
    assert _is_harmless(answer)


def test_the_answer_stands_in_the_last_tag_or_is_everything():
    row = {"reasoning_gym_task": "leg_counting?size=1&seed=1", "reasoning_gym_index": 0}
    answer = gold(row["reasoning_gym_task"])
    assert reasoning_gym()(f"<answer>7</answer> no, <answer> {answer} </answer>", **row) == 1.0
    assert reasoning_gym()(answer, **row) == 0.0
    assert reasoning_gym()(f"<answer>{answer}", **row) == 0.0
    assert reasoning_gym(tag=None)(f" {answer}\n", **row) == 1.0
    assert reasoning_gym(tag="solution")(f"<solution>{answer}</solution>", **row) == 1.0


BOMB = "(X+Y+Z+a+b+c)**50"


def scored(rubric, row, *answers):
    task = Task(0, row["prompt"], {name: value for name, value in row.items() if name != "prompt"})
    texts = [f"<answer>{answer}</answer>" for answer in answers]
    group = Group(task, [Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, text) for text in texts])
    report = rubric.score([group])
    return group.rewards, {kind: count for counts in report.failures.values() for kind, count in counts.items()}


def test_a_formula_that_would_be_millions_of_terms_is_not_multiplied_out():
    begun = time.process_time()
    assert guarded_score(open_task("simple_integration?size=1"), question("simple_integration?size=1", 0), BOMB) == 0.0
    assert time.process_time() - begun < 20
    assert not _is_harmless(BOMB)
    assert _is_harmless("(x + 1)**10/10 + C")


@pytest.mark.parametrize(
    ("formula", "terms"), [("x", 1), ("x + 1 - y", 3), ("(x + 1)*(y + 2)", 4), ("(x + 1)**3", 4), ("(x+y+z)**2", 6), ("sin(x + 1)**2", 3)]
)
def test_terms_are_counted_as_after_multiplying_out(formula, terms):
    import ast

    assert _terms(ast.parse(formula, mode="eval").body) == terms


def test_what_runs_for_ever_is_killed_and_dropped_and_the_training_thread_goes_on(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # rows that do not depend on it are made here then
    rubric = Rubric.from_config([{"reward": "reasoning_gym", "guarded": False, "timeout": 2, "memory_mb": 60_000}])
    row = load_rows("reasoning-gym:simple_integration?size=1")[0]  # the bomb has this one's variable
    rewards, failures = scored(rubric, row, row["answer"], BOMB, row["answer"])
    rubric.close()
    assert rewards == [1.0, None, 1.0]
    assert failures == {"timed_out": 1}


def test_as_an_object_too_it_runs_in_workers():
    assert Rubric(reasoning_gym(tag="a")).rewards[0].source.settings == {"tag": "a", "guarded": True}


def test_tasks_that_depend_on_hashes_are_the_same_in_every_process_and_scored_as_asked(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    sources = [f"reasoning-gym:{task}?size=4&seed=1" for task in ("word_ladder", "polynomial_multiplication")]
    code = f"import json; from posttrain.data.sources import load_rows; print(json.dumps([load_rows(source) for source in {sources!r}]))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        tasks = [load_rows(source) for source in sources]
        assert json.loads(other.communicate()[0]) == tasks
    rubric = Rubric("reasoning_gym")
    assert [scored(rubric, row, row["answer"])[0] for rows in tasks for row in rows] == [[1.0]] * 8
    rubric.close()


def test_a_row_whose_answer_is_not_the_questions_stops_the_run(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    rubric = Rubric("reasoning_gym")
    row = load_rows("reasoning-gym:leg_counting?size=1&seed=1")[0]
    with pytest.raises(UserError, match="Make the rows anew"):
        scored(rubric, row | {"answer": "-1"}, "4")
    rubric.close()
