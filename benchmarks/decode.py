"""Sampling alone: the local engine against transformers' generate, the same 40M Qwen3 with random weights, 16 completions of one prompt.

bfloat16 means bfloat16 autocast over float32 weights, as GRPO trains. generate runs under an autocast that is entered once per forward pass,
which is what accelerate does to a model prepared for mixed precision; the engine chooses float32 where bfloat16 would only be emulated.
`--profile` says where a decode step's time goes; `--short` cuts completions to 24 tokens and repeats to one.
Prints a table and writes results/decode.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import hardware
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from posttrain.rollout.local.engine import LocalEngine
from posttrain.rollout.local.weights import rollout_dtype
from posttrain.types import Request, Sampling

GENERATIONS = 16
CASES = ((250, 256), (1000, 128))  # prompt and completion tokens
VOCABULARY = 32_000
DTYPES = {"bfloat16": torch.bfloat16, "float32": None}


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def run_engine(model: Any, prompt: list[int], length: int, dtype: torch.dtype | None, profile: bool = False) -> dict[str, float]:
    """Seconds in all, and the median milliseconds of a decode step."""
    engine = LocalEngine(autocast_dtype=dtype)
    steps = []
    started = time.perf_counter()
    with engine.serving(model, version=0):
        for index in range(GENERATIONS):
            engine.submit(Request(index, tuple(prompt), Sampling(max_new_tokens=length), (0, index)))
        while len(steps) < length:
            begun = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - begun)
            if profile and len(steps) == length // 2:
                with torch.profiler.profile() as profiled:
                    engine.step()
                steps.append(steps[-1])
                print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))
    return {"seconds": time.perf_counter() - started, "step_ms": statistics.median(steps[1:]) * 1e3}


def run_generate(model: Any, prompt: list[int], length: int, dtype: torch.dtype | None) -> dict[str, float]:
    config = GenerationConfig(max_new_tokens=length, min_new_tokens=length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    forward = model.forward
    if dtype is not None:
        model.forward = torch.autocast("cpu", dtype=dtype)(forward)
    model.eval()
    try:
        ids = torch.tensor([prompt] * GENERATIONS)
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        seconds = time.perf_counter() - started
    finally:
        model.__dict__.pop("forward", None)
        model.train()
    return {"seconds": seconds, "step_ms": seconds / length * 1e3}


SIDES = {"engine": run_engine, "generate": run_generate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.precision]
    model = make_model()
    generator = torch.Generator().manual_seed(0)

    rows = []
    for prompt_length, length in CASES:
        length = 24 if arguments.short else length
        prompt = torch.randint(1, VOCABULARY, (prompt_length,), generator=generator).tolist()
        if arguments.profile:
            run_engine(model, prompt, length, dtype, profile=True)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(1 if arguments.short else arguments.repeats):  # sides take turns: a busy machine slows both
            for side, run in SIDES.items():
                runs[side].append(run(model, prompt, length, dtype))
        medians = {side: {key: statistics.median(run[key] for run in runs[side]) for key in ("seconds", "step_ms")} for side in SIDES}
        rows.append({"prompt": prompt_length, "completion": length, **medians})

    described = hardware.describe("transformers")
    computed = str(rollout_dtype(dtype, torch.device("cpu")) or torch.float32).removeprefix("torch.")
    print(f"{GENERATIONS} completions of one prompt, {arguments.precision}; the engine computes in {computed}")
    print(f"{'prompt':>7}{'completion':>12}{'engine s':>10}{'tokens/s':>10}{'ms/step':>9}{'generate s':>12}{'ms/token':>10}{'ratio':>7}")
    for row in rows:
        ours, theirs = row["engine"], row["generate"]
        rate = GENERATIONS * row["completion"] / ours["seconds"]
        print(
            f"{row['prompt']:>7}{row['completion']:>12}{ours['seconds']:>10.2f}{rate:>10.0f}{ours['step_ms']:>9.1f}"
            f"{theirs['seconds']:>12.2f}{theirs['step_ms']:>10.1f}{theirs['seconds'] / ours['seconds']:>7.1f}"
        )
    print(hardware.line(described))
    if not arguments.short:
        hardware.save("decode", {"hardware": described, "precision": arguments.precision, "engine_precision": computed, "rows": rows})


if __name__ == "__main__":
    main()
