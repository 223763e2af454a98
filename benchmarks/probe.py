"""Does the probe predict the first steps of training? Tiny transformers on five tasks, and one task on which nothing is ever right.

Each task: a model is fine-tuned on its sloppy teacher (as the demo and benchmarks/environments.py do), probed with 32 prompts x 16 completions, and then
trained with GRPO. Compared are the probe's share of groups with signal and its interval, the share among 400 groups that were drawn with other random
numbers from the same model (what the interval is about), and the share in the first four steps of training, with the interval for so many groups.
On the task without a right answer `posttrain probe` runs as a user would run it. Prints a table and writes results/probe.json.

usage: probe.py [--only TASK] [--seeds 0 1]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import environments
import hardware

from posttrain import GRPOConfig, GRPOTrainer, Rubric, SFTConfig, SFTTrainer, demo
from posttrain.evaluate import answers
from posttrain.evaluation import wilson
from posttrain.models.load import stop_token_ids
from posttrain.probe import probe
from posttrain.types import Sampling, Task

STEPS = 4  # the policy has hardly moved
DRAWN = 400  # groups for the share itself


@dataclass(frozen=True)
class World:
    """A fine-tuned model and the task it is to be trained on."""

    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]
    rubric: Rubric
    config: GRPOConfig
    played: dict[str, Any] = field(default_factory=dict)  # the environment and its limits


def addition(sft_steps: int) -> Callable[[int, Path], World]:
    """The demo's sums, after so many steps of worked examples."""

    def build(seed: int, out: Path) -> World:
        tokenizer = demo.tiny_tokenizer()
        model, (rows, _) = demo.tiny_model(seed, tokenizer), demo.sums(seed)
        sft = replace(demo.sft_config(seed, out / "sft", quick=False), max_steps=sft_steps)
        SFTTrainer(model, sft, train_dataset=rows, processing_class=tokenizer).train()
        prompts = [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
        return World(model, tokenizer, prompts, Rubric("arithmetic"), demo.grpo_config(seed, out / "grpo", quick=False))

    return build


def played(name: str, sft_steps: int) -> Callable[[int, Path], World]:
    """An experiment of benchmarks/environments.py."""

    def build(seed: int, out: Path) -> World:
        experiment = environments.EXPERIMENTS[name](seed)
        tokenizer = environments.build_tokenizer(experiment.words)
        model = environments.build_model(tokenizer, seed)
        sft = SFTConfig(
            output_dir=str(out / "sft"), seed=seed, max_steps=sft_steps, per_device_train_batch_size=64, learning_rate=3e-3, assistant_only_loss=True,
            lr_scheduler_type="cosine", save_strategy="no", logging_steps=50, use_cpu=True,
        )  # fmt: skip
        SFTTrainer(model, sft, train_dataset=[{"messages": lesson} for lesson in experiment.lessons], processing_class=tokenizer).train()
        config = GRPOConfig(
            output_dir=str(out / "grpo"), seed=seed, per_device_train_batch_size=256, loss_type="dapo", max_completion_length=experiment.max_tokens,
            max_turns=experiment.max_turns, save_strategy="no", use_cpu=True, **experiment.grpo,
        )  # fmt: skip
        rubric = Rubric(experiment.right)
        return World(model, tokenizer, experiment.rows, rubric, config, {"environment": experiment.environment, "max_turns": experiment.max_turns})

    return build


TASKS: dict[str, Callable[[int, Path], World]] = {
    "addition, 60 steps of SFT": addition(60),
    "addition, 150 steps of SFT": addition(150),
    "addition, 400 steps of SFT": addition(demo.SFT_STEPS),
    "a calculator as a tool": played("tool use", 200),
    "guess the number": played("guess the number", 120),
}


def measure(name: str, seed: int, out: Path) -> dict[str, Any]:
    world = TASKS[name](seed, out)
    config = replace(world.config, max_steps=STEPS, logging_steps=1)
    tasks = [Task(number, row["prompt"], {key: row[key] for key in row if key != "prompt"}) for number, row in enumerate(world.rows)]
    sampling = config.sampling(stop_token_ids(world.model, world.tokenizer))
    size, count = config.num_generations, STEPS * config.prompts_per_generation
    started = time.perf_counter()
    found = probe(
        world.model, world.tokenizer, tasks, world.rubric, sampling, num_generations=size, groups_per_rollout=count, max_steps=config.max_steps, seed=seed,
        **world.played,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    truth = drawn_share(world, tasks, sampling, size, seed)
    trainer = GRPOTrainer(world.model, world.rubric, config, world.rows, processing_class=world.tokenizer, env=world.played.get("environment"))
    trainer.train()
    silent = [log["frac_reward_zero_std"] for log in trainer.state.log_history if "frac_reward_zero_std" in log]
    observed = 1 - sum(silent) / len(silent)
    predicted, forecast = found.signal[size], found.signal_per_rollout
    return {
        "task": name,
        "seed": seed,
        "group": size,
        "pass_at_1": asdict(found.pass_at[1]),
        "verdict": found.verdict,
        "predicted": asdict(predicted),
        "of_400_groups": truth,
        "interval_holds_it": predicted.low <= truth["high"] and truth["low"] <= predicted.high,
        "first_steps": observed,
        "first_steps_each": [1 - share for share in silent],
        "groups_in_first_steps": count,
        "interval_of_so_many": [forecast.low, forecast.high],
        "within": forecast.low <= observed <= forecast.high,
        "within_interval_of_the_share": predicted.low <= observed <= predicted.high,
        "probe_seconds": round(seconds, 2),
        "seconds_of_a_step_predicted": round(found.rollout_seconds / STEPS, 3),
    }


def drawn_share(world: World, tasks: list[Task], sampling: Sampling, size: int, seed: int) -> dict[str, float]:
    """The share of groups with signal, from many groups, random numbers of their own."""
    asked = random.Random(seed + 1000).choices(tasks, k=DRAWN)
    groups = answers(world.model, world.tokenizer, asked, world.rubric, sampling, num_generations=size, seed=seed + 1000, **world.played)
    found = wilson(sum(group.has_signal for group in groups), len(groups))
    return {"value": found.value, "low": found.low, "high": found.high}


HOPELESS = """
model: {{from_scratch: {{model_type: qwen3, hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 4,
        head_dim: 16, max_position_embeddings: 64}}, tokenizer: {{vocab_size: 300}}}}
data: {{train: {rows}, prompt: "{{prompt}}", answer: "{{answer}}"}}
rubric: [{rewards}:exact]
train: {{num_generations: 16, per_device_train_batch_size: 256, max_completion_length: 12, max_steps: 300, use_cpu: true}}
"""
EXACT = "from posttrain import verifier\n\n@verifier\ndef exact(completion, answer):\n    return completion.strip() == answer\n"


def hopeless(out: Path) -> dict[str, Any]:
    """A model that was never taught anything, asked for sums: the command's own words and exit code."""
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in demo.sums(0)[0]]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "rewards.py").write_text(EXACT)
    (out / "recipe.yaml").write_text(HOPELESS.format(rows=out / "rows.jsonl", rewards=out / "rewards.py"))
    done = subprocess.run([sys.executable, "-m", "posttrain.cli.main", "probe", str(out / "recipe.yaml")], capture_output=True, text=True)
    return {"task": "never taught", "exit_code": done.returncode, "verdict": done.stdout.splitlines()[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*TASKS, "never taught"], help="measure one task; the others stay in the results as they are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    path = hardware.RESULTS / "probe.json"
    known = json.loads(path.read_text()) if path.is_file() else {"runs": [], "never_taught": None}
    for name in [arguments.only] if arguments.only else [*TASKS, "never taught"]:
        with tempfile.TemporaryDirectory() as folder:
            if name == "never taught":
                known["never_taught"] = hopeless(Path(folder))
                print(known["never_taught"])
                continue
            runs = [measure(name, seed, Path(folder) / str(seed)) for seed in arguments.seeds]
        known["runs"] = [run for run in known["runs"] if run["task"] != name] + runs
        for run in runs:
            print(json.dumps(run), flush=True)
        hardware.save("probe", {"hardware": hardware.describe("transformers"), **{key: known[key] for key in ("runs", "never_taught")}})
    print(
        "written to", hardware.save("probe", {"hardware": hardware.describe("transformers"), **{key: known[key] for key in ("runs", "never_taught")}})
    )


if __name__ == "__main__":
    main()
