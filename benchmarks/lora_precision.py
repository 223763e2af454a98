"""Does LoRA learn as well beside frozen bfloat16 weights as beside the same weights in float32?

A small model learns sums (all its weights, float32), and is saved in bfloat16 as checkpoints are. From there adapters learn differences: by SFT, and
then by GRPO. Three ways to hold the checkpoint's weights: float32 and computed in it; float32 under bf16 autocast; bfloat16 under bf16 autocast.

    python benchmarks/lora_precision.py [--seeds 5]

Needs a processor or GPU with bf16 instructions: elsewhere bf16 autocast is replaced by float32, and the ways are one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from posttrain.data.tokenizer import train_bpe

SIZES = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a in range(30) for b in range(30)]
DIFFERENCES = [{"prompt": f"{a}-{b}=", "completion": str(a - b), "answer": str(a - b)} for a in range(30) for b in range(a + 1)]
TRAINED, HELD_OUT = [row for i, row in enumerate(DIFFERENCES) if i % 5], DIFFERENCES[::5]
WAYS = {"float32, no autocast": ("float32", False), "float32, bf16 autocast": ("float32", True), "bfloat16, bf16 autocast": ("bfloat16", True)}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    quiet: dict[str, Any] = {"output_dir": str(folder / "run"), "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    quiet |= {"lr_scheduler_type": "constant", "use_cpu": not torch.cuda.is_available(), "per_device_train_batch_size": 32}
    return quiet | changes


def make_checkpoint(folder: Path) -> str:
    torch.manual_seed(0)
    tokenizer = train_bpe((row["prompt"] + row["completion"] for row in SUMS + DIFFERENCES), 280)
    config = AutoConfig.for_model("qwen3", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    SFTTrainer(
        model, SFTConfig(**settings(folder, max_steps=300, learning_rate=2e-3, bf16=False)), train_dataset=SUMS, processing_class=tokenizer
    ).train()
    model.to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return str(folder / "checkpoint")


def is_right(completions: list[str], answer: list[str], **others: Any) -> list[float]:
    return [float(said.strip() == right) for said, right in zip(completions, answer, strict=True)]


def once(checkpoint: str, folder: Path, way: tuple[str, bool], seed: int) -> dict[str, float]:
    dtype, bf16 = way
    common = {"bf16": bf16, "model_init_kwargs": {"dtype": dtype}, "seed": seed}
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    sft = SFTConfig(**settings(folder, max_steps=150, learning_rate=2e-3, **common))
    trainer = SFTTrainer(checkpoint, sft, train_dataset=TRAINED, eval_dataset=HELD_OUT, peft_config=lora)
    assert next(p for p in trainer.model.parameters() if not p.requires_grad).dtype == getattr(torch, dtype)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "adapter"))
    grpo = GRPOConfig(**settings(folder, max_steps=30, learning_rate=5e-4, num_generations=8, max_completion_length=6, num_iterations=1, **common))
    online = GRPOTrainer(str(folder / "adapter"), is_right, grpo, train_dataset=TRAINED)
    online.train()
    logs = [log for log in online.state.log_history if "reward" in log]
    return {
        "SFT: held-out loss": loss,
        "GRPO: reward, first 5 steps": statistics.mean(log["reward"] for log in logs[:5]),
        "GRPO: reward, last 10 steps": statistics.mean(log["reward"] for log in logs[-10:]),
        "engine against trainer, mean |log-prob|": statistics.mean(log["sampling/logp_difference/mean"] for log in logs),
        "engine against trainer, largest": max(log["sampling/logp_difference/max"] for log in logs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as nowhere:
        folder = Path(nowhere)
        checkpoint = make_checkpoint(folder)
        found = {name: [once(checkpoint, folder, way, seed) for seed in range(seeds)] for name, way in WAYS.items()}
    for name, runs in found.items():
        print(name)
        for figure in runs[0]:
            values = [run[figure] for run in runs]
            print(f"  {figure:<42}{statistics.mean(values):10.4f} +- {statistics.stdev(values) if len(values) > 1 else 0:.4f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
