"""One whole GRPO step, rollout to weights, against a plain implementation: transformers rows, log_softmax, loops."""

import copy
import math

import pytest
import torch
from small import weights_of


def test_a_step_equals_plain_policy_gradient_by_hand(make_trainer, make_model, tokenizer):
    seen = []

    def reward(prompts, completions, completion_ids, **kwargs):
        scores = [text.count("1") / 4 + len(text) / 100 for text in completions]
        seen.append((prompts, completion_ids, scores))
        return scores

    model = make_model()
    plain = copy.deepcopy(model)
    trainer = make_trainer(reward=reward, model=model, max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0)
    trainer.train()

    prompts, completions, scores = seen[0]
    loss, tokens = 0.0, sum(map(len, completions))
    for first in range(0, len(prompts), 4):
        group = torch.tensor(scores[first : first + 4], dtype=torch.float64)
        advantages = (group - group.mean()) / (group.std() + 1e-4)
        for prompt, ids, advantage in zip(prompts[first : first + 4], completions[first : first + 4], advantages, strict=True):
            prompt_ids = tokenizer(prompt)["input_ids"]
            logits = plain(input_ids=torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            loss = loss - advantage * (logps / logps.detach().exp() * logps.detach().exp()).sum() / tokens
    loss.backward()
    expected = torch.cat([(p - p.grad).detach().flatten() for p in plain.parameters()])
    assert torch.allclose(weights_of(trainer), expected, atol=2e-6)
    assert not torch.allclose(weights_of(trainer), torch.cat([p.detach().flatten() for p in plain.parameters()]), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_temperature_divides_the_trainers_logits_too(make_trainer, temperature):
    trainer = make_trainer(max_steps=2, temperature=temperature)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ratio" in log]
    assert all(log["sampling/logp_difference/max"] < 1e-4 for log in logs)


@pytest.mark.parametrize("budget", [None, 16], ids=["one micro-batch", "many"])
def test_the_entropy_bonus_is_a_mean_over_the_tokens_that_are_trained(make_trainer, monkeypatch, budget):
    """Equal rewards leave the bonus alone in the loss."""
    settings = {"entropy_coef": 0.5, "top_entropy_quantile": 0.3, "max_tokens_per_micro_batch": budget, "max_steps": 1}
    trainer = make_trainer(reward=lambda completions, **_: [1.0] * len(completions), **settings)
    seen = []
    note = trainer.note_update

    def watched(batch, logps, entropy, terms):
        seen.extend(entropy[batch.mask].tolist())
        note(batch, logps, entropy, terms)

    monkeypatch.setattr(trainer, "note_update", watched)
    trainer.train()
    seen.sort(reverse=True)
    place = 0.3 * (len(seen) - 1)
    undecided = seen[: math.floor(place) + 1]  # the quantile lies between two of them, or on one
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(-0.5 * sum(undecided) / len(undecided), rel=1e-5)
    assert log["entropy_coef"] == 0.5


def test_reward_rises(make_trainer):
    trainer = make_trainer(max_steps=25, per_device_train_batch_size=32, num_generations=8, learning_rate=5e-3)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.3
