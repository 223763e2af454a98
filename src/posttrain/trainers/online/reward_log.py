"""What became known besides scores, for the log and the record: what rewards logged, and how they and environments
broke, with first tracebacks."""

from __future__ import annotations

import torch

from posttrain.rewards.scoring import Report
from posttrain.tracking.recorder import Recorder
from posttrain.trainers.core.metrics import Metrics
from posttrain.trainers.core.ranks import gather_json
from posttrain.types import Group


class RewardLog:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._told: set[tuple[str, str]] = set()  # (kind of note, name): the first traceback is in the record

    def add(self, report: Report, groups: list[Group], metrics: Metrics, device: torch.device) -> None:
        """Exact counts: `rewards/NAME/failed_KIND` completions without a score, `rewards/NAME/retried` attempts,
        `episodes/dropped` because their environment broke. Collective."""
        for name, values in report.metrics.items():
            metrics.note(name, sum(values), len(values))
        for name, counts in report.failures.items():
            for kind, count in sorted(counts.items()):
                metrics.count(f"rewards/{name}/{kind if kind == 'retried' else f'failed_{kind}'}", count)
        broken = [completion.broken for group in groups for completion in group.completions if completion.broken is not None]
        if broken:
            metrics.count("episodes/dropped", len(broken))
        traces = [("reward", name, trace) for name, trace in report.traces.items()] + [("env", "", trace) for trace in broken[:1]]
        for name, changed in report.changed.items():
            told = f"while reward '{name}' ran, there changed: {', '.join(changed)}. A reward should leave its process as it was"
            traces.append(("reward", f"{name} changed", told))
        for part in gather_json(traces, device):
            for kind, name, trace in part:
                if (kind, name) not in self._told:
                    self._told.add((kind, name))
                    self.recorder.note(kind, trace)
