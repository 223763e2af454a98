"""A process that ends after the last step's checkpoint and before it hands on its model: the next one hands on the same model, and trains nothing."""

import pytest
import torch
from small import weights_of
from small_preferences import PAIRS, start

from posttrain.errors import UserError

SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


@pytest.mark.parametrize("learning_rate", [1e-2, 0.5])
def test_the_best_model_is_loaded_as_at_the_end_of_the_uninterrupted_run(tmp_path, learning_rate):
    """With a rate that ruins the model the best step is an early one."""
    settings = SETTINGS | {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": learning_rate}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    whole, again = (start("dpo", tmp_path, trainer={"eval_dataset": PAIRS[:2]}, **settings) for _ in range(2))
    whole.train()
    assert (whole.state.best_global_step == 4) == (learning_rate == 1e-2)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights_of(again), weights_of(whole))
    assert again.state.best_model_checkpoint == whole.state.best_model_checkpoint


def test_a_finished_run_needs_no_optimizer(tmp_path):
    settings = SETTINGS | {"save_only_model": True}
    whole = start("dpo", tmp_path, **settings)
    whole.train()
    again = start("dpo", tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights_of(again), weights_of(whole))
    with pytest.raises(UserError, match="holds weights without the optimizer"):
        start("dpo", tmp_path, **settings | {"max_steps": 5}).train(resume_from_checkpoint=True)
