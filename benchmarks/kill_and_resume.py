"""Are runs that are killed and resumed the runs they would have been? Each training command, full, with LoRA and with QLoRA, and recipes of several
stages are started by the command line, ended by SIGKILL at random moments, resumed, and compared with a run that nobody interrupted: the bits of the
final weights, and every row of the record.

The first uninterrupted run is `posttrain` in a fresh interpreter. All others are forked from this process, which has only imported torch and posttrain:
a start then takes milliseconds instead of seconds. A fork would inherit the state of every random generator, so each one seeds torch, numpy and random
from the system's entropy before it begins (as a fresh process has it), and none is equal by luck. --start fresh starts all of them as interpreters,
--start forked none.

Half of the moments are points in time, half are numbers of a file operation (open for writing, mkdir, rename, remove), as Python's audit events count
them; of a recipe with stages, half of these lie at the borders between stages. Every third run is killed a second time while it resumes.
Prints a table, and writes results/kill_and_resume.json (--output for another file).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hardware
from killed_runs import KINDS, METHODS, STAGES, arguments, difference, make_world

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "sqlite3.connect"}  # audit events, with writing opens
AGAIN = 1 / 3  # how often a resumed run is killed as well


@dataclass(frozen=True)
class Ended:
    status: int  # the exit code; of a killed process -9
    seconds: float
    events: list[str]  # its file operations; of a killed process none


@dataclass(frozen=True)
class Moment:
    """When to kill: after so many seconds, or at a file operation. Neither: never."""

    seconds: float | None = None
    event: int | None = None


@dataclass
class Tally:
    """What became of the killed runs of a method and kind."""

    method: str
    kind: str
    same: int = 0
    kills: int = 0
    twice: str = ""  # what the second uninterrupted run, in a process of another kind, did not have in common with the first; "": nothing
    failures: list[str] = field(default_factory=list)


# Processes


def run_fresh(argv: list[str], log: Path, moment: Moment = Moment()) -> Ended:
    """`posttrain argv` in an interpreter of its own."""
    started = time.perf_counter()
    with log.open("ab") as output:
        command = [sys.executable, "-m", "posttrain.cli.main", *argv]
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            child.wait(moment.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
    return Ended(child.wait(), time.perf_counter() - started, [])


def run_forked(argv: list[str], log: Path, moment: Moment = Moment()) -> Ended:
    """`posttrain argv` in a fork of this process."""
    events = log.with_suffix(".events")
    events.unlink(missing_ok=True)
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _as_child(argv, log, events, moment.event)
        finally:
            os._exit(code)
    status: int | None = None
    while status is None:
        time.sleep(0.002)
        ended, raw = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(raw)
        elif moment.seconds is not None and time.perf_counter() - started > moment.seconds:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    return Ended(status, time.perf_counter() - started, events.read_text().splitlines() if events.is_file() else [])


def _as_child(argv: list[str], log: Path, events: Path, kill_at: int | None) -> int:
    """The command line, as a new process would begin it. Returns its exit code."""
    import numpy as np
    import torch

    os.setsid()
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    random.seed()
    np.random.seed(int.from_bytes(os.urandom(4), "big"))
    torch.seed()
    seen: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITES or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            seen.append(f"{event} {arguments[0] if arguments else ''}")
            if kill_at is not None and len(seen) > kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    from posttrain.cli.main import app

    try:
        app(argv)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    made = list(seen)
    events.write_text("\n".join(made))
    return code


def import_all() -> None:
    """What a command imports, once for all forks."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    from posttrain.cli import build, main, training  # noqa: F401
    from posttrain.methods import METHODS as TRAINERS

    for trainer in TRAINERS.values():
        trainer.config_class(), trainer.trainer_class()
    torch.set_num_threads(1)


# Moments


def moments(method: str, count: int, whole: Ended, draw: random.Random) -> list[Moment]:
    """Half of them in time, half at file operations; with stages, half of these between a stage's last checkpoint and the next one's record."""
    borders = _borders(whole.events) if method == STAGES else []
    found = []
    for number in range(count):
        if number % 2 == 0 or not whole.events:
            found.append(Moment(seconds=draw.uniform(0, whole.seconds)))
        else:
            found.append(Moment(event=draw.choice(borders if borders and number % 4 == 1 else range(len(whole.events)))))
    return found


def _borders(events: list[str]) -> list[int]:
    """The numbers of the file operations from a stage's last checkpoint to the beginning of the next stage's training."""
    stores = [number for number, event in enumerate(events) if event.startswith("sqlite3.connect")]
    checkpoints = [number for number, event in enumerate(events) if "checkpoint-" in event]
    found = []
    for last, following in zip(checkpoints, [*checkpoints[1:], len(events)], strict=True):
        begins = [store for store in stores if last < store < following]
        if begins or following == len(events):
            found += range(last, begins[-1] + 1 if begins else following)
    return found


# Runs


def try_combination(method: str, kind: str, count: int, folder: Path, seed: int, start: str) -> Tally:
    """Run it uninterrupted twice, of which once in a fresh interpreter (unless all are forked); then `count` times killed and resumed."""
    run = run_fresh if start == "fresh" else run_forked
    if start != "fresh":
        import_all()
    draw = random.Random(f"{seed}/{method}/{kind}")
    place = folder / f"{method}-{kind}"
    place.mkdir(parents=True)
    tally = Tally(method, kind)
    expected = place / "whole"
    first = (run_forked if start == "forked" else run_fresh)(arguments(folder, method, kind, expected), place / "whole.log")
    again = run(arguments(folder, method, kind, place / "again"), place / "again.log")
    if first.status or again.status:
        tally.failures.append(
            f"an uninterrupted run ended with {first.status}, {again.status}: {_last_line(place / ('whole.log' if first.status else 'again.log'))}"
        )
        return tally
    tally.twice = difference(place / "again", expected) or ""
    for number, moment in enumerate(moments(method, count, again, draw)):
        output, log = place / f"killed-{number}", place / f"killed-{number}.log"
        if (problem := _killed_and_resumed(run, arguments(folder, method, kind, output), log, moment, again.seconds, draw, tally)) or (
            problem := difference(output, expected)
        ):
            tally.failures.append(f"{moment}: {problem}")
        else:
            tally.same += 1
    return tally


def _killed_and_resumed(run: Any, argv: list[str], log: Path, moment: Moment, seconds: float, draw: random.Random, tally: Tally) -> str | None:
    """Kill, perhaps twice, and go on to the end. Returns what went wrong."""
    ended = run(argv, log, moment)
    while ended.status == 0 and moment.seconds is not None:  # it was done before
        return None
    if ended.status != -signal.SIGKILL:
        return f"ended with {ended.status} before the moment: {_last_line(log)}"
    tally.kills += 1
    if draw.random() < AGAIN:
        tally.kills += run([*argv, "--resume"], log, Moment(seconds=draw.uniform(0, seconds))).status == -signal.SIGKILL
    resumed = run([*argv, "--resume"], log)
    return None if resumed.status == 0 else f"resuming ended with {resumed.status}: {_last_line(log)}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "without a word"


def table(tallies: list[Tally]) -> str:
    lines = [f"{'method':14} {'kind':6} {'same bits':>9} {'kills':>6}  {'twice':6} what differed"]
    for tally in tallies:
        runs = tally.same + len(tally.failures)
        lines.append(
            f"{tally.method:14} {tally.kind:6} {f'{tally.same}/{runs}':>9} {tally.kills:6}  {'differs' if tally.twice else 'same':6} {' | '.join([tally.twice, *tally.failures]).strip(' |')[:500]}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, STAGES], default=[*METHODS, STAGES])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--moments", type=int, default=10, help="killed runs of each method and kind; of recipes with stages four times as many")
    parser.add_argument("--jobs", type=int, default=1, help="how many methods at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--start", choices=["fresh", "mixed", "forked"], default="mixed", help="the processes; fresh ones are killed at points in time"
    )
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--output", type=Path, help="another file than results/kill_and_resume.json")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    combinations = [(method, kind) for method in args.methods for kind in args.kinds]
    started, tallies = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Workers are fresh interpreters: each imports for its own forks.
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            pool.submit(make_world, folder).result()
            begun = [
                pool.submit(try_combination, method, kind, args.moments * (4 if method == STAGES else 1), folder, args.seed, args.start)
                for method, kind in combinations
            ]
            for future in as_completed(begun):
                tallies.append(future.result())
                print(table(tallies[-1:]).splitlines()[1], flush=True)
            machine = pool.submit(hardware.describe, "transformers", "peft", "bitsandbytes").result()
    tallies.sort(key=lambda tally: combinations.index((tally.method, tally.kind)))
    print(f"\n{table(tallies)}")
    results = {
        "hardware": machine,
        "seconds": round(time.perf_counter() - started),
        "moments": args.moments,
        "seed": args.seed,
        "runs": [
            {"method": tally.method, "kind": tally.kind, "runs": tally.same + len(tally.failures), "same": tally.same, "kills": tally.kills,
             "twice_the_same": not tally.twice, "failures": tally.failures}
            for tally in tallies
        ],
    }  # fmt: skip
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    else:
        print("written to", hardware.save("kill_and_resume", results))
    sys.exit(any(tally.failures or tally.twice for tally in tallies))


if __name__ == "__main__":
    main()
