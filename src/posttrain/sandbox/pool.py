"""Many programs at once: a few threads, each of which waits for one program in its process."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from posttrain.sandbox.job import Job, Runner, Verdict


class Pool:
    """Judges up to `workers` programs at once (default: one for each core that this process may use). Close it, or use
    it in a `with` block."""

    def __init__(self, runner: Runner, workers: int | None = None) -> None:
        self.runner = runner
        self.workers = workers or usable_cores()
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="posttrain-sandbox")

    def submit(self, job: Job) -> Future[Verdict]:
        return self._threads.submit(self.runner.judge, job)

    def judge_all(self, jobs: Iterable[Job]) -> list[Verdict]:
        """One verdict for each job, in their order."""
        return [future.result() for future in [self.submit(job) for job in jobs]]

    def close(self) -> None:
        """Waits for the programs that run; those not started yet are dropped."""
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
