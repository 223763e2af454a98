"""Controls: does GRPO learn only what its reward says? On the demo's task, three seeds.

Each seed teaches a model the form of a sum (as the demo does), then trains it from there with a random reward, and with the right one upside down;
and a model that was never taught anything, with the right one. What the right reward does from there is demo.py's to show: same seeds, same settings.
Figures: held-out greedy accuracy before and after, in points, and the one-sided upper 95 % bound of the gain (`paired_difference`), for each seed and
for all questions of the seeds together. A random reward must not help (bound at most +3), an inverted one must hurt, and from 0 % GRPO stays at 0 %.

usage: controls.py [--seeds 3] [--steps 40]
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import hardware
from rich.console import Console
from rich.table import Table

from posttrain import GRPOConfig, GRPOTrainer, Rubric, demo, reward
from posttrain.evaluate import EvalResult, evaluate
from posttrain.evaluation import paired_difference
from posttrain.trainers.sft import SFTTrainer
from posttrain.types import Task


@reward
def at_random(completion: str) -> float:
    """Nothing to do with the answer, and the same for nobody twice."""
    return random.uniform(-4, 4)


@reward
def upside_down(completion: str, answer: str) -> float:
    return -3.0 if completion.rpartition("#")[2] == answer else 3.0


def exam(model: Any, tokenizer: Any, tasks: list[Task]) -> EvalResult:
    return evaluate(model, tokenizer, tasks, Rubric("arithmetic"), max_new_tokens=demo.MAX_NEW_TOKENS)


def run(seed: int, steps: int, directory: Path) -> list[dict[str, Any]]:
    tokenizer = demo.tiny_tokenizer()
    train_rows, eval_rows = demo.sums(seed)
    tasks = [Task(i, row["prompt"], {"answer": row["answer"]}) for i, row in enumerate(eval_rows)]
    prompts = [{"prompt": row["prompt"], "answer": row["answer"]} for row in train_rows]
    untaught = demo.tiny_model(seed, tokenizer)
    taught = copy.deepcopy(untaught)
    SFTTrainer(taught, demo.sft_config(seed, directory, quick=False), train_dataset=train_rows, processing_class=tokenizer).train()
    results = []
    for name, model, rubric in [
        ("random", taught, Rubric(at_random)),
        ("inverted", taught, Rubric(upside_down)),
        ("never right", untaught, Rubric("arithmetic")),
    ]:
        random.seed(seed)
        before = exam(model, tokenizer, tasks)
        trained = copy.deepcopy(model)
        config: GRPOConfig = replace(demo.grpo_config(seed, directory / name, quick=False), max_steps=steps)
        GRPOTrainer(trained, rubric, config, prompts, processing_class=tokenizer).train()
        after = exam(trained, tokenizer, tasks)
        results.append({"seed": seed, "reward": name} | compare(before.right, after.right))
    return results


def compare(before: list[bool], after: list[bool]) -> dict[str, Any]:
    found = paired_difference(before, after, confidence=0.9)  # its upper end: the one-sided 95 % bound
    shares = {"before": sum(before) / len(before), "after": sum(after) / len(after)}
    return shares | {"gain": 100 * found.value, "upper": 100 * found.high, "right": [before, after]}


def together(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All seeds of a reward as one exam."""
    pooled = []
    for name in dict.fromkeys(result["reward"] for result in results):
        before, after = ([answer for result in results if result["reward"] == name for answer in result["right"][side]] for side in (0, 1))
        pooled.append({"seed": "all", "reward": name} | compare(before, after))
    return pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    machine = hardware.describe("transformers")
    with tempfile.TemporaryDirectory() as directory:
        results = [result for seed in range(arguments.seeds) for result in run(seed, arguments.steps, Path(directory) / str(seed))]
    results += together(results)
    for result in results:
        del result["right"]
    table = Table("seed", "reward", "before", "after", "gain", "upper 95 %", title=hardware.line(machine))
    for result in results:
        row = [f"{100 * result['before']:.1f} %", f"{100 * result['after']:.1f} %", f"{result['gain']:+.1f}", f"{result['upper']:+.1f}"]
        table.add_row(str(result["seed"]), result["reward"], *row)
    Console().print(table)
    hardware.save("controls", {"hardware": machine, "steps": arguments.steps, "results": results})


if __name__ == "__main__":
    main()
