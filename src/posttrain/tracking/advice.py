"""Sentences about a run that is going wrong, each said once, with what to change. Only what the logs prove; no guesses
about quality."""

from __future__ import annotations

from collections.abc import Mapping

from posttrain.characters import visible
from posttrain.tracking.alarms import Alarms
from posttrain.tracking.lines import plain_name

CUT_SHARE = 0.9  # above it, rewards for an answer at the end can hardly be earned
ZERO_VARIANCE_LOGS = 5  # so many logs in a row without any signal are no accident


class Advisor:
    """Reads each log once. `max_completion_length`: the run's setting; None for runs without completions."""

    def __init__(self, max_completion_length: int | None = None) -> None:
        self.max_completion_length = max_completion_length
        self._said: set[str] = set()
        self._zero_variance = 0
        self._alarms = Alarms()

    def read(self, logs: Mapping[str, float]) -> list[str]:
        """New advice, usually none."""
        found = {"cut": self._cut(logs), "zero variance": self._no_signal(logs), "unscored": self._unscored(logs), "broken": self._broken(logs)}
        new = {kind: sentence for kind, sentence in found.items() if sentence is not None and kind not in self._said}
        self._said.update(new)
        return [*new.values(), *self._alarms.read(logs)]

    def _cut(self, logs: Mapping[str, float]) -> str | None:
        cut = logs.get("completions/clipped_ratio", 0.0)
        if cut <= CUT_SHARE or self.max_completion_length is None:
            return None
        limit = self.max_completion_length
        return f"{100 * cut:.0f} % of completions were truncated at max_completion_length={limit}; rewards for the answer can hardly be earned. Try {4 * limit}."

    def _no_signal(self, logs: Mapping[str, float]) -> str | None:
        if "frac_reward_zero_std" in logs:
            self._zero_variance = self._zero_variance + 1 if logs["frac_reward_zero_std"] >= 1.0 else 0
        if self._zero_variance < ZERO_VARIANCE_LOGS:
            return None
        return (
            f"in the last {ZERO_VARIANCE_LOGS} logs no group had a signal: all completions of a prompt earned the same reward, so nothing can be learned. "
            "If the reward is at its lowest, the task is too hard: easier rows, a few steps of SFT first, or a larger num_generations. "
            "If it is at its highest, the task is done."
        )

    def _unscored(self, logs: Mapping[str, float]) -> str | None:
        share = logs.get("unscored", 0.0)
        if share <= 0.5:
            return None
        return f"{100 * share:.0f} % of completions could not be scored (no reward could, or one broke); they are left out of training. Check the rewards."

    def _broken(self, logs: Mapping[str, float]) -> str | None:
        counts = [f"{value:.0f} {visible(name)}" for name, value in logs.items() if _is_failure(name)]
        if not counts:
            return None
        return (
            f"completions were dropped because a reward or an environment broke over them: {', '.join(counts)}. "
            "The first traceback is in the notes of run.sqlite."
        )


def _is_failure(name: str) -> bool:
    """In training or in an evaluation."""
    _, metric = plain_name(name)
    return metric == "episodes/dropped" or (metric.startswith("rewards/") and "/failed_" in metric)
