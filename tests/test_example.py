"""The teaching example does what its docstring says, at a size that a test can afford."""

import importlib.util
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "examples" / "one_file_grpo.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("one_file_grpo", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_from_rewards_alone(example):
    torch.set_num_threads(1)
    before, after = example.main(steps=50, prompts=16)
    assert before < 0.7
    assert after > before + 0.15


def test_its_rubric_is_that_of_two_plus_two(example):
    assert example.reward(2, 2, example.encode("4..")) == 4.0
    assert example.reward(2, 2, example.encode("5..")) == -2.0
    assert example.reward(2, 2, example.encode("+=.")) == -4.0
    assert example.reward(2, 2, example.encode("4.7")) == 4.0, "what comes after the end is padding"


def test_its_mask_ends_with_the_first_end(example):
    answers = torch.tensor([example.encode("4.."), example.encode("12."), example.encode("123"), example.encode(".4.")])
    assert example.mask_of(answers).tolist() == [[True, True, False], [True, True, True], [True, True, True], [True, False, False]]
