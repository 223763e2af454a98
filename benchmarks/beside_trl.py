"""What the comparisons with TRL share: one model and tokenizer for both sides, each side in a process of its own environment, a clock of steps.

The model is a Qwen3 of 40M parameters with random weights, saved once; both sides load it in float32. On a processor without bf16 instructions
posttrain answers bf16=True by computing in float32, its own choice of a faster and exacter way; `--precision float32` asks both sides for
float32, so that the two effects can be told apart. Memory is the highest resident memory of the process, above what it held after the imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import hardware

VOCABULARY = 32_000
MODEL = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1408,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}  # 40.0M parameters
SIDES = ("posttrain", "trl")
FIGURES = ("step_s", "generation_s", "tokens_per_second", "peak_bytes")  # what a run reports besides its steps


def make_assets(directory: Path) -> None:
    """A model with random weights, and a tokenizer whose 32,000 tokens are the words w0, w1, ..."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=None, **MODEL)
    Qwen3ForCausalLM(config).save_pretrained(directory)


def some_words(draw: Any, count: int) -> str:
    return " ".join(f"w{draw.randrange(VOCABULARY - 2)}" for _ in range(count))


class Measurement:
    """Within a side's process: `library` is the side, `clock` goes into the trainer's callbacks, `result` is what is reported afterwards."""

    def __init__(self, side: str) -> None:
        import torch
        from transformers import TrainerCallback

        self.side = side
        self.library = importlib.import_module(side)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.ended: list[float] = []  # when each step ended
        ended = self.ended

        class Clock(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                ended.append(time.perf_counter())

        self.clock = Clock()

    def imported(self) -> None:
        """To be called when everything is imported: memory counts from here."""
        self.imports = hardware.resident_bytes()

    def result(self, case: Any, trainer: Any, **more: Any) -> dict[str, Any]:
        """The first step warms up: it only starts the clock of the second."""
        durations = [after - before for before, after in pairwise(self.ended)]
        return {
            "side": self.side,
            "date": hardware.today(),  # cases that are left out later keep theirs
            "case": asdict(case),
            "steps_s": durations,
            "step_s": statistics.median(durations),
            "peak_bytes": hardware.peak_resident_bytes() - self.imports,
            "computed_in": "bfloat16 autocast" if trainer.args.bf16 else "float32",
            "versions": hardware.versions("torch", "transformers", *([self.side] if self.side == "trl" else [])),
            **more,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="the python of TRL's environment")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on for both sides")
    parser.add_argument("--steps", type=int, default=3, help="measured steps; one more warms up")
    parser.add_argument(
        "--rounds", type=int, default=1, help="measure everything so often, the sides in turn, and report medians: for a noisy machine"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few tokens only, to see that it runs; writes nothing")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)


def make_assets_in_a_process(script: str, assets: Path) -> None:
    subprocess.run([sys.executable, script, "--child", "assets", "", str(assets), ""], check=True, capture_output=True)


def measure_all(script: str, args: argparse.Namespace, wanted: Sequence[tuple[str, Any, str]], assets: Path) -> list[dict[str, Any]]:
    """Each (side, case, title) of `wanted`, `--rounds` times in turn: what neighbours take of the machine, they take from both sides."""
    rounds = [[measure(script, args, side, case, assets, title) for side, case, title in wanted] for _ in range(args.rounds)]
    return [_middle(runs) for runs in zip(*rounds, strict=True)]


def _middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    medians = {key: statistics.median(run[key] for run in runs) for key in FIGURES if key in runs[0]}
    return runs[0] | {"steps_s": [seconds for run in runs for seconds in run["steps_s"]]} | medians


def measure(script: str, args: argparse.Namespace, side: str, case: Any, assets: Path, title: str) -> dict[str, Any]:
    """`train(side, case, assets)` of the script, in a fresh process of that side's environment."""
    out = assets / "measured.json"
    out.unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    python = sys.executable if side == "posttrain" else args.trl_python
    command = [python, script, "--child", side, json.dumps(asdict(case)), str(assets), str(out)]
    print(f"{side}: {title} ...", flush=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}\n{side} failed; the end of its output stands above")
    return json.loads(out.read_text())


def child(arguments: list[str], train: Callable[[str, Any, Path], dict[str, Any]], case_class: type) -> None:
    """What a process started by the two functions above does."""
    side, case, assets, out = arguments
    if side == "assets":
        make_assets(Path(assets))
    else:
        Path(out).write_text(json.dumps(train(side, case_class(**json.loads(case)), Path(assets))))


def factors(runs: list[dict[str, Any]], run: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """How many times TRL's figure of the same case is of this run's."""
    trl = next((other for other in runs if other["case"] == run["case"] and other["side"] == "trl"), run)
    return [f"{trl[key] / run[key]:.1f}x" for key in keys]
