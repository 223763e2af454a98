"""One GRPO step, posttrain against TRL: the same model, data, settings and machine, each side in a process of its own environment.

`make bench` builds TRL's environment and runs this. What is measured, and how it is kept fair:

- The model, the two environments and the measure of memory are told in beside_trl.py.
- The same names go to both constructors: G = 16, one prompt a step, loss dapo, beta 0, the same optimizer, no gradient checkpointing
  (`--gradient-checkpointing` turns it on for both).
- Every completion has the full length. TRL always stops at some end token, so its own setting `min_new_tokens` forbids that token
  until the end (one masked logit a step); ours is told that there are no stop tokens. The reward checks every length.
- A step lasts from the end of one optimizer step to the end of the next: generation, reward, update and logging. The first step warms up.
- Generation is TRL's call of `model.generate`, and ours the whole of `collect` (metric time/collect), which also scores and records.

Afterwards posttrain alone runs G = 4, 8 and 16 with a token budget of one quarter of the group, to show what memory grows with.
Prints a table and writes results/grpo_vs_trl.json, where cases that were left out keep what was measured of them on this kind of machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import beside_trl
import hardware


@dataclass(frozen=True)
class Case:
    prompt: int
    completion: int
    generations: int = 16
    steps: int = 3  # after one that warms up
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    token_budget: int | None = None  # posttrain's max_tokens_per_micro_batch


CASES = (Case(250, 256), Case(1000, 128))
MEMORY_CASES = tuple(Case(250, 256, generations=g, steps=1, token_budget=250 + 4 * 256) for g in (4, 8, 16))


def make_prompts(case: Case) -> list[dict[str, str]]:
    draw = random.Random(0)
    return [{"prompt": beside_trl.some_words(draw, case.prompt)} for _ in range(case.steps + 1)]


def train(side: str, case: Case, assets: Path) -> dict[str, Any]:
    """Runs in the side's own process and environment. Nothing but the import and the two marked settings depends on the side."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    measurement = beside_trl.Measurement(side)
    trainer_class, config_class = measurement.library.GRPOTrainer, measurement.library.GRPOConfig
    measurement.imported()
    generation: list[float] = []  # seconds of each
    lengths: set[int] = set()

    def even_words(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.update(map(len, completion_ids))
        return [sum(word[-1] in "02468" for word in text.split()) / case.completion for text in completions]

    class GenerationClock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            if side == "posttrain" and logs and "time/collect" in logs:
                generation.append(float(logs["time/collect"]))

    own: dict[str, Any] = {
        "posttrain": {"generation_kwargs": {"stop_token_ids": ()}} | ({"max_tokens_per_micro_batch": case.token_budget} if case.token_budget else {}),
        "trl": {"generation_kwargs": {"min_new_tokens": case.completion}},
    }[side]
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(assets, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(assets),
            reward_funcs=even_words,
            train_dataset=Dataset.from_list(make_prompts(case)),
            callbacks=[measurement.clock, GenerationClock()],
            args=config_class(
                output_dir=output,
                per_device_train_batch_size=case.generations,
                num_generations=case.generations,
                max_completion_length=case.completion,
                max_steps=case.steps + 1,
                bf16=case.precision == "bf16",
                gradient_checkpointing=case.gradient_checkpointing,
                use_cpu=True,
                loss_type="dapo",
                beta=0.0,
                shuffle_dataset=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
                **own,
            ),
        )
        if side == "trl":
            generate = trainer.model.generate

            def timed(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                out = generate(*args, **kwargs)
                generation.append(time.perf_counter() - start)
                return out

            trainer.model.generate = timed
        trainer.train()
    if lengths != {case.completion}:
        raise SystemExit(f"{side}: completions have lengths {sorted(lengths)}, not {case.completion}: the two sides would not do the same work")
    return measurement.result(case, trainer, generation_s=statistics.median(generation[1:]))


def kv_bytes(case: Case) -> int:
    """Keys and values of one shared prompt and G completions, in float32."""
    sizes = beside_trl.MODEL
    per_token = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * 4
    return per_token * (case.prompt + case.generations * case.completion)


def wanted(sides: Sequence[str], cases: Sequence[Case]) -> list[tuple[str, Case, str]]:
    return [(side, case, f"prompt {case.prompt}, completion {case.completion}, G {case.generations}") for case in cases for side in sides]


def tables(runs: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    table = Table("prompt / completion", "side", "computed in", "s per step", "s generation", "peak MiB", "step", "generation", "memory")
    for run in runs:
        factors = beside_trl.factors(runs, run, ("step_s", "generation_s", "peak_bytes"))
        lengths = f"{run['case']['prompt']} / {run['case']['completion']}"
        seconds = [f"{run[key]:.2f}" for key in ("step_s", "generation_s")]
        table.add_row(lengths, run["side"], run["computed_in"], *seconds, f"{run['peak_bytes'] / 2**20:.0f}", *factors)
    console.print(table)
    if memory:
        table = Table("posttrain, G", "token budget", "peak MiB", "of that KV cache MiB", title="What memory grows with")
        for run in memory:
            case = Case(**run["case"])
            table.add_row(str(case.generations), str(case.token_budget), f"{run['peak_bytes'] / 2**20:.0f}", f"{kv_bytes(case) / 2**20:.0f}")
        console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside_trl.add_arguments(parser)
    parser.add_argument("--cases", nargs="*", type=int, default=list(range(len(CASES))), help="which of the cases: 0 is 250/256, 1 is 1000/128")
    parser.add_argument("--no-memory-sweep", action="store_true", help="leave out the runs with several G")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        beside_trl.child(args.child, train, Case)
        return
    chosen = [CASES[index] for index in args.cases]
    cases = [replace(case, steps=args.steps, precision=args.precision, gradient_checkpointing=args.gradient_checkpointing) for case in chosen]
    memory_cases = [replace(case, precision=args.precision, gradient_checkpointing=args.gradient_checkpointing) for case in MEMORY_CASES]
    if args.no_memory_sweep:
        memory_cases = []
    if args.quick:
        cases, memory_cases = [replace(cases[0], prompt=20, completion=8, generations=4, steps=1)], []
    with tempfile.TemporaryDirectory() as directory:
        assets = Path(directory)
        beside_trl.make_assets_in_a_process(__file__, assets)
        runs = beside_trl.measure_all(__file__, args, wanted(args.sides, cases), assets)
        memory = beside_trl.measure_all(__file__, args, wanted(sorted({"posttrain"} & set(args.sides)), memory_cases), assets)
    machine = hardware.describe("transformers") | {"threads": args.threads}
    print(hardware.line(machine))
    tables(runs, memory)
    if not args.quick:
        name = "grpo_vs_trl" if args.precision == "bf16" else "grpo_vs_trl_float32"
        memory = [run | {"kv_bytes": kv_bytes(Case(**run["case"]))} for run in memory]
        earlier = hardware.read(name, machine)
        measured = {(case.prompt, case.completion) for case in cases}
        runs += [run for run in earlier.get("runs", ()) if (run["case"]["prompt"], run["case"]["completion"]) not in measured]
        runs.sort(key=lambda run: run["case"]["prompt"])
        memory = memory or earlier.get("memory", [])
        print("written to", hardware.save(name, {"hardware": machine, "runs": runs, "memory": memory}))


if __name__ == "__main__":
    main()
