"""What to change so that a job fits: each switch with what it saves, the cheapest set that is enough, and how far a
card reaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.errors import UserError
from posttrain.memory.cards import as_text
from posttrain.memory.estimate import Plan, always_there, plan
from posttrain.memory.job import TrainingJob
from posttrain.memory.known import KNOWN
from posttrain.memory.shapes import Shape, shape_of
from posttrain.sizes import AUTO_TILE_ROWS, MICRO_BATCH_TOKENS

TOLERANCE = 0.1  # of a prediction (docs/plan.md): what is more than that above the limit is refused
LONGEST = 2**22  # tokens; nothing is asked about longer texts
STEP = 64  # tokens between two contexts that are tried


@dataclass(frozen=True)
class Switch:
    """One setting that saves memory."""

    setting: str  # as one writes it
    cost: str
    changed: Callable[[TrainingJob], TrainingJob | None]  # None: it is on, or has no meaning here


@dataclass(frozen=True)
class Saving:
    """A switch and the peaks of the job with it, and with those before it in the list."""

    setting: str
    cost: str
    saves_training: int
    saves_rollout: int
    job: TrainingJob


def _with_budget(job: TrainingJob) -> TrainingJob | None:
    """Micro-batches of the longest row."""
    budget = job.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS
    return None if budget <= job.context or job.streams[0] <= job.context else job.but(max_tokens_per_micro_batch=job.context)


def _with_fewer_completions(job: TrainingJob) -> TrainingJob | None:
    """Half as many at a time; as few as sampling needs to take no more than training."""
    rows = min(job.max_concurrent_completions, job.rows)
    if not job.is_online or rows == 1:
        return None
    limit = plan(job).train_peak
    fewer = job
    while rows > 1:
        rows //= 2
        fewer = job.but(max_concurrent_completions=rows)
        if plan(fewer).rollout_peak <= limit:
            break
    return fewer


SWITCHES = (
    Switch(
        "gradient_checkpointing=true", "one more forward", lambda job: None if job.gradient_checkpointing else job.but(gradient_checkpointing=True)
    ),
    Switch("max_tokens_per_micro_batch={0.max_tokens_per_micro_batch}", "smaller micro-batches", _with_budget),
    Switch(f"tile_rows={AUTO_TILE_ROWS}", "slower", lambda job: None if job.tile_rows else job.but(tile_rows=AUTO_TILE_ROWS)),
    Switch(
        "activation_offloading=true",
        "host memory",
        lambda job: (
            None if job.activation_offloading or job.device == "cpu" or not job.gradient_checkpointing else job.but(activation_offloading=True)
        ),
    ),
    Switch("max_concurrent_completions={0.max_concurrent_completions}", "completions wait for each other", _with_fewer_completions),
    Switch(
        "optim=adamw_8bit",
        "a coarser optimizer state",
        lambda job: None if "8bit" in job.optim or job.device == "cpu" else job.but(optim="adamw_8bit"),
    ),
    Switch(
        "adapter_dtype=bfloat16",
        "small updates may round away",
        lambda job: None if job.lora_r is None or job.adapter_dtype == "bfloat16" else job.but(adapter_dtype="bfloat16"),
    ),
    Switch("model.lora.r=32", "only adapters learn", lambda job: None if job.lora_r else job.but(lora_r=32, has_reference=False)),
    Switch(
        "model.dtype=bfloat16",
        "frozen weights in 16 bits",
        lambda job: None if job.lora_r is None or job.dtype != "float32" or not job.bf16 else job.but(dtype="bfloat16"),
    ),
    Switch(
        "model.load_in_4bit=true",
        "slower, and a little less exact",
        lambda job: None if job.lora_r is None or job.load_in_4bit else job.but(load_in_4bit=True),
    ),
)


def savings(job: TrainingJob) -> list[Saving]:
    """Every switch alone, the cheapest for the user first."""
    before = plan(job)
    found = []
    for switch in SWITCHES:
        changed = switch.changed(job)
        if changed is not None:
            found.append(_saving(switch, before, plan(changed)))
    return [saving for saving in found if saving.saves_training > 0 or saving.saves_rollout > 0]


def way_to_fit(job: TrainingJob, limit: int) -> list[Saving] | None:
    """Switches, one after another, with which the job fits; those that turn out not to be needed are left out, the
    costliest first. None: there is no way."""
    chosen: list[Switch] = []
    for switch in SWITCHES:
        if plan(_all(job, chosen)).peak <= limit:
            break
        if switch.changed(_all(job, chosen)) is not None:
            chosen.append(switch)
    if plan(_all(job, chosen)).peak > limit:
        return None
    for switch in reversed(chosen.copy()):
        fewer = [other for other in chosen if other is not switch]
        if plan(_all(job, fewer)).peak <= limit:
            chosen = fewer
    found = []
    for switch in chosen:
        changed = switch.changed(job)
        assert changed is not None
        found.append(_saving(switch, plan(job), plan(changed)))
        job = changed
    return found


def with_every_switch(job: TrainingJob) -> TrainingJob:
    """All that can be done about memory without another model or other texts."""
    return _all(job, list(SWITCHES))


def _all(job: TrainingJob, switches: list[Switch]) -> TrainingJob:
    for switch in switches:
        job = switch.changed(job) or job
    return job


def _saving(switch: Switch, before: Plan, after: Plan) -> Saving:
    return Saving(
        switch.setting.format(after.job), switch.cost, before.train_peak - after.train_peak, before.rollout_peak - after.rollout_peak, after.job
    )


def largest_context(job: TrainingJob, limit: int) -> int | None:
    """Tokens of the longest row that fits, prompts as they are and completions longer or shorter. None: not even a
    short one fits."""

    def fits(tokens: int) -> bool:
        prompt = min(job.prompt_length, tokens // 2)
        return plan(job.but(prompt_length=prompt, completion_length=tokens - prompt)).peak <= limit

    low, high = 0, LONGEST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle - 1)
    return low * STEP or None


def largest_model(job: TrainingJob, limit: int) -> Shape | None:
    """Of the known models, the one with most parameters that fits in the place of this one. None: none does."""
    for shape in sorted((shape_of(config, name) for name, config in KNOWN.items()), key=lambda shape: -shape.parameters):
        one = job.but(shape=shape)
        if sum(always_there(one).values()) <= limit and plan(one).peak <= limit:
            return shape
    return None


def refuse_what_cannot_fit(job: TrainingJob, free: int, where: str) -> str | None:
    """A sentence where it is too close to tell, None where the job fits. Raises UserError, with the fix, where it
    cannot fit.

    free: bytes; where: what has them, as in "the GPU".
    """
    missing = shortfall(job, free, where)
    if missing is None or plan(job).peak * (1 - TOLERANCE) <= free:
        return missing
    raise UserError(f"{missing}. `posttrain plan` shows the terms; memory_check=false starts all the same")


def shortfall(job: TrainingJob, free: int, where: str) -> str | None:
    """What the job needs beyond what there is, and the settings that help, in a sentence. None: it fits."""
    needed = plan(job)
    if needed.peak <= free:
        return None
    phase = "training" if needed.train_peak >= needed.rollout_peak else "sampling"
    what = f"{phase} needs about {as_text(needed.peak)} and {where} has {as_text(free)} free"
    if needed.peak * (1 - TOLERANCE) <= free:
        return f"{what}: it may just fit"
    way = way_to_fit(job, free)
    if way is None:
        shorter = largest_context(with_every_switch(job), free)
        fix = "no setting is enough: take a smaller model" + ("" if shorter is None else f", or at most {shorter:,} tokens with every switch on")
    else:
        fix = f"set {', '.join(saving.setting for saving in way)}, which needs {as_text(plan(way[-1].job).peak)}"
    return f"{what}; {fix}"
