"""What kill_and_resume.py trains: a recipe for every method and kind of training, and what two runs must have in common."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any

COMMON = {
    "max_steps": 10,
    "save_steps": 3,
    "save_total_limit": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "seed": 5,
    "per_device_train_batch_size": 4,
}
ONLINE = COMMON | {"max_completion_length": 5, "per_device_train_batch_size": 8, "save_steps": 2}
# A rollout of the online trainers feeds several updates, so that kills fall between these.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # command -> its section of the recipe, and the settings in it
    "sft": ("sft", COMMON | {"packing": True, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5, "max_length": 64}),
    "dpo": ("dpo", COMMON | {"gradient_accumulation_steps": 2, "precompute_ref_log_probs": True}),
    "kto": ("kto", COMMON),
    "orpo": ("orpo", COMMON),
    "cpo": ("cpo", COMMON),
    "reward-model": ("reward", COMMON | {"center_rewards_coefficient": 0.01}),
    "ppo": ("ppo", ONLINE | {"num_mini_batches": 2, "num_ppo_epochs": 2}),
    "rloo": ("rloo", ONLINE | {"num_generations": 4, "steps_per_generation": 2, "num_iterations": 2, "beta": 0.05}),
    "grpo": ("train", ONLINE | {"num_generations": 4, "steps_per_generation": 2, "num_iterations": 2, "beta": 0.05}),
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
    "qlora": {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "load_in_4bit": True},
}
SCRATCH = {
    "from_scratch": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    "tokenizer": {"vocab_size": 290},
}
STAGES = "stages"  # as a method: several trainings, each on what an earlier one left
REWARDS = """
import random

def ones(completions, **kwargs):
    return [text.count("1") / 4 + len(text) / 100 + random.random() / 50 for text in completions]  # the global generator is resumed too
"""
TIMING = ("time/", "memory/", "step_time", "tokens_per_second", "train_", "total_flos", "epoch", "eval_runtime", "eval_samples_per", "eval_steps_per")
TABLES = {  # what of the record says what was computed
    "steps": "SELECT step FROM steps ORDER BY 1",
    "scalars": "SELECT step, name, value FROM scalars ORDER BY 1, 2",
    "groups": "SELECT * FROM groups ORDER BY 1, 2",
    "rollouts": "SELECT step, grp, idx, reward, advantage, stop, policy_version, length, text FROM rollouts ORDER BY 1, 2, 3",
    "tokens": "SELECT * FROM rollout_tokens ORDER BY 1, 2, 3",
    "details": "SELECT * FROM token_details ORDER BY 1, 2, 3, 4",
}


def make_world(folder: Path) -> None:
    """A tiny model with its tokenizer, rows, a reward and one recipe for every method and kind."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from posttrain.data.tokenizer import train_bpe

    rows = [
        {"prompt": f"{a}+{b}=", "completion": f"{a + b}", "chosen": f"{a + b}", "rejected": f"{a}{b}", "label": (a + b) % 2 == 0}
        for a in range(6)
        for b in range(4)
    ]
    tokenizer = train_bpe((row["prompt"] + row["completion"] for row in rows), 290)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    wanted = {"completions": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected"), "labels": ("prompt", "completion", "label")}
    for name, columns in wanted.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({column: row[column] for column in columns}) for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    for kind, model in KINDS.items():
        for method in METHODS:
            _write(folder, method, kind, {"model": {"name": str(folder / "base"), **model}, **_sections(method)})
        _write(folder, STAGES, kind, _stages(folder, model))


def _sections(method: str) -> dict[str, Any]:
    section, settings = METHODS[method]
    data = {"sft": "completions", "kto": "labels"}.get(method, "pairs")
    sections = {"data": {"train": f"{data}.jsonl"}, "eval": {"data": f"{data}.jsonl", "every": 4, "samples": 4}, section: settings}
    return sections | ({"rubric": ["rewards.py:ones"]} if method in ("ppo", "rloo", "grpo") else {})


def _stages(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    """SFT, then a reward model and DPO on it, then GRPO on what DPO left, with that reward model. Without adapters the first model is from scratch."""
    listed: list[dict[str, Any]] = []
    for method in ("sft", "reward-model", "dpo", "grpo"):
        sections = _sections(method)
        section = METHODS[method][0]
        sections[section] = sections[section] | {"max_steps": 5, "save_steps": 2}
        if method == "grpo":
            sections["rubric"] = ["rewards.py:ones", "stage:reward-model"]
        listed.append({method: sections})
    return {"model": {"name": str(folder / "base"), **model} if model else SCRATCH, "data": {"train": "completions.jsonl"}, "stages": listed}


def _write(folder: Path, method: str, kind: str, recipe: dict[str, Any]) -> None:
    (folder / f"{method}-{kind}.yaml").write_text(json.dumps(recipe, indent=1))  # JSON is YAML


def arguments(folder: Path, method: str, kind: str, output: Path) -> list[str]:
    """What follows `posttrain`."""
    if method == STAGES:
        return ["run", str(folder / f"{STAGES}-{kind}.yaml"), "--output", str(output)]
    return [method, str(folder / f"{method}-{kind}.yaml"), f"--{METHODS[method][0]}.output_dir={output}"]


# What two runs must have in common


def difference(found: Path, expected: Path) -> str | None:
    """In a few words, what of the output directory `found` is not as in `expected`; None: the weights have the same bits, and the records the same rows."""
    for path in sorted(expected.rglob("*.safetensors")):
        name = path.relative_to(expected)
        if path.parent.name in ("model", "merged") and _bits(path) != _bits(found / name):
            return f"other weights: {name}"
    for path in sorted(expected.rglob("run.sqlite")):
        name = path.relative_to(expected)
        ours, theirs = _record(found / name), _record(path)
        for table, rows in theirs.items():
            if ours[table] != rows:
                pairs = zip_longest(ours[table], rows)
                return f"another record: {table} of {name}, {next(pair for pair in pairs if pair[0] != pair[1])}"[:400]
        if [step for (step,) in theirs["steps"]] != list(range(1, len(theirs["steps"]) + 1)):
            return f"the uninterrupted record has gaps: {name}"
    return None


def _bits(path: Path) -> dict[str, tuple[Any, ...]] | None:
    """Every tensor's dtype, shape and bytes; None: there is no such file."""
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    return {name: (value.dtype, value.shape, value.contiguous().view(torch.uint8).numpy().tobytes()) for name, value in load_file(path).items()}


def _record(path: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(path)) as store:
        rows = {table: store.execute(query).fetchall() for table, query in TABLES.items()}
    return rows | {"scalars": [row for row in rows["scalars"] if not row[1].startswith(TIMING)]}
