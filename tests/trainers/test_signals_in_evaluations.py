"""A signal in a run that evaluates and keeps its best model: what was done is saved and stays, and the resumed run decides as the uninterrupted one."""

import os
import signal

import pytest
import torch
from small import weights_of
from small_preferences import PAIRS, start
from transformers import TrainerCallback

from posttrain.trainers.core import checkpoints

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent as POSIX systems do")
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Signals(TrainerCallback):
    """Sends SIGTERM to this process at a step, as it ends or as it is evaluated."""

    def __init__(self, step, *, in_evaluation=False):
        self.step, self.in_evaluation = step, in_evaluation
        self.evaluated = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1 and not self.in_evaluation:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)
        if state.global_step == self.step and self.in_evaluation:
            os.kill(os.getpid(), signal.SIGTERM)


def dpo(folder, *callbacks, **settings):
    return start("dpo", folder, trainer={"eval_dataset": PAIRS[:2], "callbacks": list(callbacks)}, **settings)


def stop(folder, callback, **settings):
    with pytest.raises(SystemExit) as ended:
        dpo(folder, callback, **settings).train()
    assert ended.value.code == 143


def test_the_step_that_was_saved_stays_although_an_earlier_one_is_best(tmp_path):
    """transformers removes all but the best checkpoint at the end of a training, with save_total_limit=1."""
    stop(tmp_path, Signals(4), **BEST | STEPS, save_total_limit=1, max_steps=8, learning_rate=0.5)
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_signal_during_the_evaluation_of_an_epoch_loses_no_step(tmp_path):
    epoch = -(-len(PAIRS) // 4)
    settings = {
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 100,
        "max_steps": -1,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
    }
    stop(tmp_path, Signals(epoch, in_evaluation=True), **settings)
    assert checkpoints.last_checkpoint(tmp_path).name == f"checkpoint-{epoch}"


def test_a_signal_within_an_epoch_adds_no_evaluation_that_could_choose_the_best_model(tmp_path):
    settings = BEST | EPOCHS | {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    whole = dpo(tmp_path / "whole", **settings)
    whole.train()
    signals = Signals(2)
    stop(tmp_path / "halves", signals, **settings)
    assert signals.evaluated == []
    again = dpo(tmp_path / "halves", **settings)
    again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in again.state.log_history if "eval_loss" in row] == [
        row["step"] for row in whole.state.log_history if "eval_loss" in row
    ]
    assert torch.equal(weights_of(again), weights_of(whole))


def test_a_step_that_is_not_the_best_is_saved_although_only_the_best_are_kept(tmp_path):
    settings = BEST | {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 8, "learning_rate": 0.5}
    stop(tmp_path, Signals(4), **settings)
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_finished_run_keeps_its_best_checkpoint_alone_as_in_transformers(tmp_path):
    trainer = dpo(tmp_path, **BEST | STEPS, save_total_limit=1, max_steps=4, learning_rate=0.5)
    trainer.train()
    assert trainer.state.best_global_step < 4
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == [f"checkpoint-{trainer.state.best_global_step}"]
    assert trainer.args.save_total_limit == 1
