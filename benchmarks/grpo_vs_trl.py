"""One GRPO step, posttrain against TRL: the same model, data, settings and machine, each side in a process of its own environment.

`make bench` builds TRL's environment and runs this. What is measured, and how it is kept fair:

- The model is a Qwen3 of 40M parameters with random weights, saved once; both sides load it in float32 and train it with bf16=True.
  On a processor without bf16 instructions posttrain answers bf16=True by computing in float32, which is its own choice of a faster and
  exacter way; `--precision float32` asks both sides for float32, so that the two effects can be told apart.
- The same names go to both constructors: G = 16, one prompt a step, loss dapo, beta 0, the same optimizer, no gradient checkpointing
  (`--gradient-checkpointing` turns it on for both).
- Every completion has the full length. TRL always stops at some end token, so its own setting `min_new_tokens` forbids that token
  until the end (one masked logit a step); ours is told that there are no stop tokens. The reward checks every length.
- A step lasts from the end of one optimizer step to the end of the next: generation, reward, update and logging. The first step warms up.
- Generation is TRL's call of `model.generate`, and ours the whole of `collect` (metric time/collect), which also scores and records.
- Memory is the highest resident memory of the process, above what it held after the imports.

Afterwards posttrain alone runs G = 4, 8 and 16 with a token budget of one quarter of the group, to show what memory grows with.
Prints a table and writes results/grpo_vs_trl.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
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


def make_prompts(case: Case) -> list[dict[str, str]]:
    draw = random.Random(0)
    return [{"prompt": " ".join(f"w{draw.randrange(VOCABULARY - 2)}" for _ in range(case.prompt))} for _ in range(case.steps + 1)]


def train(side: str, case: Case, assets: Path) -> dict[str, Any]:
    """Runs in the side's own process and environment. Nothing but the import and the two marked settings depends on the side."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    library = importlib.import_module(side)
    trainer_class, config_class = library.GRPOTrainer, library.GRPOConfig
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    imports = hardware.resident_bytes()
    steps: list[float] = []  # when each step ended
    generation: list[float] = []  # seconds of each
    lengths: set[int] = set()

    def even_words(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.update(map(len, completion_ids))
        return [sum(word[-1] in "02468" for word in text.split()) / case.completion for text in completions]

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(time.perf_counter())

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
            callbacks=[Clock()],
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
    durations = [after - before for before, after in pairwise(steps)]
    return {
        "side": side,
        "case": asdict(case),
        "steps_s": durations,
        "step_s": statistics.median(durations),
        "generation_s": statistics.median(generation[1:]),
        "peak_bytes": hardware.peak_resident_bytes() - imports,
        "computed_in": "bfloat16 autocast" if trainer.args.bf16 else "float32",
        "versions": hardware.versions("torch", "transformers", *([side] if side == "trl" else [])),
    }


def kv_bytes(case: Case) -> int:
    """Keys and values of one shared prompt and G completions, in float32."""
    per_token = 2 * MODEL["num_hidden_layers"] * MODEL["num_key_value_heads"] * MODEL["head_dim"] * 4
    return per_token * (case.prompt + case.generations * case.completion)


def measure(python: str, side: str, case: Case, assets: Path, threads: int) -> dict[str, Any]:
    """`train` in a fresh process of that side's environment."""
    out = assets / "measured.json"
    out.unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [python, __file__, "--child", side, json.dumps(asdict(case)), str(assets), str(out)]
    print(f"{side}: prompt {case.prompt}, completion {case.completion}, G {case.generations} ...", flush=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}\n{side} failed; the end of its output stands above")
    return json.loads(out.read_text())


def child(side: str, case: str, assets: str, out: str) -> None:
    if side == "assets":
        make_assets(Path(assets))
    else:
        Path(out).write_text(json.dumps(train(side, Case(**json.loads(case)), Path(assets))))


def tables(runs: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    table = Table("prompt / completion", "side", "computed in", "s per step", "s generation", "peak MiB", "step", "generation", "memory")
    for run in runs:
        trl = next((other for other in runs if other["case"] == run["case"] and other["side"] == "trl"), run)
        factors = [f"{trl[key] / run[key]:.1f}x" for key in ("step_s", "generation_s", "peak_bytes")]
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
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help="the python of TRL's environment")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--cases", nargs="*", type=int, default=list(range(len(CASES))), help="which of the cases: 0 is 250/256, 1 is 1000/128")
    parser.add_argument("--no-memory-sweep", action="store_true", help="leave out the runs with several G")
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on for both sides")
    parser.add_argument("--steps", type=int, default=3, help="measured steps; one more warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few tokens only, to see that it runs; writes nothing")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        child(*args.child)
        return
    chosen = [CASES[index] for index in args.cases]
    cases = [replace(case, steps=args.steps, precision=args.precision, gradient_checkpointing=args.gradient_checkpointing) for case in chosen]
    memory_cases = [replace(case, precision=args.precision, gradient_checkpointing=args.gradient_checkpointing) for case in MEMORY_CASES]
    if args.no_memory_sweep:
        memory_cases = []
    if args.quick:
        cases, memory_cases = [replace(cases[0], prompt=20, completion=8, generations=4, steps=1)], []
    pythons = {"posttrain": sys.executable, "trl": args.trl_python}
    with tempfile.TemporaryDirectory() as directory:
        assets = Path(directory)
        subprocess.run([sys.executable, __file__, "--child", "assets", "", str(assets), ""], check=True, capture_output=True)
        runs = [measure(pythons[side], side, case, assets, args.threads) for case in cases for side in args.sides]
        memory = [measure(sys.executable, "posttrain", case, assets, args.threads) for case in memory_cases if "posttrain" in args.sides]
    machine = hardware.describe("transformers") | {"threads": args.threads}
    print(hardware.line(machine))
    tables(runs, memory)
    if not args.quick:
        name = "grpo_vs_trl" if args.precision == "bf16" else "grpo_vs_trl_float32"
        memory = [run | {"kv_bytes": kv_bytes(Case(**run["case"]))} for run in memory]
        print("written to", hardware.save(name, {"hardware": machine, "runs": runs, "memory": memory}))


if __name__ == "__main__":
    main()
