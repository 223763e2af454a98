"""One DPO step, posttrain against TRL: the same model, pairs, settings and machine, each side in a process of its own environment.

The model and how memory is measured are told in beside_trl.py. The same names go to both constructors: prompts of 1,024 tokens, completions of 64 to
256 (drawn once, the same for both), loss sigmoid, the same batch and optimizer, no gradient checkpointing (`--gradient-checkpointing` turns it on
for both), with LoRA (rank 16 on all linear layers; the reference is the model without it) and full (a second model is the reference).
posttrain alone gets `--token-budget`, its own setting of memory. A step lasts from the end of one optimizer step to the end of the next: reference,
forward, backward, step and logging. The first step warms up. Prints a table and writes results/dpo_vs_trl.json.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import beside_trl
import hardware


@dataclass(frozen=True)
class Case:
    lora: bool
    prompt: int = 1024
    shortest: int = 64  # completions
    longest: int = 256
    pairs: int = 4  # of a step
    steps: int = 3  # after one that warms up
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    token_budget: int | None = None  # posttrain's max_tokens_per_micro_batch


CASES = (Case(lora=True), Case(lora=False))


def make_pairs(case: Case) -> list[dict[str, str]]:
    """Completions leave room for the end token, which both sides add."""
    draw = random.Random(0)

    def completion() -> str:
        return " " + beside_trl.some_words(draw, draw.randint(case.shortest, case.longest) - 1)

    count = case.pairs * (case.steps + 1)
    return [{"prompt": beside_trl.some_words(draw, case.prompt), "chosen": completion(), "rejected": completion()} for _ in range(count)]


def train(side: str, case: Case, assets: Path) -> dict[str, Any]:
    """Runs in the side's own process and environment. Nothing but the import and the token budget depends on the side."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    measurement = beside_trl.Measurement(side)
    trainer_class, config_class = measurement.library.DPOTrainer, measurement.library.DPOConfig
    measurement.imported()
    own = {"max_tokens_per_micro_batch": case.token_budget} if side == "posttrain" and case.token_budget else {}
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(assets, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(assets),
            train_dataset=Dataset.from_list(make_pairs(case)),
            callbacks=[measurement.clock],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if case.lora else None,
            args=config_class(
                output_dir=output,
                per_device_train_batch_size=case.pairs,
                max_steps=case.steps + 1,
                max_length=case.prompt + case.longest,
                bf16=case.precision == "bf16",
                gradient_checkpointing=case.gradient_checkpointing,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
                **own,
            ),
        )
        trainer.train()
    return measurement.result(case, trainer, losses=[log["loss"] for log in trainer.state.log_history if "loss" in log])


def table(runs: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("weights", "side", "computed in", "token budget", "s per step", "peak MiB", "step", "memory")
    for run in runs:
        case = Case(**run["case"])
        figures = [f"{run['step_s']:.2f}", f"{run['peak_bytes'] / 2**20:.0f}"]
        budget = str(case.token_budget or "default") if run["side"] == "posttrain" else ""
        ratios = beside_trl.factors(runs, run, ("step_s", "peak_bytes"))
        shown.add_row("LoRA" if case.lora else "all", run["side"], run["computed_in"], budget, *figures, *ratios)
    Console(width=140).print(shown)


def _title(case: Case) -> str:
    return f"{'LoRA' if case.lora else 'all'} weights, prompt {case.prompt}, completions {case.shortest} to {case.longest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside_trl.add_arguments(parser)
    parser.add_argument("--cases", nargs="*", type=int, default=list(range(len(CASES))), help="which of the cases: 0 is LoRA, 1 all weights")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step")
    parser.add_argument("--token-budget", type=int, help="posttrain's max_tokens_per_micro_batch; default: its own")
    args = parser.parse_args()
    if args.child:
        beside_trl.child(args.child, train, Case)
        return
    common = {"precision": args.precision, "gradient_checkpointing": args.gradient_checkpointing, "pairs": args.pairs, "steps": args.steps}
    cases = [replace(CASES[index], token_budget=args.token_budget, **common) for index in args.cases]
    if args.quick:
        cases = [replace(case, prompt=40, shortest=4, longest=16, pairs=2, steps=1) for case in cases]
    with tempfile.TemporaryDirectory() as directory:
        assets = Path(directory)
        beside_trl.make_assets_in_a_process(__file__, assets)
        wanted = [(side, case, _title(case)) for case in cases for side in args.sides]
        runs = beside_trl.measure_all(__file__, args, wanted, assets)
    machine = hardware.describe("transformers") | {"threads": args.threads}
    print(hardware.line(machine))
    table(runs)
    if not args.quick:
        name = "dpo_vs_trl" if args.precision == "bf16" else "dpo_vs_trl_float32"
        print("written to", hardware.save(name, {"hardware": machine, "runs": runs}))


if __name__ == "__main__":
    main()
