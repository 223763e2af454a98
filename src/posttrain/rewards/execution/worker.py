"""The process that a reward runs in: `python -m posttrain.rewards.execution.worker`. One line of JSON in, one out; the
first names the reward.

The pipes are moved away before the reward is imported, so what it prints goes to stderr and cannot pass for an answer.
It runs on the main thread. When the trainer has ended, its end of the pipe is closed and this process ends too; if it
cannot, because the reward holds the interpreter's lock, the guard kills it (posttrain/processes.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import queue
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from posttrain.errors import UserError
from posttrain.rewards.execution.calls import Notes, plain
from posttrain.rewards.execution.inline import exhausted
from posttrain.rewards.failures import trace_of, what_of
from posttrain.rewards.loading import load_reward
from posttrain.rewards.reward import RewardFunction
from posttrain.types import Completion, Group, StopReason, Task


def main() -> None:
    lines, answers = _pipes()
    reward = None
    while True:
        asked = json.loads(lines.get())
        try:
            if reward is None:
                reward = _load(**asked)
                answer: dict[str, Any] = {"ready": True}
            else:
                answer = _answer(reward, asked["arguments"], asked["logs"])
        except BaseException as error:  # only its own reward interrupts a worker
            answer = {"raised": what_of(error), "trace": trace_of(error), "is_fatal": isinstance(error, UserError)}
        answers.write(json.dumps(answer, default=repr).encode() + b"\n")
        answers.flush()


def _pipes() -> tuple[queue.SimpleQueue[bytes], BinaryIO]:
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in asked:
            lines.put(line)
        os._exit(0)  # the trainer is gone; the reward may be in the middle of something endless

    threading.Thread(target=read, daemon=True).start()
    return lines, answers


def _load(name: str, settings: dict[str, Any], folder: str | None, index: int | None, memory_mb: int | None) -> RewardFunction:
    loaded = load_reward(name, settings, folder=folder)
    if isinstance(loaded, list):
        assert index is not None
        loaded = loaded[index]
    if loaded.prepare is not None:
        loaded.prepare()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # where memory runs out the system ends this process, not the trainer
            Path("/proc/self/oom_score_adj").write_text("800", encoding="utf-8")
        if memory_mb is not None:
            _limit_memory(memory_mb * 2**20)
    return loaded


def _limit_memory(more: int) -> None:
    """A MemoryError for what goes beyond `more` bytes. Only private memory counts: not what libraries reserve or map
    from files."""
    import resource

    used = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmData")
    )
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _answer(reward: RewardFunction, arguments: dict[str, Any], logs: list[str]) -> dict[str, Any]:
    notes = Notes()
    loggers = {"log_metric": notes.log_metric, "log_extra": notes.log_extra}
    if reward.shape == "group":
        arguments["group"] = _group(**arguments["group"])
    if arguments.get("trainer_state") is not None:
        arguments["trainer_state"] = SimpleNamespace(**arguments["trainer_state"])
    answer = reward.function(**arguments, **{name: loggers[name] for name in logs})
    if inspect.isawaitable(answer):
        answer = asyncio.run(_awaited(answer))
    return {"answer": plain(exhausted(answer)), "metrics": notes.metrics, "extras": notes.extras}


async def _awaited(answer: Any) -> Any:
    return await answer


def _group(task: dict[str, Any], completions: list[dict[str, Any]]) -> Group:
    return Group(Task(**task), [Completion(**completion | {"stop": StopReason(completion["stop"])}) for completion in completions])


if __name__ == "__main__":
    main()
