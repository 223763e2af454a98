"""A reward in processes of its own: started afresh (nothing is forked), spoken to in lines of JSON over pipes, killed
when a call takes too long.

Each process has one call at a time. One that dies under a call is replaced, and the call made once more there. The
other side is worker.py. This is no sandbox. A process ends, with all that it started, when its call takes too long,
when it ends itself, and when this one does (posttrain/processes.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from dataclasses import asdict
from typing import Any

from posttrain.errors import UserError
from posttrain.processes import guard, release
from posttrain.rewards.execution.calls import Attempt, Notes, RewardCall
from posttrain.rewards.reward import OFFERED, RewardSource

START_SECONDS = 120.0  # for starting Python and importing the reward
START_TRIES = 3
LINE_BYTES = 2**26  # the longest answer that is read
_watches: set[asyncio.Task[None]] = set()  # each waits for the end of a process


class ProcessExecutor:
    """Runs the reward found at `source` in at most `workers` processes. memory_mb: see FailurePolicy."""

    def __init__(self, source: RewardSource, workers: int, memory_mb: int | None = None) -> None:
        self.source = source
        self.memory_mb = memory_mb
        self._idle: list[Process] = []
        self._places = asyncio.Semaphore(workers)
        self._refusal: UserError | None = None  # why no process can start; forgotten with each `run`

    async def run(self, calls: list[RewardCall], seconds: float | None) -> None:
        self._refusal = None
        await asyncio.gather(*(self._run(call, seconds) for call in calls))

    def close(self) -> None:
        while self._idle:
            _kill_group(self._idle.pop())

    async def _run(self, call: RewardCall, seconds: float | None) -> None:
        async with self._places:
            try:
                call.settle(await self._attempt(call, _message(call), seconds))
            except asyncio.TimeoutError:
                call.settle(Attempt(failure=call.timed_out(seconds)))
            except UserError as error:
                call.settle(Attempt(failure=call.failed("raised", str(error), error=error, is_fatal=True)))
            except (OSError, ValueError) as error:  # no process can be started, or its answer has no end
                call.settle(Attempt(failure=call.raised(error)))

    async def _attempt(self, call: RewardCall, message: bytes, seconds: float | None) -> Attempt:
        for deaths in (0, 1):  # a death may have had nothing to do with the call: one more try is free
            call.retried += deaths
            process = self._idle.pop() if self._idle and not deaths else await self._start()  # an idle one may have died meanwhile
            if (said := await _exchange(process, message, seconds)) is not None:
                self._idle.append(process)
                if "raised" in said:
                    return Attempt(failure=call.failed("raised", f"raised {said['raised']}", said["trace"], is_fatal=said["is_fatal"]))
                return Attempt(said["answer"], notes=Notes(said["metrics"], said["extras"]))
        return Attempt(failure=call.failed("raised", "ended its worker twice (out of memory, a crash, os._exit?)"))

    async def _start(self) -> Process:
        """A process that has imported the reward. Raises OSError, and UserError where no other process could either."""
        if self._refusal is not None:
            raise self._refusal
        for _ in range(START_TRIES):
            process = await _spawn()
            try:
                said = await _exchange(process, _line(asdict(self.source) | {"memory_mb": self.memory_mb}), START_SECONDS)
            except asyncio.TimeoutError:
                raise OSError(f"its worker did not start within {START_SECONDS:g} s") from None
            if said is None:
                continue
            if "raised" not in said:
                return process
            await _end(process)
            if said["is_fatal"]:
                self._refusal = UserError(f"cannot start in a worker: {said['raised']}")
                raise self._refusal
            raise OSError(f"its worker cannot import {self.source.name}: {said['raised']}")
        raise OSError(f"its worker died {START_TRIES} times while it started")


def _message(call: RewardCall) -> bytes:
    """The call as a line of JSON. Raises UserError that names an argument which JSON lacks."""
    arguments = dict(call.offered)
    if call.reward.shape == "group":
        arguments["group"] = asdict(arguments["group"])
    logs = [name for name in ("log_metric", "log_extra") if name in OFFERED[call.reward.shape] and name in arguments]
    arguments = {name: value for name, value in arguments.items() if name not in logs}
    if arguments.get("trainer_state") is not None:
        arguments["trainer_state"] = {name: value for name, value in vars(arguments["trainer_state"]).items() if isinstance(value, (int, float, str))}
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            advice = "Store text or numbers in that column, or leave out the timeout"
            raise UserError(f"cannot run in a worker: its argument '{name}' is not JSON ({error}). {advice}") from error
    return _line({"arguments": arguments, "logs": logs})


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


async def _spawn() -> Process:
    hashes = {"PYTHONHASHSEED": "0"} if os.environ.get("PYTHONHASHSEED", "random") == "random" else {}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "posttrain.rewards.execution.worker"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=LINE_BYTES,
        env={**os.environ, **hashes, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        start_new_session=True,  # Ctrl-C is the trainer's; and what the reward starts can be killed with it
    )
    guard(process.pid)
    task = asyncio.ensure_future(_watch(process))
    _watches.add(task)
    task.add_done_callback(_watches.discard)
    return process


async def _exchange(process: Process, line: bytes, seconds: float | None) -> dict[str, Any] | None:
    """Its answer to a line; None when it died instead. Raises asyncio.TimeoutError, and ValueError for an answer beyond
    LINE_BYTES.

    Without an answer, or when the waiting is cancelled, the process is ended: a late answer must not pass for that of
    the next call.
    """
    answer = None
    try:
        answer = await asyncio.wait_for(_answer(process, line), seconds)
        return None if answer is None else dict(json.loads(answer))
    finally:
        if answer is None:
            await _end(process)


async def _answer(process: Process, line: bytes) -> bytes | None:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line)
        await process.stdin.drain()
        answer = await process.stdout.readline()
    except (BrokenPipeError, ConnectionResetError):
        return None
    return answer if answer.endswith(b"\n") else None


async def _end(process: Process) -> None:
    _kill_group(process)
    await process.wait()


async def _watch(process: Process) -> None:
    """When the process ends, kills what it started: at once, before its number can become another process's."""
    await process.wait()
    _kill_group(process, even_if_ended=True)
    release(process.pid)


def _kill_group(process: Process, *, even_if_ended: bool = False) -> None:
    """With all that it started, where the system knows process groups."""
    if process.returncode is not None and not even_if_ended:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
