"""From a recipe to a plan: what the settings, the model's config and the longest rows say about memory. No model is loaded.

`check` is asked by every training command before the model is loaded; `memory_check: false` among the trainer's settings leaves it out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.cli.kinds import KINDS, Kind
from posttrain.cli.options import say
from posttrain.cli.recipe import ModelSection, Recipe
from posttrain.errors import UserError, did_you_mean
from posttrain.files import read_json
from posttrain.plan.advice import refuse_what_cannot_fit
from posttrain.plan.cards import free_memory
from posttrain.plan.estimate import nf4_bytes
from posttrain.plan.job import AUTO_TILE_ROWS, DEFAULT_TOKENS, OPTIMIZERS, Job
from posttrain.plan.shapes import Shape, find_shape, shape_of

LOOKED_AT = 2000  # rows, for the longest
TRAINED = ("prompt", "completion", "text", "messages", "chosen", "rejected")  # columns that become tokens
# Setting of a trainer that is not 0 where a model that is trained whole needs a frozen copy. The others that have a reference always do.
REFERENCE_IF = {"train": "beta", "rloo": "beta", "ppo": "kl_coef"}
REFERENCE = ("dpo", "kto")
PAIRS = ("dpo", "orpo", "cpo", "reward")


def check(kind: Kind, recipe: Recipe, args: Any, rows: Any, tokenizer: Any) -> None:
    """Raises UserError, with the fix, for what cannot fit this machine. What cannot be foreseen is said in a line, and goes on."""
    device = args.device.type
    if not args.memory_check or device not in ("cuda", "cpu") or recipe.data.streaming:
        return
    free = free_memory(device)
    if free is None:
        return
    if device == "cpu":
        free //= args.world_size  # processes share it; those of other machines too, but nobody trains over machines without a GPU
    try:
        shape = shape_of_model(recipe.model, vocab=len(tokenizer))
        job = job_of(kind, recipe, args, shape, *longest(kind, rows, tokenizer, args))
    except UserError as error:
        say(f"memory was not checked: {error}", err=True)
        return
    note = refuse_what_cannot_fit(job, free, "the GPU" if device == "cuda" else "this machine")
    if note is not None:
        say(f"warning: {note}", err=True)


def shape_of_model(section: ModelSection, vocab: int | None = None) -> Shape:
    """Of the model by its name, or of the config in `from_scratch` with a vocabulary of that size. Raises UserError where it is not known."""
    if section.from_scratch is None:
        from posttrain.models.adapter_files import base_of, is_adapter

        name = str(section.name)
        return find_shape(base_of(name) if is_adapter(name) else name)
    from transformers import AutoConfig

    settings = dict(section.from_scratch)
    kind = settings.pop("model_type", "qwen3")
    size = vocab if vocab is not None else section.tokenizer.vocab_size if section.tokenizer is not None else None
    config = AutoConfig.for_model(kind, **({} if size is None else {"vocab_size": size}) | settings)
    return shape_of(config.get_text_config().to_dict(), f"a {kind} from scratch")


def job_of(kind: Kind, recipe: Recipe, args: Any, shape: Shape, prompt: int, completion: int, total: int | None = None) -> Job:
    """The job that a trainer with these settings does. `total`: tokens of an update's rows, where they are fewer than its micro-batch may have."""
    section, device = recipe.model, "cuda" if args.device.type == "cuda" else "cpu"
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in OPTIMIZERS:
        raise UserError(f"optim={optim} is not known to the plan")
    generations = args.num_generations if kind.is_online else 2 if kind.section in PAIRS else 1
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * generations
    budget = args.token_budget if total is None else max(prompt + completion, min(args.token_budget, total))
    lora_r, targets = _adapters(section)
    known = [linear.name for linear in shape.linears]
    for name in targets or ():
        if name not in known:
            raise UserError(f"the plan knows adapters on linear layers only ({', '.join(known)}), not on '{name}'.{did_you_mean(name, known)}")
    return Job(
        shape,
        prompt_length=prompt,
        completion_length=completion,
        generations=generations,
        rollout_size=args.generation_batch_size // args.world_size if kind.is_online else rows,
        is_online=kind.is_online,
        keeps_groups=kind.section in PAIRS,
        lora_r=lora_r,
        lora_targets=targets,
        load_in_4bit=section.load_in_4bit or _is_packed(section.name),
        keep_in_16bit=_kept(section.keep_in_16bit, shape),
        dtype=section.dtype or str((args.model_init_kwargs or {}).get("dtype", "float32")),
        adapter_dtype=args.adapter_dtype,
        bf16=bool(args.bf16),
        optim=optim,
        gradient_checkpointing=args.gradient_checkpointing,
        activation_offloading=_offloads(args, shape),
        tile_rows=AUTO_TILE_ROWS if args.tile_rows == "auto" else args.tile_rows,
        max_tokens_per_micro_batch=budget if budget != DEFAULT_TOKENS else None,
        max_concurrent_completions=args.max_concurrent_completions if kind.is_online else 1,
        has_reference=_has_reference(kind, args),
        has_known_gradient=has_known_gradient(kind, args),
        device=device,
        emulates_bf16=device == "cpu" and section.dtype == "bfloat16" and not _multiplies_bf16(),
    )


def _offloads(args: Any, shape: Shape) -> bool:
    from posttrain.trainers.memory import offloads

    return offloads(args, layers=shape.layers, hidden=shape.hidden)


def _multiplies_bf16() -> bool:
    import torch

    from posttrain.ops.precision import multiplies_natively

    return multiplies_natively(torch.bfloat16, "cpu")


def _has_reference(kind: Kind, args: Any) -> bool:
    if kind.section in REFERENCE_IF:
        return bool(getattr(args, REFERENCE_IF[kind.section]))
    return kind.section in REFERENCE and not args.precompute_ref_log_probs


def has_known_gradient(kind: Kind, args: Any) -> bool:
    """What `BaseTrainer.expected_grad` will find, from the settings alone."""
    if args.fp16:
        return False
    if not kind.is_online:
        return kind.section == "sft" and args.loss_type != "dft"
    if kind.section == "train":  # GRPO
        kl_in_loss = args.beta != 0 and args.kl_estimator != "k1_in_reward"
        by_entropy = args.entropy_coef != 0 or args.use_adaptive_entropy or args.top_entropy_quantile < 1
        return args.on_policy and not kl_in_loss and not by_entropy
    return bool(args.on_policy)


def _adapters(section: ModelSection) -> tuple[int | None, tuple[str, ...] | None]:
    """Rank and target layers; None: no adapters, all linear layers."""
    if section.lora is not None:
        targets = section.lora.target_modules
        return section.lora.r, tuple(targets) if isinstance(targets, list) else None
    config = Path(section.name or "") / "adapter_config.json"
    if section.name is None or not config.is_file():
        return None, None
    saved = read_json(config)
    targets = saved["target_modules"]
    return saved["r"], tuple(targets) if isinstance(targets, list) else None


def _kept(given: int | list[str] | None, shape: Shape) -> int:
    """Further bytes of linear layers that are named, or the budget for them."""
    if given is None or isinstance(given, int):
        return given or 0
    weights = {linear.name: linear.weights for linear in shape.linears}
    names = [name.rpartition(".")[2] for name in given]
    return sum(2 * weights[name] - nf4_bytes(weights[name]) for name in names if name in weights)


def _is_packed(name: str | None) -> bool:
    """Whether a checkpoint is in 4 bits already."""
    config = Path(name or "") / "config.json"
    if name is None or not config.is_file():
        return "bnb-4bit" in str(name)
    return bool(read_json(config).get("quantization_config", {}).get("load_in_4bit"))


def longest(kind: Kind, rows: Any, tokenizer: Any, args: Any) -> tuple[int, int, int | None]:
    """Tokens of the longest prompt and of the longest completion among the first rows; with completions in the data also what an update's
    rows have together, on average."""
    looked_at = [rows[index] for index in range(min(LOOKED_AT, len(rows)))]
    if not looked_at:
        raise UserError("the data have no rows")
    if kind.is_online:
        row = max(looked_at, key=lambda row: _letters(row["prompt"]))
        return max(_tokens(row["prompt"], tokenizer), 1), args.max_completion_length, None
    looked_at = [{name: value for name, value in row.items() if name in TRAINED} for row in looked_at]
    row = max(looked_at, key=lambda row: sum(map(_letters, row.values())))
    prompt = _tokens(row.get("prompt"), tokenizer)
    others = [_tokens(value, tokenizer) for name, value in row.items() if name != "prompt"]
    letters = [sum(map(_letters, row.values())) for row in looked_at]
    completion, limit = max([1, *others]), args.max_length
    if limit is not None:
        prompt = min(prompt, limit - 1)
        completion = min(completion, limit - prompt)
    update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if kind is KINDS["sft"] and args.packing:
        return max(prompt, 1), max(completion, 1), update * int(limit or 0)
    mean = sum(letters) / len(letters) / max(*letters, 1)  # of a row, as a share of the longest
    return max(prompt, 1), max(completion, 1), int(update * mean * (prompt + sum(others)))


def _letters(value: Any) -> int:
    """Of all text in a value: itself, or what its messages say."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(_letters(inner.get("content") if isinstance(inner, dict) else inner) for inner in value)
    return 0


def _tokens(value: Any, tokenizer: Any) -> int:
    if isinstance(value, str):
        return len(tokenizer(value, add_special_tokens=False)["input_ids"])
    if isinstance(value, list):
        return sum(_tokens(inner.get("content") if isinstance(inner, dict) else inner, tokenizer) for inner in value)
    return 0


def kind_named(name: str) -> Kind:
    """Raises UserError for a trainer that there is not."""
    if name not in KINDS:
        raise UserError(f"--trainer {name} is not known; use one of {', '.join(KINDS)}")
    return KINDS[name]
