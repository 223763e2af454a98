"""Supervised fine-tuning on ragged text, posttrain against TRL: tokens per second, each side in a process of its own environment.

The model and how memory is measured are told in beside_trl.py; its tokenizer is a BPE trained on the text (at most 32,000 tokens). The text is
`--data`, a JSONL file whose columns of text are joined, or by default generated words in rows of log-normal length (median 150, cut at 1,000),
so that anybody can run it. The same names go to both constructors: 16 rows a step, max_length 1024, the same optimizer, the rows in the order of
the file. Each side runs with its settings: plain; `padding_free`, TRL's rows without padding (which it cannot cut, so without max_length); `packing`, best-fit bins of 1,024 tokens, two a step
(posttrain has no padding in any of them). Tokens are those of the text, never padding. A step lasts from the end of one optimizer step to the end
of the next, and the first warms up. Prints a table and writes results/sft_vs_trl.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import beside_trl
import hardware

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "posttrain": {"plain": {}, "packing": {"packing": True}},
    "trl": {
        "plain": {},
        "padding_free": {"padding_free": True, "max_length": None},
        "packing": {"packing": True, "packing_strategy": "bfd", "padding_free": True},
    },
}
MAX_LENGTH = 1024


@dataclass(frozen=True)
class Case:
    variant: str
    rows: int = 16  # of a step
    bins: int = 2  # of a step, with packing
    steps: int = 6  # after one that warms up
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    token_budget: int | None = None  # posttrain's max_tokens_per_micro_batch


def write_text(data: str | None, path: Path, rows: int) -> None:
    """JSONL with a column `text`."""
    if data is not None:
        given = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()[:rows] if line.strip()]
        texts = ["\n".join(value for value in row.values() if isinstance(value, str)) for row in given]
    else:
        draw = random.Random(0)
        words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(2, 9))) for _ in range(4000)]
        texts = [" ".join(draw.choices(words, k=min(int(draw.lognormvariate(5.0, 0.6)), 600))) for _ in range(rows)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")


def write_tokenizer(assets: Path) -> None:
    """In place of the words of beside_trl: the same model, whose embedding has rows for all of it."""
    from posttrain.data.tokenizer import train_bpe

    texts = [json.loads(line)["text"] for line in (assets / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    train_bpe(texts, beside_trl.VOCABULARY).save_pretrained(assets)


def train(side: str, case: Case, assets: Path) -> dict[str, Any]:
    """Runs in the side's own process and environment. Nothing but the import and the variant's settings depends on the side."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    measurement = beside_trl.Measurement(side)
    trainer_class, config_class = measurement.library.SFTTrainer, measurement.library.SFTConfig
    measurement.imported()
    own: dict[str, Any] = {"max_length": MAX_LENGTH} | VARIANTS[side][case.variant]
    own |= {"shuffle_dataset": False} if side == "posttrain" else {"train_sampling_strategy": "sequential"}
    if side == "posttrain" and case.token_budget:
        own["max_tokens_per_micro_batch"] = case.token_budget
    rows = [json.loads(line) for line in (assets / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as output:
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(assets, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(assets),
            train_dataset=Dataset.from_list(rows),
            callbacks=[measurement.clock],
            args=config_class(
                output_dir=output,
                per_device_train_batch_size=case.bins if case.variant == "packing" else case.rows,
                max_steps=case.steps + 1,
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
    logs = [log for log in trainer.state.log_history if "num_tokens" in log]
    measured = sum(log["num_tokens"] for log in logs[1:]) if side == "posttrain" else logs[-1]["num_tokens"] - logs[0]["num_tokens"]  # TRL sums up
    result = measurement.result(case, trainer, tokens=measured, losses=[log["loss"] for log in logs])
    return result | {"tokens_per_second": measured / sum(result["steps_s"])}


def table(runs: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    trl = [run for run in runs if run["side"] == "trl"]
    plain = next((run["tokens_per_second"] for run in trl if run["case"]["variant"] == "plain"), None)
    best = max((run["tokens_per_second"] for run in trl), default=None)
    shown = Table("side", "variant", "computed in", "tokens/s", "peak MiB", "loss of step 2", "x TRL plain", "x TRL's best")
    for run in runs:
        ratios = [f"{run['tokens_per_second'] / other:.2f}" if other else "" for other in (plain, best)]
        figures = [f"{run['tokens_per_second']:,.0f}", f"{run['peak_bytes'] / 2**20:.0f}", f"{run['losses'][1]:.4f}"]
        shown.add_row(run["side"], run["case"]["variant"], run["computed_in"], *figures, *ratios)
    Console(width=140).print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside_trl.add_arguments(parser)
    parser.add_argument("--data", help="a JSONL file of real text; default: generated text of ragged length")
    parser.add_argument("--token-budget", type=int, help="posttrain's max_tokens_per_micro_batch; default: its own")
    args = parser.parse_args()
    if args.child:
        beside_trl.child(args.child, train, Case)
        return
    case = Case(
        "plain", precision=args.precision, gradient_checkpointing=args.gradient_checkpointing, token_budget=args.token_budget, steps=args.steps
    )
    if args.quick:
        case = replace(case, rows=4, bins=1, steps=1)
    with tempfile.TemporaryDirectory() as directory:
        assets = Path(directory)
        beside_trl.make_assets_in_a_process(__file__, assets)
        write_text(args.data, assets / "text.jsonl", 400 if args.quick else 2000)
        write_tokenizer(assets)
        wanted = [(side, replace(case, variant=variant), variant) for side in args.sides for variant in VARIANTS[side]]
        runs = beside_trl.measure_all(__file__, args, wanted, assets)
    machine = hardware.describe("transformers") | {"threads": args.threads}
    print(hardware.line(machine))
    table(runs)
    if not args.quick:
        name = "sft_vs_trl" if args.precision == "bf16" else "sft_vs_trl_float32"
        text = Path(args.data).name if args.data else "generated"
        print("written to", hardware.save(name, {"hardware": machine, "text": text, "runs": runs}))


if __name__ == "__main__":
    main()
