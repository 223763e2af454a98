"""The probe against training itself, small: what it says of groups with signal is what the first rollouts show. benchmarks/probe.py does it in earnest."""

import pytest
from small import build_model, build_tokenizer

from posttrain import GRPOConfig, GRPOTrainer, Rubric, verifier
from posttrain.models.load import stop_token_ids
from posttrain.probe import probe
from posttrain.types import Task

ROWS = [{"prompt": f"{a}+{b}="} for a in range(10) for b in range(10)]


@verifier
def has_a_seven(completion):
    return "7" in completion


@verifier
def has_two_sevens(completion):
    return "77" in completion


@verifier
def has_a_space(completion):
    """Never: the tokenizer has none."""
    return " " in completion


@pytest.mark.parametrize(
    ("reward", "size", "least", "most"), [(has_a_seven, 4, 0.5, 1.0), (has_two_sevens, 8, 0.05, 0.5), (has_a_space, 8, 0.0, 0.0)]
)
def test_the_first_rollouts_show_the_share_that_was_forecast(reward, size, least, most, tmp_path):
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    config = GRPOConfig(
        output_dir=str(tmp_path), num_generations=size, per_device_train_batch_size=16 * size, max_completion_length=6, max_steps=3, learning_rate=1e-6,
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    tasks = [Task(number, row["prompt"]) for number, row in enumerate(ROWS)]
    sampling = config.sampling(stop_token_ids(model, tokenizer))
    found = probe(model, tokenizer, tasks, Rubric(reward), sampling, num_generations=size, prompts=64, groups_per_rollout=48)
    trainer = GRPOTrainer(model, reward, config, ROWS, processing_class=tokenizer)
    trainer.train()
    silent = [log["frac_reward_zero_std"] for log in trainer.state.log_history if "frac_reward_zero_std" in log]
    observed, forecast = 1 - sum(silent) / len(silent), found.signal_per_rollout
    assert len(silent) == 3
    assert least <= observed <= most
    assert forecast.low <= observed <= forecast.high
    assert forecast.high - forecast.low < 0.35
    assert found.can_work == (most > 0)
