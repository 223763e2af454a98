"""Memory switches that nobody has set: of all sets of them, the one that costs least time among those with which the
job fits.

Only switches that leave the result as it is, up to rounding, are chosen here. What is coarser (8-bit optimizers,
adapters in bfloat16) or trains something else (LoRA, 4-bit weights) is advised (`advice.py`) and left to the user.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.memory.cards import COMMON_CARDS, GB, as_text
from posttrain.memory.estimate import Plan, plan
from posttrain.memory.job import TrainingJob
from posttrain.memory.speed import update_flops
from posttrain.sizes import AUTO_TILE_ROWS, MICRO_BATCH_TOKENS

# Settings of the trainers that are chosen where the user says nothing. Those of training; and those of sampling.
TRAINING = ("gradient_checkpointing", "activation_offloading", "tile_rows", "max_tokens_per_micro_batch")
SAMPLING = ("max_concurrent_completions",)
AUTOMATIC = TRAINING + SAMPLING
HEADROOM = 0.05  # of the memory, left for an allocator's rounding and gaps and for the error of a plan (docs/plan.md)
HOST_FRACTION = 0.8  # of the host's free memory, for offloaded checkpoints
# Time of an update with the switch, relative to without it, beside its arithmetic (`speed.py`).
# benchmarks/results/memory.json, on a CPU: 1.31 / 1.19 and 1.52 / 1.19 beside gradient checkpointing, the copies of a
# CPU standing in for those of a GPU.
OFFLOAD_TIME, TILES_TIME = 1.10, 1.28
HALVING_TIME = 1.02  # assumed of micro-batches of half the size: more launches, and the weights are read once more


@dataclass(frozen=True)
class Choice:
    """What was chosen, for how much memory."""

    before: TrainingJob  # every switch that was open is off
    job: TrainingJob
    open: tuple[str, ...]  # settings that nobody had set
    limit: int | None  # bytes; None: not known, so nothing was switched on
    host_limit: int | None = None  # None: not known

    @property
    def settings(self) -> dict[str, Any]:
        """What was switched on, as the trainers' settings."""
        return {name: getattr(self.job, name) for name in self.open if getattr(self.job, name) != getattr(self.before, name)}

    @property
    def plan(self) -> Plan:
        return plan(self.job)

    @property
    def fits(self) -> bool:
        return self.limit is None or self.plan.peak <= self.limit

    @property
    def update_time(self) -> float:
        """Of an update, relative to one with every open switch off. An estimate."""
        return update_time(self.job) / update_time(self.before)

    @property
    def rounds(self) -> int:
        """Of sampling: how often completions wait for others to end before they are begun."""
        return -(-self.job.rows // min(self.job.max_concurrent_completions, self.job.rows))

    def switches(self) -> str:
        """In words: "gradient checkpointing + tiles of 2,048 rows"; "no switches"."""
        chosen, at_once = self.settings, self.job.max_concurrent_completions
        words = {
            "gradient_checkpointing": "gradient checkpointing",
            "activation_offloading": "activation offloading",
            "tile_rows": f"tiles of {self.job.tile_rows or 0:,} rows",
            "max_tokens_per_micro_batch": f"micro-batches of {self.job.max_tokens_per_micro_batch or 0:,} tokens",
            "max_concurrent_completions": "one completion at once" if at_once == 1 else f"{at_once:,} completions at once",
        }
        return " + ".join(words[name] for name in chosen) or "no switches"

    def line(self) -> str:
        """All of it: what was chosen, the bytes it leads to, and what it costs."""
        found, costs = self.plan, []
        if self.update_time > 1.005:
            costs.append(f"an update takes about {self.update_time:.1f} times as long")
        if "max_concurrent_completions" in self.settings:
            costs.append(f"sampling goes in {self.rounds} rounds")
        room = "" if self.limit is None else f" of {as_text(self.limit)}"
        phases = f"training {as_text(found.train_peak)}" + (f", sampling {as_text(found.rollout_peak)}" if self.job.is_online else "")
        return f"{self.switches()}; about {as_text(found.peak)}{room} ({phases})" + (f"; {' and '.join(costs)}" if costs else "")

    def as_json(self) -> dict[str, Any]:
        """Under names that stay."""
        return {
            "settings": self.settings,
            "automatic": list(self.open),
            "limit": self.limit,
            "train_peak": self.plan.train_peak,
            "rollout_peak": self.plan.rollout_peak,
            "fits": self.fits,
            "update_time": round(self.update_time, 3),
            "sampling_rounds": self.rounds,
        }


def choose(job: TrainingJob, open_settings: Iterable[str], limit: int | None, host_limit: int | None = None) -> Choice:
    """The cheapest set of the open switches with which `job`, which has all of them off, fits; if there is none, the
    set that needs least.

    limit, host_limit: free bytes of the device and of the host. None: not known; of the device, nothing is switched on
    then.
    """
    given = tuple(name for name in AUTOMATIC if name in set(open_settings) and (job.is_online or name not in SAMPLING))
    if limit is None:
        return Choice(job, job, given, None, host_limit)
    target = int(limit * (1 - HEADROOM))
    most_host = None if host_limit is None else int(host_limit * HOST_FRACTION)
    best, least = job, None
    for candidate in _by_cost(job, given, most_host):
        peak = plan(candidate).train_peak
        if least is None or peak < least:
            best, least = candidate, peak
        if peak <= target:
            best = candidate
            break
    if "max_concurrent_completions" in given:
        best = _fewer_at_once(best, target)
    return Choice(job, best, given, limit, host_limit)


def least(job: TrainingJob, open_settings: Iterable[str]) -> TrainingJob:
    """With every open switch on, whatever it costs."""
    return choose(job, open_settings, 0).job


def smallest_card(job: TrainingJob, open_settings: Iterable[str]) -> tuple[int, Choice]:
    """The smallest common card, in GB, that the job fits, and the choice for it; the largest card where it fits
    none."""
    names = tuple(open_settings)
    for size in COMMON_CARDS:
        choice = choose(job, names, size * GB)
        if choice.plan.peak <= size * GB * (1 - HEADROOM):
            break
    return size, choice


def update_time(job: TrainingJob) -> float:
    """In units of its arithmetic, with what switches cost beside that."""
    time = update_flops(job)
    if job.activation_offloading and job.device != "cpu":
        time *= OFFLOAD_TIME
    if job.tile_rows is not None and job.tile_rows < job.streams[0]:
        time *= TILES_TIME
    default = max(MICRO_BATCH_TOKENS, job.context)
    budget = max(job.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS, job.context)
    while budget < default:
        budget, time = budget * 2, time * HALVING_TIME
    return time


def _by_cost(job: TrainingJob, names: tuple[str, ...], most_host: int | None) -> Iterator[TrainingJob]:
    """Every set of the open switches of training, the cheapest first."""
    checkpointing = [job.gradient_checkpointing, True] if "gradient_checkpointing" in names else [job.gradient_checkpointing]
    offloading = [job.activation_offloading, True] if "activation_offloading" in names and job.device != "cpu" else [job.activation_offloading]
    tiles = [job.tile_rows, AUTO_TILE_ROWS] if "tile_rows" in names else [job.tile_rows]
    budgets = list(_budgets(job)) if "max_tokens_per_micro_batch" in names else [job.max_tokens_per_micro_batch]
    sets = [
        job.but(gradient_checkpointing=checkpoints, activation_offloading=offload, tile_rows=rows, max_tokens_per_micro_batch=budget)
        for checkpoints, offload, rows, budget in itertools.product(checkpointing, offloading, tiles, budgets)
        if checkpoints or offload == job.activation_offloading  # without checkpoints everything would go to the host and back
    ]
    for candidate in sorted(dict.fromkeys(sets), key=update_time):
        has_room = most_host is None or candidate.activation_offloading == job.activation_offloading
        if has_room or plan(candidate).host["checkpoints_host"] <= (most_host or 0):
            yield candidate


def _budgets(job: TrainingJob) -> Iterator[int | None]:
    """Tokens of a micro-batch: as they are, and halved down to the longest single row."""
    yield job.max_tokens_per_micro_batch
    budget = job.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS
    while budget > job.context:
        budget = max(budget // 2, job.context)
        yield budget


def _fewer_at_once(job: TrainingJob, target: int) -> TrainingJob:
    """As many completions at once as sampling has room for; at least one."""
    rows = min(job.max_concurrent_completions, job.rows)
    if plan(job).rollout_peak <= target:
        return job
    while rows > 1:
        rows = 1 << ((rows - 1).bit_length() - 1)  # the next smaller power of two, as the cache makes room
        job = job.but(max_concurrent_completions=rows)
        if plan(job).rollout_peak <= target:
            break
    return job
