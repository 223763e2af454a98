"""An online trainer whose algorithm needs no scores: it samples, and learns from its own log-probs. No rubric, no reward in the log."""

from dataclasses import dataclass

import pytest
import torch
from small import build_model

from posttrain.errors import UserError
from posttrain.losses.policy import OBJECTIVES, PolicyOptions
from posttrain.trainers.core.config import settings
from posttrain.trainers.online.config import OnlineConfig
from posttrain.trainers.online.trainer import OnlineTrainer

PROMPTS = [{"prompt": f"{a}+1="} for a in range(8)]


@settings
@dataclass
class SelfConfig(OnlineConfig):
    """Of the trainer below."""


class SelfTrainer(OnlineTrainer):
    """Every sampled token counts as good: its own completions, imitated."""

    needs_scores = False
    objective = OBJECTIVES["grpo"]
    options = PolicyOptions()

    def advantages(self, scores, sizes):
        assert scores == [None] * sum(sizes)
        return torch.ones(sum(sizes))

    def loss(self, model, batch):
        logps, entropy = self.logprobs(model, batch.stream, self.sampling.temperature)[:2]
        terms = self.terms(batch, logps)
        self.note_update(batch, logps, entropy, terms)
        return self.weighted_sum(batch, terms.per_token)


def make(tmp_path, tokenizer, reward_funcs=None, trainer=SelfTrainer, **settings):
    own = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4, "max_steps": 2, "use_cpu": True}
    args = SelfConfig(output_dir=str(tmp_path), save_strategy="no", **own | settings)
    return trainer(build_model(tokenizer), reward_funcs, args, train_dataset=PROMPTS, eval_dataset=PROMPTS[:2], processing_class=tokenizer)


def test_it_trains_and_evaluates_without_a_rubric(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    assert trainer.rubric is None
    assert "no reward" in trainer.plan()
    trainer.train()
    (first, *_) = [log for log in trainer.state.log_history if "loss" in log]
    assert first["completions/mean_length"] > 0
    assert not {"reward", "unscored", "frac_reward_zero_std", "reward_std"} & first.keys()
    assert "eval_completions/mean_length" in trainer.evaluate()


def test_rewards_may_be_watched_all_the_same(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, [lambda completion: float(len(completion))])
    trainer.train()
    assert any("reward" in log for log in trainer.state.log_history)


def test_groups_cannot_be_chosen_by_rewards_that_are_not_there(tmp_path, tokenizer):
    with pytest.raises(UserError, match="compares rewards, and there is none"):
        make(tmp_path, tokenizer, zero_signal_groups="drop")


def test_an_algorithm_that_compares_needs_rewards(tmp_path, tokenizer):
    class Comparing(SelfTrainer):
        needs_scores = True

    with pytest.raises(UserError, match="reward_funcs is empty"):
        make(tmp_path, tokenizer, trainer=Comparing)
