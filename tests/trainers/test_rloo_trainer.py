"""RLOO: its first update against loops over completions, what it learns, and what does not change its update."""

from dataclasses import replace

import pytest
import torch
from small import build_float64_model, build_model, many_ones, weights_of

from posttrain import RLOOConfig, RLOOTrainer, UserError


@pytest.fixture
def make(tmp_path, tokenizer, rows):
    def build(model=None, reward=many_ones, **settings):
        base = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 6,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "use_cpu": True,
            "seed": 3,
        }
        return RLOOTrainer(
            build_model(tokenizer) if model is None else model, reward, RLOOConfig(**base | settings), rows, processing_class=tokenizer
        )

    return build


def test_the_reward_rises(make):
    trainer = make(per_device_train_batch_size=32, max_steps=40, learning_rate=3e-3, beta=0.01)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5


@pytest.mark.parametrize("normalize", [False, True])
def test_the_first_update_is_that_of_plain_loops(make, tokenizer, normalize):
    trainer = make(model=build_float64_model(tokenizer), beta=0.3, reward_clip_range=[0.0, 0.3], normalize_advantages=normalize)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainer.reference.frozen.parameters():
            p.add_(0.05 * torch.randn_like(p))
    groups = trainer.collect(trainer.train_dataset[:4])
    trainer.buffer = trainer.learn_from(groups)
    batches = trainer.batches([trainer.buffer.next_slice()])
    found = sum(trainer.loss(trainer.model, batch) for batch in batches)
    found.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    trainer.model.zero_grad()

    def summed(model, completion):
        logits = model(input_ids=torch.tensor([completion.prompt_ids + completion.token_ids])).logits[0, len(completion.prompt_ids) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None]).sum()

    terms = []
    for _, group in groups:
        logps = [summed(trainer.model, completion) for completion in group.completions]
        earned = [
            min(max(completion.reward, 0.0), 0.3) - 0.3 * (logp.item() - summed(trainer.reference.frozen, completion).item())
            for completion, logp in zip(group.completions, logps, strict=True)
        ]
        terms += [(r - (sum(earned) - r) / 3, logp) for r, logp in zip(earned, logps, strict=True)]
    if normalize:
        mean = sum(a for a, _ in terms) / 16
        deviation = (sum((a - mean) ** 2 for a, _ in terms) / 15) ** 0.5 + 1e-4
        terms = [((a - mean) / deviation, logp) for a, logp in terms]
    expected = -sum(a * (logp - logp.detach()).exp() for a, logp in terms) / 16
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-8)
    assert torch.allclose(gradient, torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), atol=1e-8)


def test_an_update_does_not_depend_on_how_it_is_cut(make, tokenizer):
    def run(**settings):
        trainer = make(
            model=build_float64_model(tokenizer), optim="sgd", lr_scheduler_type="constant", learning_rate=0.3, num_iterations=2, **settings
        )
        trainer.train()
        return weights_of(trainer)

    whole = run()
    for budget in (1, 25):
        assert torch.allclose(run(max_tokens_per_micro_batch=budget), whole, rtol=1e-9, atol=1e-11)
    assert torch.allclose(run(per_device_train_batch_size=4, gradient_accumulation_steps=4), whole, rtol=1e-9, atol=1e-11)


def test_completions_that_were_cut_can_be_masked(make):
    trainer = make(mask_truncated_completions=True, max_steps=1, weight_decay=0.0)
    trainer.sampling = replace(trainer.sampling, stop_token_ids=())
    before = weights_of(trainer)
    trainer.train()
    assert torch.equal(weights_of(trainer), before)


def test_a_resumed_run_ends_in_the_same_bits(make, tmp_path):
    settings = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "num_iterations": 2, "sync_ref_model": True, "ref_model_sync_steps": 2}
    whole = make(**settings)
    whole.train()
    resumed = make(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))  # in the middle of a rollout
    assert torch.equal(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_generations": 1}, "a completion's baseline is the mean of its siblings"),
        ({"reward_clip_range": [1.0, 0.0]}, "must be below"),
        ({"reward_clip_range": 3}, "give two numbers"),
        ({"beta": -0.1}, "push the policy away"),
        ({"beta": 0.0, "sync_ref_model": True}, "beta=0.0 uses none"),
        ({"repetition_penalty": 1.2}, "penalised sampler"),
    ],
)
def test_bad_settings_are_explained(make, settings, said):
    with pytest.raises(UserError, match=said):
        make(**settings)


def test_names_of_trl_are_settings(tmp_path):
    RLOOConfig(output_dir=str(tmp_path), num_generations=2, beta=0.05, num_iterations=1, epsilon=0.2, epsilon_high=0.3, reward_weights=[1.0], use_cpu=True,
               normalize_advantages=True, reward_clip_range=(-1.0, 1.0), mask_truncated_completions=True, sync_ref_model=True,
               ref_model_mixup_alpha=0.6, ref_model_sync_steps=512)  # fmt: skip
