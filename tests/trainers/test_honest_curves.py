"""What the curves say: rewards of everything that was drawn, also of what was dropped; each metric averaged over what its name counts."""

import statistics

import pytest
import torch

from posttrain.tracking.reader import CompletionKey, RunReader


class Seen:
    """A reward that remembers every completion it was asked about, in the order of the groups."""

    __name__ = "seen"

    def __init__(self):
        self.calls = []

    def __call__(self, completions, completion_ids, **columns):
        scores = [float(text.count("1") > 0) for text in completions]
        self.calls += zip(scores, map(len, completion_ids), strict=True)
        return scores


@pytest.mark.parametrize("zero_signal_groups", ["keep", "drop", "resample"])
def test_rewards_and_signal_are_those_of_every_completion_drawn(make_trainer, zero_signal_groups):
    seen = Seen()
    trainer = make_trainer(reward=seen, max_steps=4, logging_steps=2, per_device_train_batch_size=16, zero_signal_groups=zero_signal_groups)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == 2
    scores = [score for score, _ in seen.calls]
    groups = [scores[first : first + 4] for first in range(0, len(scores), 4)]
    dead = [len(set(group)) == 1 for group in groups]
    assert 0 < sum(dead) < len(dead), "the test needs groups of both sorts"
    reader = RunReader(trainer.args.output_dir)
    kept = sum(len(reader.groups(step)) for step in reader.steps())
    if zero_signal_groups == "drop":
        assert kept == len(groups) - sum(dead)
    # both logs together are means over known parts: what each was weighted with adds up to the whole
    if zero_signal_groups != "resample":  # there a log covers a number of groups that only the rollout knows
        half = len(groups) // 2
        for log, part in zip(logs, (groups[:half], groups[half:]), strict=True):
            flat = [score for group in part for score in group]
            assert log["reward"] == pytest.approx(statistics.fmean(flat))
            assert log["rewards/seen/mean"] == pytest.approx(statistics.fmean(flat))
            assert log["frac_reward_zero_std"] == pytest.approx(statistics.fmean(len(set(group)) == 1 for group in part))
            assert log["reward_std"] == pytest.approx(statistics.fmean(statistics.stdev(group) for group in part))
    else:
        assert len(groups) > 4 * 4, "the test needs prompts that were drawn again"
        assert min(log["reward"] for log in logs) <= statistics.fmean(scores) <= max(log["reward"] for log in logs)
        assert min(log["frac_reward_zero_std"] for log in logs) <= statistics.fmean(dead) <= max(log["frac_reward_zero_std"] for log in logs)


def test_lengths_are_means_over_completions_and_entropy_over_tokens(make_trainer, make_model):
    model = make_model()
    model.get_output_embeddings().weight.data *= 30  # some next tokens are surer than others, so that means differ
    trainer = make_trainer(
        model=model, max_steps=2, logging_steps=2, per_device_train_batch_size=16, max_tokens_per_micro_batch=24, beta=0.01, record_tokens_of=100
    )
    trainer.train()
    log = next(log for log in trainer.state.log_history if "reward" in log)
    reader = RunReader(trainer.args.output_dir)
    rows = [row for step in reader.steps() for group in reader.groups(step) for row in reader.completions(step, group.group)]
    assert log["completions/mean_length"] == pytest.approx(statistics.fmean(row.length for row in rows))
    assert log["completions/clipped_ratio"] == pytest.approx(statistics.fmean(row.stop == "length" for row in rows))
    ended = [row.length for row in rows if row.stop == "stop"]
    assert ended
    assert log["completions/mean_terminated_length"] == pytest.approx(statistics.fmean(ended))
    updates = [update for row in rows for update in reader.tokens(CompletionKey(*row.key)).updates]
    assert len({len(update.entropy) for update in updates}) > 1, "the test needs completions of different lengths"
    entropies = [value for update in updates for value in update.entropy]
    assert log["entropy"] == pytest.approx(statistics.fmean(entropies), rel=2e-3)  # the record keeps half precision
    kls = [value for update in updates for value in update.kl]
    assert log["kl"] == pytest.approx(statistics.fmean(kls), rel=5e-3, abs=1e-6)
    of_means = statistics.fmean(statistics.fmean(update.entropy) for update in updates)
    assert abs(of_means - log["entropy"]) > 5e-3 * log["entropy"], "a mean of means would have passed"


def test_other_trackers_get_the_same_numbers_as_the_record(make_trainer, tmp_path):
    """report_to goes on working beside the record."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard")
    trainer = make_trainer(max_steps=3, report_to="tensorboard")
    trainer.train()
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents*"))
    board = accumulator.EventAccumulator(str(folder))
    board.Reload()
    reader = RunReader(trainer.args.output_dir)
    for name in ("reward", "rewards/many_ones/mean", "entropy", "grad_norm", "completions/mean_length"):
        theirs = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert theirs == [(point.step, pytest.approx(point.mean, rel=1e-6)) for point in reader.series(name)]


def test_spreads_and_extremes_of_a_log_are_those_of_its_values(make_trainer, monkeypatch):
    """rewards/NAME/std over all completions (n - 1), lengths of those that ended by themselves, clip ratios of completions."""
    seen = []
    trainer = make_trainer(
        [lambda completion: float(len(completion)) + 1e6], max_steps=1, num_iterations=2, steps_per_generation=1, epsilon=1e-4, learning_rate=1e-2
    )
    score = trainer._score

    def scored(groups, *rest):
        score(groups, *rest)
        seen.extend(completion for group in groups for completion in group.completions)

    monkeypatch.setattr(trainer, "_score", scored)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    (name,) = trainer.rubric.names
    values = torch.tensor([completion.scores[name] for completion in seen], dtype=torch.float64)
    assert log[f"rewards/{name}/std"] == pytest.approx(values.std().item(), rel=1e-9)
    ended = [len(completion.token_ids) for completion in seen if not completion.is_truncated]
    assert ended
    assert (log["completions/min_terminated_length"], log["completions/max_terminated_length"]) == (min(ended), max(ended))
    assert log["clip_ratio/low_min"] <= log["clip_ratio/low_mean"]
    assert log["clip_ratio/high_mean"] <= log["clip_ratio/high_max"] <= 1
