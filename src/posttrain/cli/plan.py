"""`posttrain plan`: what a job will need, term by term, before anything is spent, and what to change where that is too
much."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli.options import overrides, say, sentences
from posttrain.cli.recipe import Recipe
from posttrain.errors import UserError
from posttrain.memory import TrainingJob, find_shape
from posttrain.memory import plan as make_plan
from posttrain.memory.advice import largest_context, largest_model, savings, way_to_fit, with_every_switch
from posttrain.memory.cards import COMMON_CARDS, GB, as_text, free_memory, has_gpu, read_size
from posttrain.memory.choice import AUTOMATIC, Choice, choose, least, smallest_card
from posttrain.memory.job import loaded_dtype
from posttrain.memory.published import PublishedTerm, our_job, table
from posttrain.memory.speed import least_time

PROMPT = 512  # tokens, where nobody says

Yes = Annotated[bool | None, typer.Option()]
Tokens = Annotated[int | None, typer.Option(min=1)]


def plan(
    ctx: typer.Context,
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A YAML file, or the name of a packaged recipe.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of a recipe: a known name, a directory or config.json, or a name on the hub.")] = None,
    trainer: Annotated[str | None, typer.Option(help="Of a recipe: grpo, sft, dpo... Default: the one it has settings for.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a prompt with its completion.")] = None,
    prompt_length: Annotated[int | None, typer.Option(min=1, help=f"Tokens of the longest prompt. Default: {PROMPT}.")] = None,
    completion_length: Annotated[int | None, typer.Option(min=1, help="Tokens of the longest completion.")] = None,
    generations: Annotated[int | None, typer.Option(min=1, help="Completions of a prompt. Default: 8.")] = None,
    lora_r: Annotated[int | None, typer.Option(min=1, help="Rank of adapters on all linear layers. Default: every weight is trained.")] = None,
    load_in_4bit: Annotated[bool | None, typer.Option("--load-in-4bit", help="Frozen linear layers in NF4.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights that are not in 4 bits. Default: as trainers load them.")] = None,
    adapter_dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    optim: Annotated[str | None, typer.Option(help="As in the trainers' settings.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Default: where it does not fit without.")
    ] = None,
    offload: Annotated[
        bool | None, typer.Option("--offload/--no-offload", help="activation_offloading. Default: where it does not fit without.")
    ] = None,
    tiles: Annotated[str | None, typer.Option(help="tile_rows: a number, none, or auto, the default: where it does not fit without.")] = None,
    tokens_per_micro_batch: Annotated[
        int | None, typer.Option(min=1, help="max_tokens_per_micro_batch. Default: 4096, or less where that does not fit.")
    ] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="max_concurrent_completions. Default: 256, or less where that does not fit.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda, of a recipe the device that this machine would train on.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory that it should fit: 16GB, 15.5GiB. Default: what the GPU here has free; without one, a common card."
        ),
    ] = None,
    rates: Annotated[
        str | None, typer.Option(metavar="TFLOPS,GB/S", help="A card's peak rates, for the least time of a step: 65,320 for a T4.")
    ] = None,
    seeds_table: Annotated[bool, typer.Option("--seeds-table", help="Unsloth's published 510.8 against 54.33 GB, term by term, and ours.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every term in bytes.")] = False,
) -> None:
    """Memory of training and of sampling, what to change to make it fit, and how far a card reaches. A recipe's
    settings can follow."""
    given: dict[str, Any] = {
        "generations": generations,
        "lora_r": lora_r,
        "load_in_4bit": load_in_4bit,
        "dtype": dtype,
        "adapter_dtype": adapter_dtype,
        "optim": optim,
        "gradient_checkpointing": gradient_checkpointing,
        "activation_offloading": offload,
        "max_tokens_per_micro_batch": tokens_per_micro_batch,
        "max_concurrent_completions": concurrent,
        "device": device,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    with sentences():
        if tiles not in (None, "auto"):
            changes["tile_rows"] = _rows(str(tiles))
        if seeds_table:
            rows = table()
            say(json.dumps([vars(row) for row in rows]) if as_json else "\n".join(seeds_lines(rows)))
            return
        job, automatic, notes = _job(ctx, recipe, model, trainer, (context, prompt_length, completion_length), changes)
        limit = None if gpu is None else read_size(gpu)
        choice, cards, note = _choose(job, automatic, limit)
        notes += [note] if note else []
        answer = _as_json(choice, cards, notes, limit, rates) if as_json else None
        say(json.dumps(answer) if as_json else "\n".join(_lines(choice, cards, limit, rates, notes)))


def _rows(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--tiles {text}: use none, a number of rows, or auto")
    return int(text)


Lengths = tuple[int | None, int | None, int | None]  # context, prompt, completion
Cards = list[tuple[int, Choice]]  # sizes in GB, and what is chosen for each


def _choose(job: TrainingJob, automatic: tuple[str, ...], limit: int | None) -> tuple[Choice, Cards, str | None]:
    """The choice for the memory that was named or is found here; where there is neither, for the smallest common card
    that the job fits, with the choices for the others. The last: what was assumed."""
    host = free_memory("cpu") if job.device == "cuda" and has_gpu() and limit is None else None
    if limit is None:
        limit = free_memory(job.device) if job.device == "cpu" or has_gpu() else None
    if limit is not None or job.device == "cpu":
        return choose(job, automatic, limit, host), [], None
    size, choice = smallest_card(job, automatic)
    cards: Cards = []
    for one in (one for one in COMMON_CARDS if one >= size):
        on_it = choose(job, automatic, one * GB)
        if not cards or on_it.job != cards[-1][1].job:  # the sizes at which something changes
            cards.append((one, on_it))
    return (
        choice,
        cards,
        f"no GPU was found and --gpu is not given: planned for {size} GB, "
        + ("the smallest common card that it fits" if choice.fits else "the largest card there is here, which it does not fit"),
    )


Found = tuple[TrainingJob, tuple[str, ...], list[str]]  # every automatic switch off; what is automatic; what was assumed


def _job(ctx: typer.Context, recipe: str | None, model: str | None, trainer: str | None, lengths: Lengths, changes: dict[str, Any]) -> Found:
    if model is not None:
        settings = [recipe, *ctx.args] if recipe is not None else ctx.args
        if settings:
            raise UserError(f"{settings[0]} belongs to a plan of a recipe; leave it out, or leave out --model")
        prompt, completion = _lengths(lengths, None)
        shape = find_shape(model)
        autocast = "bfloat16" if changes.get("device") != "cpu" else None  # as trainers have it; a processor would mostly only emulate it
        computed: dict[str, Any] = {"bf16": autocast is not None, "dtype": loaded_dtype(shape.dtype, autocast, "lora_r" in changes)}
        return TrainingJob(shape, prompt, completion, **computed | changes), tuple(name for name in AUTOMATIC if name not in changes), []
    if recipe is None or recipe.startswith("-"):
        raise UserError("say what to plan: a recipe, or --model with a name, a directory or a config.json")
    return _job_of_recipe(recipe, overrides(ctx), trainer, lengths, changes)


def _job_of_recipe(recipe: str, settings: list[str], trainer: str | None, lengths: Lengths, changes: dict[str, Any]) -> Found:
    """With the longest rows of the data, where those can be read here and no lengths are given."""
    from posttrain.cli.build import read_args
    from posttrain.cli.fit import kind_named, weights_of
    from posttrain.cli.preview import kind_of_recipe
    from posttrain.cli.recipe import read_recipe
    from posttrain.trainers.core.switches import job_of

    read = read_recipe(recipe, settings)
    kind = kind_of_recipe(read, None) if trainer is None else kind_named(trainer)
    args = read_args(kind, read, default_output="runs/run")
    if changes.get("device", args.device.type) == "cuda" != args.device.type:  # this machine's precision says nothing of another one's
        asked = getattr(read, kind.section).get("bf16")
        args.bf16 = not args.fp16 if asked is None else bool(asked)
    found = measured(read, args) if lengths == (None, None, None) else None
    notes, total, vocab = [], None, None
    if found is not None:
        (prompt, completion, total), vocab = found
    elif kind.is_online:
        prompt, completion = _lengths(lengths, args.max_completion_length)
    else:  # the longest rows that are trained on, unless another length was asked for
        context, given_prompt, given_completion = lengths
        prompt, completion = _lengths((context or (None if given_completion else args.max_length), given_prompt, given_completion), None)
    if found is None and lengths == (None, None, None):
        notes.append(f"the data are not here: prompts of {prompt:,} tokens are assumed")
    job = job_of(args, weights_of(read.model, args, vocab), (prompt, completion, total), changes.get("device")).but(**changes)
    return job, tuple(name for name in args.automatic if name not in changes), notes


def _lengths(lengths: Lengths, completion: int | None) -> tuple[int, int]:
    """Prompt and completion, from two of three numbers; what nobody says is the recipe's `completion`, and a short
    prompt."""
    context, prompt, given = lengths
    if context is not None and prompt is not None and given is not None and context != prompt + given:
        raise UserError("--context is the sum of --prompt-length and --completion-length; give two of the three")
    if context is not None:
        if max(prompt or 0, given or 0) >= context:
            raise UserError(f"--context {context} leaves no room for both a prompt and a completion")
        prompt = prompt or (context - given if given is not None else min(PROMPT, context // 2))
        return prompt, context - prompt
    if given is None and completion is None:
        raise UserError("say how long completions get: --context or --completion-length")
    return prompt or PROMPT, given or completion or 1


def _as_json(choice: Choice, cards: Cards, notes: list[str], limit: int | None, rates: str | None) -> dict[str, Any]:
    job, found = choice.job, choice.plan
    answer = found.as_json() | {
        "model": job.shape.name,
        "parameters": job.shape.parameters,
        "prompt_length": job.prompt_length,
        "completion_length": job.completion_length,
        "generations": job.generations,
        "memory": choice.as_json() | {"assumed": notes, "cards": [{"gb": size} | one.as_json() for size, one in cards]},
        "savings": [{"setting": s.setting, "cost": s.cost, "training": s.saves_training, "rollout": s.saves_rollout} for s in savings(job)],
    }
    if rates is not None:
        answer["at_least"] = vars(least_time(job, *_rates(rates)))
    if limit is not None:
        way = None if found.peak <= limit else way_to_fit(job, limit)
        automatic, everything = least(choice.before, choice.open), with_every_switch(job)
        best, most = largest_model(automatic, limit), largest_model(everything, limit)
        answer |= {
            "limit": limit,
            "fits": found.peak <= limit,
            "to_fit": None if way is None else [saving.setting for saving in way],
            "peak_then": None if way is None else make_plan(way[-1].job).peak,
            "largest_context": largest_context(automatic, limit),
            "largest_context_with_every_switch": largest_context(everything, limit),
            "largest_model": None if best is None else best.name,
            "largest_model_with_every_switch": None if most is None else most.name,
        }
    return answer


def _rates(text: str) -> tuple[float, float]:
    try:
        tflops, bandwidth = map(float, text.split(","))
    except ValueError as error:
        raise UserError(f"--rates {text}: write two numbers, TFLOP/s and GB/s, as in 65,320") from error
    if not (0 < tflops < math.inf and 0 < bandwidth < math.inf):
        raise UserError(f"--rates {text}: both are above 0, TFLOP/s and GB/s, as in 65,320")
    return tflops, bandwidth


def _lines(choice: Choice, cards: Cards, limit: int | None, rates: str | None, notes: list[str]) -> list[str]:
    job, found = choice.job, choice.plan
    how = "every weight is trained" if job.lora_r is None else f"{'QLoRA' if job.load_in_4bit else 'LoRA'} of rank {job.lora_r}"
    tokens, targets = job.streams
    lines = [
        f"{job.shape.name}: {job.shape.parameters / 1e9:.2f} billion parameters; {how}; on {'a GPU' if job.device == 'cuda' else 'a CPU'}",
        f"prompts of {job.prompt_length:,} tokens, {job.generations} completions of {job.completion_length:,}; "
        f"micro-batches of {tokens:,} tokens, {targets:,} of them trained",
        "",
        f"{'':16}{'training':>12}" + (f"{'sampling':>12}" if job.is_online else ""),
    ]
    for name in dict.fromkeys([*found.training, *found.rollout]):
        sizes = [phase.get(name, 0) for phase in ([found.training, found.rollout] if job.is_online else [found.training])]
        if any(sizes):
            lines.append(f"{name:16}" + "".join(f"{as_text(size) if size else '-':>12}" for size in sizes))
    peaks = [found.train_peak, found.rollout_peak] if job.is_online else [found.train_peak]
    lines += [f"{'peak':16}" + "".join(f"{as_text(peak):>12}" for peak in peaks), ""]
    lines += [f"on the host: {name} {as_text(size)}" for name, size in found.host.items() if size]
    if rates is not None:
        least = least_time(job, *_rates(rates))
        lines.append(
            f"a step takes at least {least.update_seconds:,.1f} s to train and {least.rollout_seconds:,.1f} s to sample "
            "(a lower bound, at the card's full rates; expect several times that)"
        )
    lines += [*notes, f"memory: {choice.line()}"]
    lines += [f"  from {size:3} GB: {one.line()}" for size, one in cards]
    return [*lines, *(_what_helps(job) if limit is None else _on_a_card(choice, limit))]


def _what_helps(job: TrainingJob) -> list[str]:
    found = savings(job)
    if not found:
        return ["every switch that saves memory is on"]
    return ["what each switch alone would save:", *(_saving_line(s.setting, s.saves_training, s.saves_rollout, s.cost) for s in found)]


def _saving_line(setting: str, training: int, rollout: int, cost: str) -> str:
    saved = [f"{as_text(size)} of {phase}" for size, phase in ((training, "training"), (rollout, "sampling")) if size > 0]
    return f"  {setting:32}{', '.join(saved) or 'nothing yet':44}({cost})"


def _on_a_card(choice: Choice, limit: int) -> list[str]:
    job, found, everything = choice.job, choice.plan, with_every_switch(choice.job)
    lines = []
    if found.peak <= limit:
        lines.append(f"it fits {as_text(limit)}, with {as_text(limit - found.peak)} to spare")
    else:
        way = way_to_fit(job, limit)
        if way is None:
            lines.append(f"it does not fit {as_text(limit)} with any settings: {as_text(make_plan(everything).peak)} with every switch on")
        else:
            lines.append(f"it does not fit {as_text(limit)}; with these settings it needs {as_text(make_plan(way[-1].job).peak)}:")
            lines += [_saving_line(s.setting, s.saves_training, s.saves_rollout, s.cost) for s in way]
    for title, one in (("with what is automatic", least(choice.before, choice.open)), ("with every switch on", everything)):
        context, model = largest_context(one, limit), largest_model(one, limit)
        reach = "not even a short text" if context is None else f"at most {context:,} tokens of context"
        lines.append(f"{title}: {reach}; of the known models at most {'none' if model is None else model.name} at this length")
    return lines


def seeds_lines(rows: list[PublishedTerm]) -> list[str]:
    """The table of `memory/published.py` in Markdown."""
    lines = [
        "| term | standard: printed | computed | Unsloth: printed | computed | posttrain, GiB | what the computed figure is |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        kind = "**extrapolated**: " if row.is_extrapolated else ""
        lines.append(
            f"| {row.term} | {row.standard_printed:g} | {row.standard:.2f} | {row.frugal_printed:g} | {row.frugal:.2f} | {row.ours:.2f} | {kind}{row.formula} |"
        )
    job = our_job()
    return [
        *lines,
        "",
        f"posttrain: {job.prompt_length} + {job.completion_length:,} tokens, rank {job.lora_r}, every switch on, completions sampled one at a time.",
    ]


def measured(recipe: Recipe, args: Any) -> tuple[Any, int] | None:
    """`trainers.core.switches.longest` of the data, and the size of the vocabulary. None: data or tokenizer are not on
    this machine."""
    from posttrain.cli.build import fill, make_tokenizer
    from posttrain.data.mixture import load_data
    from posttrain.trainers.core.switches import longest

    sources = recipe.data.train if isinstance(recipe.data.train, list) else [recipe.data.train]
    places = [source.get("path") if isinstance(source, dict) else source for source in sources]
    names = [recipe.model.name] if recipe.model.from_scratch is None else []
    if recipe.data.streaming or not all(isinstance(place, str) and Path(place).exists() for place in [*places, *names]):
        return None
    raw = load_data(recipe.data.train or [])
    tokenizer = make_tokenizer(recipe.model, raw)
    return longest(args, fill(raw, recipe.data, tokenizer), tokenizer), len(tokenizer)
