"""What a training step holds and what each switch that saves memory costs.

`simulate`: posttrain's own step on fake tensors, for models that this machine could not hold. `flat`: the resident memory of real steps on this
CPU, a process each, against the number of completions and the size of the vocabulary. `seconds`: the same step with each switch.
Prints tables, and writes results/memory.json and the tables of docs/memory.md; a part that is not asked for keeps its figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hardware
import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

GIB = 2**30
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama-3.1-8B": lambda: LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA),
    "17B (Llama of 47 layers, 5120 wide)": lambda: LlamaConfig(
        hidden_size=5120, intermediate_size=17920, num_hidden_layers=47, num_attention_heads=40, **LLAMA
    ),
    "Qwen2.5-1.5B": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
PLAIN = {"generations": 1, "lora_r": 32, "dtype": "bfloat16", "gradient_checkpointing": True, "attention": "fused"}
BF16 = PLAIN | {"adapter_dtype": "bfloat16"}
OFFLOADED = BF16 | {"activation_offloading": True}
LEAN = OFFLOADED | {"tile_rows": 4096}
QLORA = LEAN | {"load_in_4bit": True, "optim": "adamw_8bit"}
CASES: list[tuple[str, str, int, int, dict[str, Any]]] = [  # model, what, prompt, completion, settings
    ("Llama-3.1-8B", "checkpoints on the device, fp32 adapters", 1024, 19456, PLAIN),
    ("Llama-3.1-8B", "the same, bf16 adapters", 1024, 19456, BF16),
    ("Llama-3.1-8B", "+ tiles", 1024, 19456, BF16 | {"tile_rows": 4096}),
    ("Llama-3.1-8B", "+ offload, no tiles", 1024, 19456, OFFLOADED),
    ("Llama-3.1-8B", "+ offload and tiles", 1024, 19456, LEAN),
    ("Llama-3.1-8B", "+ offload, tiles, NF4, 8-bit Adam", 1024, 19456, QLORA),
    ("Llama-3.1-8B", "+ offload, tiles of 16,384, NF4, 8-bit Adam", 2048, 129024, QLORA | {"tile_rows": 16384}),
    ("Llama-3.1-8B", "+ offload, tiles, NF4, 8-bit Adam", 512, 512, QLORA),
    ("17B (Llama of 47 layers, 5120 wide)", "+ offload, tiles, NF4, 8-bit Adam", 512, 512, QLORA),
    ("Qwen2.5-1.5B", "+ offload, tiles, NF4, 8-bit Adam", 512, 512, QLORA),
]
GROUPS = (1, 8, 64)
VOCABULARIES = (8192, 262144)


def simulated(chosen: list[int], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases with these numbers; those of the others stay."""
    from posttrain.memory import TrainingJob, shape_of
    from posttrain.memory.simulate import simulate_step

    rows = []
    for number, (model, what, prompt, completion, settings) in enumerate(CASES):
        if number not in chosen:
            rows += [row for row in before if (row["model"], row["what"], row["tokens"]) == (model, what, prompt + completion)]
            continue
        started = time.perf_counter()
        config = MODELS[model]()
        memory = simulate_step(config, TrainingJob(shape_of(config.to_dict(), model), prompt, completion, **settings))
        row = {
            "model": model, "what": what, "tokens": prompt + completion, "device_gib": memory.device / GIB, "above_gib": memory.above / GIB,
            "host_gib": memory.host / GIB, "parts_gib": {name: nbytes / GIB for name, nbytes in sorted(memory.parts.items())},
            "seconds_to_simulate": time.perf_counter() - started,
        }  # fmt: skip
        rows.append(row)
        print(f"{model:36} {what:44} {row['tokens']:7,} {row['device_gib']:6.2f} {row['above_gib']:6.2f} {row['host_gib']:6.2f}", flush=True)
    return rows


def simulated_flat() -> dict[str, list[dict[str, Any]]]:
    """An 8B step against G, of prompts of 512 and completions of 3,584 tokens under a budget of 4,096, and against the vocabulary.

    One completion fills a micro-batch, so that G is all that grows.
    """
    from posttrain.data.stream import PackItem, split
    from posttrain.memory import TrainingJob, shape_of
    from posttrain.memory.simulate import simulate_step

    config = MODELS["Llama-3.1-8B"]()
    job = TrainingJob(shape_of(config.to_dict(), "Llama-3.1-8B"), 512, 3584, **QLORA)
    by_group, by_vocabulary = [], []
    for group in GROUPS:
        parts = split([PackItem([0] * 512, [[0] * 3584] * group)], 4096)
        lengths = max((tuple(map(len, part[0].completions)) for part in parts), key=sum)
        memory = simulate_step(config, job, lengths)
        by_group.append({"completions": group, "micro_batches": len(parts), "device_gib": memory.device / GIB, "above_gib": memory.above / GIB})
        print(f"G {group:3} {memory.device / GIB:6.2f} {memory.above / GIB:6.2f}", flush=True)
    for size in VOCABULARIES:
        config.vocab_size = size
        memory = simulate_step(config, job)
        by_vocabulary.append({"vocabulary": size, "device_gib": memory.device / GIB, "above_gib": memory.above / GIB})
        print(f"V {size:7,} {memory.device / GIB:6.2f} {memory.above / GIB:6.2f}", flush=True)
    return {"completions": by_group, "vocabulary": by_vocabulary}


def small_model(vocabulary: int) -> Any:
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def step_of(model: Any, items: list[Any], budget: int, tile_rows: int | None = None, offload: bool = False) -> None:
    """Forward and backward of every micro-batch."""
    from contextlib import ExitStack

    from posttrain.data.stream import pack, split
    from posttrain.models.forward import logprobs
    from posttrain.models.tiles import tiled
    from posttrain.ops.offload import ActivationOffload

    for part in split(items, budget):
        with ExitStack() as stack:
            if tile_rows is not None:
                stack.enter_context(tiled(model, tile_rows))
            with ActivationOffload(smallest=2**16) if offload else ExitStack():
                loss = logprobs(model, pack(part)).logps.sum()
            loss.backward()


def prepared(vocabulary: int, *, checkpointed: bool = True) -> Any:
    from peft import LoraConfig

    from posttrain.models.adapters import add_lora
    from posttrain.models.head import base_model
    from posttrain.models.load import prepare_model

    model = small_model(vocabulary)
    prepare_model(model)
    model = add_lora(model, LoraConfig(r=8, target_modules="all-linear")).train()
    if checkpointed:
        base_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def resident(group: int, vocabulary: int) -> None:
    """In a process of its own: prints the peak of resident memory above that before the first step."""
    from posttrain.data.stream import PackItem

    model = prepared(vocabulary)
    step_of(model, [PackItem([1] * 8, [[2] * 8])], 4096)  # what is made once
    before = hardware.resident_bytes()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the kernel's peak begins anew
    step_of(model, [PackItem([1] * 128, [[2] * 512] * group)], 640)  # one completion fills a micro-batch: G is all that grows
    print(json.dumps({"peak": hardware.peak_resident_bytes() - before, "weights": sum(p.nbytes for p in model.parameters())}))


def flat() -> dict[str, list[dict[str, Any]]]:
    """Real steps on this CPU: a small model, prompts of 128 and completions of 512 tokens, at most 640 in a micro-batch."""

    def measured(group: int, vocabulary: int) -> dict[str, float]:
        command = [sys.executable, __file__, "--child", str(group), str(vocabulary)]
        # what is freed is given back at once and in small pages: else the peak is that of the allocator's holes (86, 102, 117 MiB for 1, 8, 64)
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17), "THP_MEM_ALLOC_ENABLE": "0"}
        run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()[-1])
        return {"peak_mib": run["peak"] / 2**20, "weights_mib": run["weights"] / 2**20}

    by_group = [{"completions": group} | measured(group, 32768) for group in GROUPS]
    by_vocabulary = [{"vocabulary": size} | measured(8, size) for size in VOCABULARIES]
    for row in by_group + by_vocabulary:
        print(row, flush=True)
    return {"completions": by_group, "vocabulary": by_vocabulary}


SWITCHES: dict[str, tuple[bool, dict[str, Any]]] = {  # checkpointed or not, the rest
    "none": (False, {}),
    "checkpoints": (True, {}),
    "checkpoints, offload": (True, {"offload": True}),
    "checkpoints, tiles": (True, {"tile_rows": 256}),
    "checkpoints, offload, tiles": (True, {"offload": True, "tile_rows": 256}),
    "tiles": (False, {"tile_rows": 256}),
}


def seconds(repeats: int = 2) -> list[dict[str, Any]]:
    """Forward and backward of 1,024 tokens of the small model on this CPU; the median of repeats that take turns."""
    from posttrain.data.stream import PackItem

    items = [PackItem([1] * 512, [[2] * 512])]
    models = {name: prepared(8192, checkpointed=checkpointed) for name, (checkpointed, _) in SWITCHES.items()}
    times: dict[str, list[float]] = {name: [] for name in SWITCHES}
    for repeat in range(repeats + 1):
        for name, (_, settings) in SWITCHES.items():
            started = time.process_time()
            step_of(models[name], items, 4096, **settings)
            if repeat:
                times[name].append(time.process_time() - started)
    rows = [{"switches": name, "processor_seconds": statistics.median(values)} for name, values in times.items()]
    for row in rows:
        print(f"{row['switches']:32} {row['processor_seconds']:.3f} s", flush=True)
    return rows


def table(*rows: list[Any]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def page(results: dict[str, Any]) -> str:
    """What stands between the markers of docs/memory.md: a section for each part that was run."""
    sections = [(SECTIONS[name], results[name]) for name in SECTIONS if name in results]
    return "\n\n".join(section(part["rows"], hardware.line(part["hardware"])) for section, part in sections)


def _steps(rows: list[dict[str, Any]], _: str) -> str:
    figures = [
        [row["model"], row["what"], f"{row['tokens']:,}", *(f"{row[name]:.2f}" for name in ("device_gib", "above_gib", "host_gib"))] for row in rows
    ]
    said = "GiB, simulated: all that the device holds at the peak, the part of it that the step itself takes, and what waits on the host."
    return f"{said}\n\n{table(['model', 'switches', 'tokens', 'device', 'of the step', 'host'], *figures)}"


def _growth(what: str) -> Callable[[dict[str, Any], str], str]:
    def section(rows: dict[str, Any], where: str) -> str:
        figures = [
            [
                f"{row[axis]:,} {name}",
                f"{row['device_gib']:.2f} ({row['above_gib']:.2f}) GiB" if "device_gib" in row else f"{row['peak_mib']:.0f} MiB",
            ]
            for axis, name in (("completions", "completions"), ("vocabulary", "tokens in the vocabulary"))
            for row in rows[axis]
        ]
        return f"{what} ({where}).\n\n{table(['', 'peak'], *figures)}"

    return section


def _seconds(rows: list[dict[str, Any]], where: str) -> str:
    figures = [[row["switches"], f"{row['processor_seconds']:.2f}"] for row in rows]
    return f"Forward and backward of 1,024 tokens of a small model with adapters ({where}).\n\n{table(['switches', 'processor seconds'], *figures)}"


SECTIONS: dict[str, Callable[..., str]] = {
    "simulate": _steps,
    "simulate_flat": _growth("An 8B step, 4,096 tokens in a micro-batch, simulated; in brackets what the step itself takes"),
    "flat": _growth("Real steps of a small model, 640 tokens in a micro-batch: resident memory above that before the step"),
    "seconds": _seconds,
}


def write_page(results: dict[str, Any]) -> None:
    path = Path(__file__).parents[1] / "docs" / "memory.md"
    sys.path.append(str(path.parent))
    import marked

    path.write_text(marked.filled(path.name, path.read_text(encoding="utf-8"), "memory", page(results)), encoding="utf-8")


PARTS: dict[str, Callable[[], Any]] = {"simulate_flat": simulated_flat, "flat": flat, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["simulate", *PARTS, []], help="default: all")
    parser.add_argument("--cases", nargs="*", type=int, default=list(range(len(CASES))), help="which of the simulated ones, by number")
    parser.add_argument("--child", nargs=2, type=int, metavar=("GROUP", "VOCABULARY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        resident(*args.child)
        return
    path = hardware.RESULTS / "memory.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in args.parts or ["simulate", *PARTS]:
        print(f"-- {name}")
        rows = simulated(args.cases, results.get("simulate", {}).get("rows", [])) if name == "simulate" else PARTS[name]()
        results[name] = {"hardware": hardware.describe("transformers", "peft"), "rows": rows}
        hardware.save("memory", results)
    write_page(results)


if __name__ == "__main__":
    main()
