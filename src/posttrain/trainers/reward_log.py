"""What rewards had to say besides scores, for the log and the record: their own metrics, and how they broke, with the first traceback of each."""

from __future__ import annotations

import torch

from posttrain.rewards.scoring import Report
from posttrain.tracking.recorder import Recorder
from posttrain.trainers.metrics import Metrics
from posttrain.trainers.ranks import gather_json


class RewardLog:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._told: set[str] = set()  # rewards whose first traceback is in the record

    def add(self, report: Report, metrics: Metrics, device: torch.device) -> None:
        """Exact counts: `rewards/NAME/failed_KIND` completions without a score, `rewards/NAME/retried` attempts. Collective."""
        for name, values in report.metrics.items():
            metrics.note(name, sum(values), len(values))
        for name, counts in report.failures.items():
            for kind, count in sorted(counts.items()):
                metrics.count(f"rewards/{name}/{kind if kind == 'retried' else f'failed_{kind}'}", count)
        for traces in gather_json(report.traces, device):
            for name, trace in traces.items():
                if name not in self._told:
                    self._told.add(name)
                    self.recorder.note("reward", trace)
