"""A reward in processes of its own: started afresh (nothing is forked), spoken to in lines of JSON over pipes, killed when a call takes too long.

Each process has one call at a time, so its answer is that call's. A process that dies under a call is replaced and the call made once more
there; what a killed one still had to say is never read. This side keeps time; worker.py is the other one. A worker is no sandbox. It ends with
all that it started when its call takes too long, when it ends itself, and when this process does (processes.py).
"""

from __future__ import annotations

import asyncio
import atexit
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
from posttrain.rewards.execution.answers import failed, raised, scores_of, timed_out
from posttrain.rewards.execution.calls import Call, Notes, Scores
from posttrain.rewards.execution.executors import Attempt
from posttrain.rewards.reward import OFFERED, Source

START_SECONDS = 120.0  # for starting Python and importing the reward
START_TRIES = 3
LINE_BYTES = 2**26  # the longest answer that is read
_alive: dict[Process, asyncio.Task[None]] = {}  # each with what waits for its end


class WorkerLane:
    """Runs the reward found at `source` in at most `workers` processes. memory_mb: see policy.py."""

    def __init__(self, source: Source, workers: int, memory_mb: int | None = None) -> None:
        self.source = source
        self.memory_mb = memory_mb
        self._idle: list[Process] = []
        self._places = asyncio.Semaphore(workers)
        self._refusal: UserError | None = None  # why no worker can start; asked anew with each `run`

    async def run(self, attempts: list[Attempt], seconds: float | None) -> None:
        self._refusal = None
        await asyncio.gather(*(self._run(attempt, seconds) for attempt in attempts))

    def close(self) -> None:
        while self._idle:
            _kill(self._idle.pop())

    async def _run(self, attempt: Attempt, seconds: float | None) -> None:
        try:
            line = message_of(attempt.call)
        except TypeError as error:
            attempt.scores = failed(attempt.call, "raised", f"cannot run in a worker: {error}", is_fatal=True)
            return
        async with self._places:
            for deaths in (0, 1):  # a death may have had nothing to do with the call: one more try is free
                attempt.call.retried += deaths
                try:
                    attempt.scores = await self._ask(attempt, line, seconds, fresh=deaths > 0) or []
                except UserError as error:
                    attempt.scores = failed(attempt.call, "raised", str(error), error=error, is_fatal=True)
                except (OSError, ValueError) as error:  # no process can be started, or its answer has no end
                    attempt.scores = raised(attempt.call, error)
                if attempt.scores:
                    return
        attempt.scores = failed(attempt.call, "raised", "ended its worker twice (out of memory, a crash, os._exit?)")

    async def _ask(self, attempt: Attempt, line: bytes, seconds: float | None, *, fresh: bool) -> Scores | None:
        """None: the process died. fresh: one that has not been idle, for it cannot have died meanwhile."""
        process = self._idle.pop() if self._idle and not fresh else await self._start()
        answer = None
        try:
            answer = await asyncio.wait_for(_exchange(process, line), seconds)
            return None if answer is None else read_answer(attempt, answer)
        except asyncio.TimeoutError:
            assert seconds is not None
            return timed_out(attempt.call, seconds)
        finally:
            if answer is not None:
                self._idle.append(process)
            else:  # late, dead, or nobody waits any more: what it still says must not be taken for another answer
                await _end(process)

    async def _start(self) -> Process:
        """A process that has imported the reward. Raises OSError, and UserError where no other process could either."""
        if self._refusal is not None:
            raise self._refusal
        for _ in range(START_TRIES):
            process = await self._spawn()
            said = None
            try:
                said = await asyncio.wait_for(_exchange(process, _line(asdict(self.source) | {"memory_mb": self.memory_mb})), START_SECONDS)
            except asyncio.TimeoutError:
                raise OSError(f"its worker did not start within {START_SECONDS:g} s") from None
            finally:
                if said is None:
                    await _end(process)
            if said is not None:
                break
        else:
            raise OSError(f"its worker died {START_TRIES} times while it started")
        if "raised" in (report := json.loads(said)):
            await _end(process)
            if report["is_fatal"]:
                self._refusal = UserError(f"cannot start in a worker: {report['raised']}")
                raise self._refusal
            raise OSError(f"its worker cannot import {self.source.name}: {report['raised']}")
        return process

    async def _spawn(self) -> Process:
        hashes = {"PYTHONHASHSEED": "0"} if os.environ.get("PYTHONHASHSEED", "random") == "random" else {}
        environment = {**os.environ, **hashes, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "posttrain.rewards.execution.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=LINE_BYTES,
            env=environment,
            start_new_session=True,  # Ctrl-C is the trainer's; and what the reward starts can be killed with it
        )
        guard(process.pid)
        _alive[process] = asyncio.ensure_future(_see_off(process))
        return process


def message_of(call: Call) -> bytes:
    """The call as a line of JSON. Raises TypeError that names an argument which JSON lacks."""
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
            raise TypeError(f"its argument '{name}' is not JSON ({error}). Store text or numbers in that column, or leave out the timeout") from error
    return _line({"arguments": arguments, "logs": logs})


def read_answer(attempt: Attempt, line: bytes) -> Scores:
    said = json.loads(line)
    if "raised" in said:
        return failed(attempt.call, "raised", f"raised {said['raised']}", said["trace"], is_fatal=said["is_fatal"])
    attempt.notes = Notes(said["metrics"], said["extras"])
    return scores_of(attempt.call, said["answer"])


async def _exchange(process: Process, line: bytes) -> bytes | None:
    """Its answer to a line; None when it died instead. Raises ValueError for an answer beyond LINE_BYTES."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line)
        await process.stdin.drain()
        answer = await process.stdout.readline()
    except (BrokenPipeError, ConnectionResetError):
        return None
    return answer if answer.endswith(b"\n") else None


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


async def _end(process: Process) -> None:
    _kill(process)
    await process.wait()


async def _see_off(process: Process) -> None:
    """However it ends, what it started ends with it. At once, while its number is nobody else's."""
    await process.wait()
    _kill_group(process)
    release(process.pid)
    del _alive[process]


def _kill(process: Process) -> None:
    if process.returncode is None:
        _kill_group(process)


def _kill_group(process: Process) -> None:
    """With all that it started, where the system knows process groups."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


@atexit.register
def _kill_all() -> None:
    for process in list(_alive):
        _kill(process)
