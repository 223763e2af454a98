"""PPO, RLOO and GRPO on the demo's task, from the same taught model, with the same number of completions: held-out accuracy, memory and time.

For each seed a model is taught once (as the demo does). Then every algorithm trains a copy of it, in a process of its own, so that its peak of
memory is its own. None is held near a reference, since GRPO's default is not. Prints a table and writes results/online_compare.json.

usage: online_compare.py [--seeds 0 1 2] [--steps 150] [--only ppo] [--output runs/online-compare]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import hardware
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from posttrain import GRPOTrainer, Rubric, demo
from posttrain.evaluate import EvalResult, evaluate
from posttrain.evaluation import wilson
from posttrain.trainers.online.trainer import OnlineTrainer
from posttrain.trainers.ppo import PPOConfig, PPOTrainer
from posttrain.trainers.rloo import RLOOConfig, RLOOTrainer
from posttrain.trainers.sft import SFTTrainer
from posttrain.types import Task

COMPLETIONS = demo.PROMPTS * demo.GENERATIONS  # of one rollout, for all three


def trainer_of(algorithm: str, model: Any, tokenizer: Any, prompts: list[dict[str, str]], seed: int, steps: int, out: Path) -> OnlineTrainer:
    grpo = replace(demo.grpo_config(seed, out, quick=False), max_steps=steps, output_dir=str(out))
    shared: dict[str, Any] = {
        "output_dir": str(out),
        "seed": seed,
        "max_completion_length": demo.MAX_NEW_TOKENS,
        "learning_rate": grpo.learning_rate,
        "logging_steps": 5,
        "save_strategy": "no",
        "use_cpu": True,
    }
    if algorithm == "grpo":
        return GRPOTrainer(model, Rubric("arithmetic"), grpo, prompts, processing_class=tokenizer)
    if algorithm == "rloo":
        rloo = RLOOConfig(per_device_train_batch_size=COMPLETIONS, num_generations=demo.GENERATIONS, beta=0.0, max_steps=steps, **shared)
        return RLOOTrainer(model, Rubric("arithmetic"), rloo, prompts, processing_class=tokenizer)
    ppo = PPOConfig(
        per_device_train_batch_size=COMPLETIONS,
        num_ppo_epochs=1,
        kl_coef=0.0,
        temperature=1.0,
        max_steps=steps,
        **shared,
    )
    return PPOTrainer(model, Rubric("arithmetic"), ppo, prompts, processing_class=tokenizer)


ALGORITHMS = ("grpo", "rloo", "ppo")


def data_of(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]], list[Task]]:
    """(training rows, their prompts, the exam)."""
    train_rows, eval_rows = demo.sums(seed)
    prompts = [{"prompt": row["prompt"], "answer": row["answer"]} for row in train_rows]
    return train_rows, prompts, [Task(i, row["prompt"], {"answer": row["answer"]}) for i, row in enumerate(eval_rows)]


def exam(model: Any, tokenizer: Any, tasks: list[Task]) -> EvalResult:
    return evaluate(model, tokenizer, tasks, Rubric("arithmetic"), max_new_tokens=demo.MAX_NEW_TOKENS)


def teach(seed: int, out: Path) -> None:
    tokenizer = demo.tiny_tokenizer()
    model = demo.tiny_model(seed, tokenizer)
    SFTTrainer(model, demo.sft_config(seed, out / "sft", quick=False), train_dataset=data_of(seed)[0], processing_class=tokenizer).train()
    model.save_pretrained(str(out / "taught"))


def run(algorithm: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """In a process of its own: train, examine, say what it took."""
    tokenizer = demo.tiny_tokenizer()
    _, prompts, tasks = data_of(seed)
    model = AutoModelForCausalLM.from_pretrained(str(out / "taught"))
    before = exam(model, tokenizer, tasks)
    imports = hardware.resident_bytes()
    shutil.rmtree(out / algorithm, ignore_errors=True)  # of an earlier comparison
    trainer = trainer_of(algorithm, model, tokenizer, prompts, seed, steps, out / algorithm)
    started, computed = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, computed, peak = time.perf_counter() - started, time.process_time() - computed, hardware.peak_resident_bytes()
    after = exam(model, tokenizer, tasks)
    curve = [[log["step"], log["reward"]] for log in trainer.state.log_history if "reward" in log]
    return {
        "algorithm": algorithm,
        "seed": seed,
        "before": sum(before.right) / len(before.right),
        "right": sum(after.right),
        "questions": len(after.right),
        "seconds": seconds,
        "processor_seconds": computed,  # of all its threads: what neighbours on the machine do not change much
        "peak_mb_above_start": (peak - imports) / 1e6,
        "reward": curve,
    }


def table_of(results: list[dict[str, Any]]) -> Table:
    table = Table("algorithm", "seeds", "before", "after", "95 % interval", "seconds", "of the processor", "peak MB above the taught model")
    for algorithm in ALGORITHMS:
        runs = [result for result in results if result["algorithm"] == algorithm]
        if runs:
            right, n = sum(r["right"] for r in runs), sum(r["questions"] for r in runs)
            interval = wilson(right, n)
            mean = {name: sum(r[name] for r in runs) / len(runs) for name in ("before", "seconds", "processor_seconds", "peak_mb_above_start")}
            accuracy = (f"{mean['before']:.1%}", f"{right / n:.1%}", f"{interval.low:.1%} to {interval.high:.1%}")
            table.add_row(
                algorithm,
                str(len(runs)),
                *accuracy,
                f"{mean['seconds']:.0f}",
                f"{mean['processor_seconds']:.0f}",
                f"{mean['peak_mb_above_start']:.0f}",
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=demo.GRPO_STEPS)
    parser.add_argument("--only", choices=ALGORITHMS, nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--output", type=Path, default=Path("runs/online-compare"))
    parser.add_argument("--one", choices=ALGORITHMS, help=argparse.SUPPRESS)  # this is such a process
    args = parser.parse_args()
    if args.one:
        result = run(args.one, args.seeds[0], args.steps, args.output)
        (args.output / f"{args.one}.json").write_text(json.dumps(result))
        return
    results = []
    for seed in args.seeds:
        out = args.output / f"seed-{seed}"
        if not (out / "taught" / "config.json").exists():
            teach(seed, out)
        for algorithm in args.only:
            command = [sys.executable, __file__, "--one", algorithm, "--seeds", str(seed), "--steps", str(args.steps), "--output", str(out)]
            subprocess.run(command, check=True)
            results.append(json.loads((out / f"{algorithm}.json").read_text()))
    machine = hardware.describe("transformers")
    console = Console()
    console.print(hardware.line(machine))
    console.print(table_of(results))
    if set(args.only) == set(ALGORITHMS):
        console.print(f"written to {hardware.save('online_compare', {'hardware': machine, 'steps': args.steps, 'runs': results})}")


if __name__ == "__main__":
    main()
