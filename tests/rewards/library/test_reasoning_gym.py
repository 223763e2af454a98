"""reasoning-gym's scorers, as they are and guarded. The figures for the unguarded ones were found by asking them."""

import os

import pytest

from posttrain.data.sources import load_rows
from posttrain.errors import UserError
from posttrain.procedural import open_task, question
from posttrain.rewards.library.reasoning_gym import _is_harmless, guarded_score, reasoning_gym

factory = pytest.importorskip("reasoning_gym.factory")
MANY = sorted(set(factory.DATASETS) - {"composite", "arc_agi", "rearc", "group_anagrams", "figlet_font", "intermediate_integration", "codeio"})[::3]


def scores(task, index, answer):
    """(guarded, as the library scores it)"""
    completion, row = f"So: <answer>{answer}</answer>", {"reasoning_gym_task": task, "reasoning_gym_index": index}
    return reasoning_gym()(completion, **row), reasoning_gym(guarded=False)(completion, **row)


def gold(task, index=0):
    return question(task, index)["answer"]


def test_rows_name_their_questions_and_are_the_same_every_time():
    source = "reasoning-gym:leg_counting?size=5&seed=3&max_animals=4"
    rows = load_rows(source)
    assert rows == load_rows(source)
    assert len(rows) == 5
    for row in rows:
        entry = question(row["reasoning_gym_task"], row["reasoning_gym_index"])
        assert (row["prompt"], row["answer"]) == (entry["question"], entry["answer"])
    assert rows[0]["prompt"] != load_rows("reasoning-gym:leg_counting?size=5&seed=4&max_animals=4")[0]["prompt"]


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
        load_rows(source)


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
