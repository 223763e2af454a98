"""How far `posttrain plan` is from the truth: `python benchmarks/plan_accuracy.py [simulated|whole|chunked|switches|quantised|real] [--models ...]`.

simulated: five architectures x three contexts x {full, LoRA, QLoRA} against posttrain's own step on fake tensors, four layers deep (they are alike).
whole: the first of the models at full depth. chunked: the models with attention under explicit masks, as on a GPU today. switches: each switch,
and other shapes of a micro-batch. quantised: the real 4-bit layers of bitsandbytes on real tensors, storages counted. real: the growth of a
process's resident memory after its imports, in two steps of a real trainer on this machine's CPU. What is measured replaces its line in
benchmarks/results/plan.json. Real ones are measured twice: with freed blocks given back at once (MALLOC_MMAP_THRESHOLD_), and as glibc keeps them by default.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import hardware

MODELS = ("llama-3.1-8b", "qwen2.5-1.5b", "qwen3-4b", "phi-4", "gemma-3-1b")
CONTEXTS = (1024, 4096, 20480)
PROMPT = 256
LORA = {"lora_r": 32, "dtype": "bfloat16"}
QLORA = LORA | {"adapter_dtype": "bfloat16", "load_in_4bit": True}
FRUGAL = QLORA | {"tile_rows": 2048, "activation_offloading": True, "optim": "adamw_8bit"}
FUSED = {"attention": "fused"}
LAYERS = 4  # of Gemma two that slide and two that see everything
METHODS: dict[str, dict[str, Any]] = {"full": {"optim": "adamw_8bit"}, "lora": LORA, "qlora": FRUGAL}
# name -> (model, prompt, completions, settings)
SWITCHES: dict[str, tuple[str, int, tuple[int, ...], dict[str, Any]]] = {
    "plain QLoRA": ("llama-3.1-8b", PROMPT, (3840,), QLORA),
    "no checkpoints": ("llama-3.1-8b", PROMPT, (3840,), QLORA | {"gradient_checkpointing": False}),
    "no checkpoints, offloaded": ("llama-3.1-8b", PROMPT, (3840,), QLORA | {"gradient_checkpointing": False, "activation_offloading": True}),
    "tiles": ("llama-3.1-8b", PROMPT, (3840,), QLORA | {"tile_rows": 1024}),
    "offloaded": ("llama-3.1-8b", PROMPT, (3840,), QLORA | {"activation_offloading": True}),
    "8-bit optimizer": ("llama-3.1-8b", PROMPT, (3840,), QLORA | {"optim": "adamw_8bit"}),
    "all": ("llama-3.1-8b", PROMPT, (3840,), FRUGAL),
    "full, tiles": ("qwen2.5-1.5b", PROMPT, (3840,), {"optim": "adamw_8bit", "tile_rows": 1024}),
    "full, no checkpoints": ("qwen2.5-1.5b", PROMPT, (3840,), {"optim": "adamw_8bit", "gradient_checkpointing": False}),
    "full, bf16 weights": ("qwen2.5-1.5b", PROMPT, (3840,), {"optim": "adamw_8bit", "dtype": "bfloat16"}),
    "a group": ("qwen2.5-1.5b", PROMPT, (960,) * 4, LORA),
    "a group on a CPU": ("qwen2.5-1.5b", PROMPT, (960,) * 4, LORA | {"dtype": "float32", "bf16": False, "device": "cpu"}),
    "full on a CPU": ("qwen2.5-1.5b", PROMPT, (3840,), {"optim": "adamw_8bit", "bf16": False, "device": "cpu"}),
}

# name -> (settings of the model, tokens of a row, settings of the trainer, whether every weight is trained)
REAL: dict[str, tuple[dict[str, int], int, dict[str, Any], bool]] = {
    "full": ({"hidden_size": 512, "layers": 10, "vocab_size": 32000}, 1024, {}, True),
    "full, checkpoints": ({"hidden_size": 512, "layers": 16, "vocab_size": 64000}, 2048, {"gradient_checkpointing": True}, True),
    "LoRA": ({"hidden_size": 512, "layers": 8, "vocab_size": 16000}, 4096, {}, False),
    "LoRA, checkpoints": ({"hidden_size": 768, "layers": 6, "vocab_size": 32000}, 8192, {"gradient_checkpointing": True}, False),
    "LoRA, tiles": ({"hidden_size": 768, "layers": 10, "vocab_size": 64000}, 8192, {"gradient_checkpointing": True, "tile_rows": 512}, False),
}


def simulated(model: str, prompt: int, completions: tuple[int, ...], settings: dict[str, Any], layers: int | None = None) -> dict[str, Any]:
    """One plan beside one simulated step. layers: None: all."""
    from transformers import AutoConfig

    from posttrain.memory import TrainingJob, plan, shape_of
    from posttrain.memory.simulate import simulate_step

    total = prompt + sum(completions)
    given = {
        "gradient_checkpointing": True,
        "max_tokens_per_micro_batch": total,
        "rollout_size": 2 * len(completions),
    } | settings  # two micro-batches
    fields = fields_of(model, layers)
    job = TrainingJob(shape_of(fields, model), prompt, completions[0], generations=len(completions), **given)
    started = time.perf_counter()
    truth = simulate_step(AutoConfig.for_model(fields.pop("model_type"), **fields), job, completions)
    seconds = time.perf_counter() - started
    found = plan(job)
    return _line(found.train_peak - found.training["holes"] - found.training["context"], truth.device) | {
        "planned_above": found.above,
        "measured_above": truth.above,
        "error_above": found.above / truth.above - 1,
        "planned_host": found.host["checkpoints_host"],
        "measured_host": truth.host,
        "seconds": round(seconds, 1),
    }


def fields_of(model: str, layers: int | None) -> dict[str, Any]:
    """Of a known model's config, with as many layers."""
    from posttrain.memory.known import KNOWN

    fields = dict(KNOWN[model])
    if layers is not None:
        fields["num_hidden_layers"] = layers
        if "sliding_window_pattern" in fields:
            fields["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
            del fields["sliding_window_pattern"]
    return fields


def _line(planned: int, measured: int) -> dict[str, Any]:
    """`above`, in the callers: without weights, adapters, gradients and optimizer."""
    return {"planned": planned, "measured": measured, "error": planned / measured - 1}


def quantised(checkpointing: bool) -> dict[str, Any]:
    """A forward and backward of a small model with bitsandbytes' own layers, by the ways of a GPU: what lives beside weights and gradients.

    Adapters in bf16: PEFT casts the inputs of others where CUDA's autocast is off, as it is on a CPU, and not on a GPU.
    """
    import torch
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain.data.stream import PackItem, pack
    from posttrain.memory import TrainingJob, plan, shape_of
    from posttrain.memory.simulate.live import LiveStorages
    from posttrain.models.adapters import add_lora
    from posttrain.models.forward import logprobs
    from posttrain.models.load import load_model
    from posttrain.models.quantise import in_4bit
    from posttrain.ops.precision import standing_for

    tokens = 2048
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=tokens,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        base = load_model(folder, dtype="bfloat16", **in_4bit(str(folder), has_adapters=True), device_map="cpu")
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = add_lora(base, lora, dtype=torch.bfloat16).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    stream = pack([PackItem([1] * 64, [[1] * (tokens - 64)])])
    with standing_for("cuda", has_fused_attention=True), LiveStorages() as live:
        with torch.autocast("cpu", torch.bfloat16):
            logps = logprobs(model, stream, entropy_grad=False).logps
        logps.sum().backward()
    job = TrainingJob(
        shape_of(config.to_dict(), "small"), 64, tokens - 64, generations=1, rollout_size=2, lora_r=16, load_in_4bit=True, dtype="bfloat16",
        adapter_dtype="bfloat16", gradient_checkpointing=checkpointing, attention="fused", max_tokens_per_micro_batch=tokens,
    )  # fmt: skip
    return _line(plan(job).above, live.peak)


def real(name: str, **environment: str) -> dict[str, Any]:
    """In a process of its own, which says what it grew by."""
    done = subprocess.run([sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str) -> None:
    from transformers import LlamaConfig

    from posttrain.memory import TrainingJob, plan, shape_of

    sizes, tokens, settings, is_full = REAL[name]
    hidden = sizes["hidden_size"]
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"], hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=sizes["layers"],
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=tokens, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tiny = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=32, eos_token_id=0, pad_token_id=0
    )
    _train(tiny, 64, {}, is_full)  # what is imported and set up on the first use is no part of a model
    before = hardware.resident_bytes()
    optim = _train(config, tokens, settings, is_full)
    peak = hardware.peak_resident_bytes()
    shape = shape_of(config.to_dict(), name)
    job = TrainingJob(
        shape, 1, tokens - 1, generations=1, is_online=False, lora_r=None if is_full else 16, bf16=False, device="cpu",
        max_tokens_per_micro_batch=tokens, optim=optim, has_known_gradient=True, **settings,
    )  # fmt: skip
    found = plan(job)
    returned = found.training["holes"] if "MALLOC_MMAP_THRESHOLD_" in os.environ else 0
    print(json.dumps(_line(found.train_peak - returned, peak - before) | {"parameters": shape.parameters, "tokens": tokens}))


def _train(config: Any, tokens: int, settings: dict[str, Any], is_full: bool) -> str:
    """Two steps of a real trainer on rows of so many tokens. Returns its optimizer."""
    from peft import LoraConfig
    from transformers import LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from small import build_tokenizer

    from posttrain import SFTConfig, SFTTrainer

    lora = None if is_full else LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{"text": "1" * (tokens - 1)} for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, max_steps=2, per_device_train_batch_size=1, max_length=tokens, max_tokens_per_micro_batch=tokens, save_strategy="no",
            use_cpu=True, completion_only_loss=False, **settings,
        )  # fmt: skip
        SFTTrainer(LlamaForCausalLM(config), args, train_dataset=rows, processing_class=build_tokenizer(), peft_config=lora).train()
    return str(args.optim.value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["simulated", "whole", "chunked", "switches", "quantised", "real"])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--names", nargs="*", help="of the real ones")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.child:
        child(options.child)
        return
    path = hardware.RESULTS / "plan.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    results["hardware"] = hardware.describe("transformers", "peft")

    def note(part: str, name: str, line: dict[str, Any]) -> None:
        results.setdefault(part, {})[name] = line
        hardware.save("plan", results)
        print(
            f"{part} {name}: planned {line['planned'] / 2**30:.2f} GiB, measured {line['measured'] / 2**30:.2f} ({line['error']:+.1%})"
            + (f", above {line['error_above']:+.1%}" if "error_above" in line else ""),
            flush=True,
        )

    if "simulated" in options.parts:
        for model in options.models:
            for method in options.methods:
                for context in CONTEXTS:
                    line = simulated(model, PROMPT, (context - PROMPT,), METHODS[method] | FUSED, LAYERS)
                    note("simulated", f"{model} {method} {context}", line)
    if "whole" in options.parts:
        for method, settings in METHODS.items():
            for context in CONTEXTS:
                note("whole", f"{MODELS[0]} {method} {context}", simulated(MODELS[0], PROMPT, (context - PROMPT,), settings | FUSED))
    if "chunked" in options.parts:
        for model in options.models:
            for method, settings in METHODS.items():
                note("chunked", f"{model} {method} 4096", simulated(model, PROMPT, (4096 - PROMPT,), settings, LAYERS // 2))
    if "switches" in options.parts:
        for name, case in SWITCHES.items():
            note("switches", name, simulated(*case[:3], case[3] | FUSED, LAYERS))
    if "quantised" in options.parts:
        for checkpointing in (True, False):
            note("quantised", "checkpoints" if checkpointing else "no checkpoints", quantised(checkpointing))
    if "real" in options.parts:
        for name in options.names or REAL:
            note("real", name, real(name, MALLOC_MMAP_THRESHOLD_=str(2**17)))
            note("by_default", name, real(name))
    from posttrain.memory.published import table

    hardware.save("plan_published", {"rows": [vars(row) for row in table()]})


if __name__ == "__main__":
    main()
