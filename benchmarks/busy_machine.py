"""Steps of the demo on a quiet machine and beside one spinning process for each core, by how OpenMP's threads wait for each other.

A thread that waits at the end of a parallel loop can spin or sleep. Spinning is a little faster where every thread has a core of its own, and
ruinous where it has not: the thread that everybody waits for may not be running. The command line therefore calls `posttrain.cli.threads.prepare`
before torch is loaded ("posttrain" here; "default" is what OpenMP does by itself). Each child process teaches the demo's model for some steps and
then trains it by GRPO; settings run in turn, round by round. Prints a table of medians and writes results/busy_machine.json.

usage: busy_machine.py [--rounds 3] [--steps 20] [--settings default posttrain]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "posttrain": {"POSTTRAIN_BENCH_PREPARE": "1"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def child(steps: int) -> None:
    """The median seconds of an SFT step and of a GRPO step, as JSON on the last line."""
    if "POSTTRAIN_BENCH_PREPARE" in os.environ:
        from posttrain.cli import threads

        threads.prepare()
    from transformers import TrainerCallback

    from posttrain import GRPOTrainer, Rubric, SFTTrainer, demo

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ended: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended.append(time.perf_counter())

    def step_of(trainer: Any) -> float:
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        return statistics.median(after - before for before, after in zip(clock.ended[2:], clock.ended[3:], strict=False))

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = demo.tiny_tokenizer()
        model = demo.tiny_model(0, tokenizer)
        rows, _ = demo.sums(0)
        prompts = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
        sft, grpo = demo.sft_config(0, Path(folder) / "sft", quick=True), demo.grpo_config(0, Path(folder) / "grpo", quick=True)
        sft.max_steps = grpo.max_steps = steps
        seconds = {"sft": step_of(SFTTrainer(model, sft, train_dataset=rows, processing_class=tokenizer))}
        seconds["grpo"] = step_of(GRPOTrainer(model, Rubric("arithmetic"), grpo, prompts, processing_class=tokenizer))
    print("\n" + json.dumps(seconds))


def _spin() -> None:
    while True:
        pass


@contextmanager
def spinning(processes: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    busy = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(processes)]
    for process in busy:
        process.start()
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.join()


def measure(setting: str, steps: int) -> dict[str, float]:
    environment = {**os.environ, **SETTINGS[setting]}
    command = [sys.executable, __file__, "--child", "--steps", str(steps)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(output.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default", "posttrain"])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.steps)
        return
    cores = os.cpu_count() or 1
    runs: dict[str, dict[str, list[dict[str, float]]]] = {name: {"quiet": [], "busy": []} for name in options.settings}
    for _ in range(options.rounds):
        for name in options.settings:
            runs[name]["quiet"].append(measure(name, options.steps))
            with spinning(cores):
                runs[name]["busy"].append(measure(name, options.steps))
            print(name, {state: taken[-1] for state, taken in runs[name].items()}, file=sys.stderr, flush=True)
    print(f"| waiting | step | quiet, s | beside {cores} spinning processes, s | ratio |\n|---|---|---|---|---|")
    for name, states in runs.items():
        for step in ("sft", "grpo"):
            quiet, busy = (statistics.median(one[step] for one in states[state]) for state in ("quiet", "busy"))
            print(f"| {name} | {step} | {quiet:.3f} | {busy:.3f} | {busy / quiet:.2f} |")
    import hardware  # here, since it loads torch

    hardware.save("busy_machine", {"hardware": hardware.describe("transformers"), "steps": options.steps, "runs": runs})


if __name__ == "__main__":
    main()
