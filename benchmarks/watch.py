"""The live page on a long run, and what writing the record costs.

A store of 10,000 steps x 64 completions (8 prompts x 8) with 40 scalars is made; `posttrain watch` is started on it, and a real Chromium opens the page.
Measured: seconds until the server answers, seconds from navigation until every chart of the overview that is in view (1280 x 720) is drawn, seconds until a group in the
middle is shown, memory of the server (RSS) after all of it, and a search that finds nothing. Then 40 steps of the demo's GRPO are trained and the
seconds that the recorder took are set against the whole: the demo's model is tiny, so its steps are short and the share is the worst there is.

usage: watch.py [--steps 10000] [--store DIRECTORY]     results: benchmarks/results/watch.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hardware
import psutil

from posttrain.tracking.blobs import pack_floats, pack_halves, pack_ids
from posttrain.tracking.browse import Browser, Wanted
from posttrain.tracking.events import RunStore

PROMPTS, GENERATIONS, TOKENS = 8, 8, 100
DETAILED = 4  # groups a step with per-token details
KEEPS_TOKENS = 10  # every so many steps: with all of them the file would be at its cap after a twentieth of the run
NAMES = [
    "reward",
    "reward_std",
    "rewards/right/mean",
    "rewards/form/mean",
    "rewards/length/mean",
    "solved",
    "unscored",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/mean_terminated_length",
    "completions/clipped_ratio",
    "completions/repeated",
    "entropy",
    "kl",
    "ratio",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "grad_norm",
    "learning_rate",
    "loss",
    "num_tokens",
    "step_time",
    "tokens_per_second",
    "time/collect",
    "time/reward",
    "time/update",
    "memory/process_gib",
    "memory/gpu_peak_gib",
    "sampling/logp_difference/mean",
    "sampling/logp_difference/max",
    "env/turns",
    "env/moves",
    "tools/call_frequency",
    "tools/failure_frequency",
    "my/first",
    "my/second",
    "epoch",
]


def make_store(directory: Path, steps: int) -> None:
    """Rows in bulk, as the recorder would have written them one step at a time."""
    rng = random.Random(0)
    words = ["the", "sum", "of", "both", "is", "therefore", "carry", "one", "so", "we", "get", "47", "85", "and", "check"]
    texts = [" ".join(rng.choices(words, k=TOKENS)) for _ in range(500)]
    ids = [pack_ids([rng.randrange(2000) for _ in range(TOKENS)]) for _ in range(50)]
    floats, halves = pack_floats([-0.3] * TOKENS), pack_halves([1.01] * TOKENS, offset=1.0)
    store = RunStore(directory / "run.sqlite")
    store.write_meta(
        {"config": {"max_steps": steps, "epsilon": 0.2, "scale_rewards": "group"}, "method": "GRPO", "max_steps": steps, "started_at": 1.0}
    )
    for first in range(1, steps + 1, 500):
        with store._transaction() as db:
            for step in range(first, min(first + 500, steps + 1)):
                db.execute("INSERT INTO steps VALUES (?, ?, ?, 0)", (step, time.time(), 2.0 * step))
                db.executemany("INSERT INTO scalars VALUES (?, ?, ?, NULL)", [(name, step, rng.gauss(step / steps, 0.1)) for name in NAMES])
                places = [(group, index, float(rng.random() < 0.5)) for group in range(PROMPTS) for index in range(GENERATIONS)]
                db.executemany(
                    "INSERT INTO groups VALUES (?, ?, 0, ?, 8, 0.5, 0.5)", [(step, group, f"What is {step} + {group}?") for group in range(PROMPTS)]
                )
                rows = [
                    (
                        step,
                        group,
                        index,
                        reward,
                        2 * reward - 1,
                        rng.choice(["stop"] * 9 + ["length"]),
                        step,
                        TOKENS,
                        json.dumps({"right": reward}),
                        rng.choice(texts),
                    )
                    for group, index, reward in places
                ]
                db.executemany("INSERT INTO rollouts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
                if step % KEEPS_TOKENS == 0:
                    db.executemany("INSERT INTO rollout_tokens VALUES (?, ?, ?, ?, ?)", [(step, g, i, rng.choice(ids), floats) for g, i, _ in places])
                    detailed = [(step, g, i, step, floats, halves, halves, halves, None) for g, i, _ in places if g < DETAILED]
                    db.executemany("INSERT INTO token_details VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", detailed)
    with store._transaction() as db:
        db.executemany("INSERT INTO vocabulary VALUES (?, ?)", [(token, f" w{token}") for token in range(2000)])
    store.close()


@contextlib.contextmanager
def served(directory: Path) -> Iterator[tuple[str, psutil.Process, float]]:
    """(address, process, seconds from its start to its first answer)."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "posttrain.cli.main", "watch", "--port", "0", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found
        while True:
            try:
                urllib.request.urlopen(found[0]).close()
                break
            except OSError:
                time.sleep(0.02)
        yield found[0], psutil.Process(process.pid), time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()


def open_page(url: str, step: int) -> dict[str, float]:
    """Seconds until everything is drawn: the overview, and a group in the middle. The best of three, each in a new tab."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from browsing import FLAGS
    from playwright.sync_api import sync_playwright

    seconds: dict[str, float] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for _ in range(3):
            for name, query, ready in (
                (
                    "overview",
                    "",
                    "(all => all.length > 20 && all.every(one => one.querySelector('canvas') || one.getBoundingClientRect().top > innerHeight))"
                    "([...document.querySelectorAll('.pt-chart-place')])",
                ),
                ("group", f"?step={step}", "document.querySelectorAll('.pt-completion .pt-tokens span').length > 500"),
            ):
                page = browser.new_page()
                start = time.perf_counter()
                page.goto(url + query)
                page.wait_for_function(ready, polling=20)
                seconds[name] = min(seconds.get(name, 1e9), time.perf_counter() - start)
                page.close()
        browser.close()
    return seconds


def search_for_nothing(directory: Path) -> dict[str, float]:
    reader = Browser(directory)
    start = time.perf_counter()
    found = reader.search(Wanted(words="nowhere to be found"), 0, 1, budget=60.0)
    return {"seconds": time.perf_counter() - start, "steps": found.read_to}


def recording_share(steps: int) -> dict[str, float]:
    """Of the seconds that a training takes: those inside the recorder. The demo's model and settings, one log a step."""
    from posttrain import Rubric, demo
    from posttrain.trainers.grpo import GRPOTrainer

    taken = {"seconds": 0.0}

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                taken["seconds"] += time.perf_counter() - start

        return wrapper

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = demo.tiny_tokenizer()
        rows, _ = demo.sums(0)
        config = demo.grpo_config(0, Path(folder), quick=True)
        config.max_steps, config.logging_steps = steps, 1
        trainer = GRPOTrainer(demo.tiny_model(0, tokenizer), Rubric("arithmetic"), config, rows, processing_class=tokenizer)
        for owner, names in ((trainer.recorder, ("on_step_end", "on_log")), (trainer.record, ("groups", "tokens"))):
            for name in names:
                setattr(owner, name, timed(getattr(owner, name)))
        start = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - start
    return {"steps": steps, "seconds": whole, "seconds_recording": taken["seconds"], "share": taken["seconds"] / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--store", type=Path, help="keep the store here, or use the one that is here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = args.store or Path(folder)
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "run.sqlite").exists():
            make_store(directory, args.steps)
        with served(directory) as (url, process, seconds):
            page = open_page(url, args.steps // 2 // KEEPS_TOKENS * KEEPS_TOKENS)
            results = {
                "store": {
                    "steps": args.steps,
                    "completions": args.steps * PROMPTS * GENERATIONS,
                    "scalars": len(NAMES),
                    "bytes": (directory / "run.sqlite").stat().st_size,
                },
                "seconds_until_the_server_answers": seconds,
                "seconds_to_open": page,
                "server_rss_mib": process.memory_info().rss / 2**20,
                "search_for_nothing": search_for_nothing(directory),
                "recording": recording_share(40),
                "hardware": hardware.describe("nicegui", "playwright"),
            }
    print(json.dumps(results, indent=2))
    print(hardware.save("watch", results))


if __name__ == "__main__":
    main()
