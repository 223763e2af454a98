"""Numbers and short texts that the live page and the report both show: how a run stands, and a group as a table."""

from __future__ import annotations

import time

from posttrain.characters import visible
from posttrain.tracking.lines import duration, number, share
from posttrain.watch.curves import WatchedRun
from posttrain.watch.story import Story

# What stands in figures above the charts: the first that a run has logged of each row.
FIGURES = (
    ("reward", ("reward",), number),
    ("solved", ("solved", "accuracy", "rewards/accuracies", "mean_token_accuracy"), share),
    ("with signal", ("frac_reward_zero_std",), lambda without: share(1 - without)),
    ("margin", ("rewards/margins", "margin"), number),
    ("loss", ("loss",), number),
    ("entropy", ("entropy",), number),
    ("KL", ("kl",), number),
    ("truncated", ("completions/clipped_ratio",), share),
    ("tokens/s", ("tokens_per_second",), number),
    ("s per step", ("step_time",), number),
)
FIGURE_LABELS = {"accuracy": "right order", "rewards/accuracies": "preferred", "mean_token_accuracy": "next token right"}


def figures(run: WatchedRun) -> list[tuple[str, str]]:
    """(label, value) of what the run last logged."""
    said = []
    for label, metrics, show in FIGURES:
        metric = next((metric for metric in metrics if run.last(metric) is not None), None)
        is_no_sign = label == "loss" and run.last("reward") is not None  # of learning: it is near 0 whatever happens
        if metric is not None and not is_no_sign:
            said.append((FIGURE_LABELS.get(metric, label), show(run.last(metric) or 0.0)))
    return said


def status(run: WatchedRun) -> str:
    """How far it is, in words: `GRPO · step 120 of 150 · 2:10 · last step 3 s ago`, or at its end `finished`, or before
    that `stopped`."""
    if run.fault:
        return f"cannot be read: {run.fault}"
    if run.reader is None:
        return "has not begun"
    parts = [visible(run.method)] if run.method else []
    parts.append(f"step {run.step:,}" + (f" of {run.max_steps:,}" if run.max_steps else ""))
    parts.append(duration(run.seconds))
    if run.has_ended:
        parts.append("finished" if run.is_finished else "stopped")
    elif run.step:
        parts.append(f"last step {_ago(time.time() - run.written_at)} ago")
    return " · ".join(parts)


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(round(seconds), 0)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def table(story: Story) -> list[list[str]]:
    """A head line, then every completion's components, total and advantage."""
    rows = [["", *(visible(name) for name in story.components), "total", "advantage", "tokens", "ended"]]
    for completion in story.completions:
        row = completion.row
        scores = [said(row.scores.get(name)) for name in story.components]
        rows.append(
            [
                f"#{row.key.completion}",
                *scores,
                said(row.reward),
                f"{row.advantage:+.2f}",
                str(row.length),
                "cut" if completion.is_truncated else "itself",
            ]
        )
    return rows


def said(value: float | None) -> str:
    return "–" if value is None else number(value)
