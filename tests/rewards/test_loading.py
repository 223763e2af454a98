"""Rewards by name: the user's files and modules."""

import pytest

from posttrain.errors import UserError
from posttrain.rewards import Rubric
from posttrain.rewards.loading import load_reward


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "beside.py").write_text("GOAL = 4\n")
    (tmp_path / "mine.py").write_text(
        "from beside import GOAL\ndef near(completion, scale=1.0):\n    return -abs(float(completion) - GOAL) * scale\n"
    )
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    return tmp_path


def test_a_function_of_a_file_is_loaded_with_what_lies_beside_it(folder):
    made = load_reward(f"{folder}/mine.py:near")
    assert made.name == "near"
    assert made("3") == -1.0


def test_a_file_is_looked_for_beside_the_recipe(folder):
    assert load_reward("mine.py:near", folder=str(folder))("3") == -1.0


def test_settings_are_bound_and_checked(folder):
    assert load_reward(f"{folder}/mine.py:near", {"scale": 2.0})("3") == -2.0
    with pytest.raises(UserError, match=r"'scal' is not a setting .* Did you mean 'scale'"):
        load_reward(f"{folder}/mine.py:near", {"scal": 2.0})


def test_a_module_is_loaded_by_its_name():
    assert load_reward("posttrain.rewards.library.arithmetic:right_number").name == "right_number"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mime.py:near", "Did you mean 'mine.py'"),
        ("mine.py:nearr", "Did you mean 'near'"),
        ("mine.py:", "has no function ''"),
        ("broken.py:x", "nothing_of_that_name"),
        ("no.such.module:x", "cannot be imported"),
        ("nothing", "the library has: arithmetic, gsm8k"),
    ],
)
def test_what_cannot_be_loaded_is_explained(folder, name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name, folder=str(folder))


def test_a_rubric_takes_names(folder):
    assert Rubric("arithmetic", f"{folder}/mine.py:near").names == ["number_detected", "right_number", "near"]


def test_a_file_that_leaves_while_it_is_imported_is_a_sentence(tmp_path):
    (tmp_path / "script.py").write_text("import sys\n\ndef f(completion):\n    return 0.0\n\nsys.exit(0)\n")
    with pytest.raises(UserError, match="cannot be imported: SystemExit"):
        load_reward(f"{tmp_path}/script.py:f")
