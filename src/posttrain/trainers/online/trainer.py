"""Scored groups go in (from `rollouts`), micro-batches come out: `learn_from` makes rows with the algorithm's
advantages, `batches` cuts an update into micro-batches and weighs its rows over everything that it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.losses.policy import Objective, PolicyOptions, Terms, policy_terms
from posttrain.models.adapters import Reference, reference_for
from posttrain.trainers.core.base import MicroBatch
from posttrain.trainers.online.recording import RolloutRecord
from posttrain.trainers.online.rollouts import RolloutTrainer
from posttrain.trainers.online.rows import (
    GenerationBatch,
    PolicyBatch,
    PolicyUpdate,
    Row,
    Slice,
    gathered,
    places,
    policy_batches,
    rows_of,
    weighted_rows,
)
from posttrain.types import Completion, Group, Task

_NAMES = {"clip_ratio/low": "clip_ratio/low_mean", "clip_ratio/high": "clip_ratio/high_mean", "clip_ratio/region": "clip_ratio/region_mean"}


class OnlineTrainer(RolloutTrainer):
    """From scored groups to the rows of an update.

    An algorithm says `objective` and `loss`, and either `scores` and `advantages` or `set_advantages`. What it may say
    further: `is_trained`, `has_gradient`, `describe_update`.
    """

    objective: Objective  # how the algorithm turns log-probs into a loss, and what the loss is divided by
    options: PolicyOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As of RolloutTrainer."""
        super().__init__(*args, **kwargs)
        self.record = RolloutRecord(self.recorder)
        self.buffer: GenerationBatch | None = None
        self.reference: Reference | None = None  # None: nothing is compared with it

    # From groups to rows

    def learn_from(self, groups: list[tuple[int, Group]]) -> GenerationBatch:
        """A scored rollout as rows, with all that is frozen before the first update."""
        completions = [completion for _, group in groups for completion in group.completions]
        rows = rows_of(groups, self.is_trained)
        with self.metrics.timed("time/logps"):
            self.precompute_logps(rows)
        scores = self.scores(completions, rows)
        everyone, lengths = gathered(rows, scores, self.args.device)
        self.set_advantages(rows, completions, everyone, lengths)
        if self.args.on_policy:
            for row in rows:
                row.old_logps = None  # one update per rollout: the new ones, detached, so the ratio is exactly 1
        self.record.groups(self.state.global_step + 1, groups, rows, self.tokenizer.decode, self.args.device)
        return GenerationBatch(rows, lengths, slices=self.args.steps_per_generation)  # type: ignore[arg-type]

    def is_trained(self, completion: Completion) -> bool:
        """Whether the tokens of a completion are trained at all."""
        return True

    @property
    def needs_old_logps(self) -> bool:
        """Whether advantages are made with the log-probs of the policy that sampled; later updates need them in any
        case."""
        return False

    def scores(self, completions: list[Completion], rows: list[Row]) -> list[Any]:
        """What is compared between completions, as JSON, one for each row."""
        return [None] * len(rows)

    def set_advantages(self, rows: list[Row], completions: list[Completion], scores: list[Any], lengths: list[list[int]]) -> None:
        """The algorithm: the advantage of each row. scores: of all processes, in groups of the sizes of `lengths`.
        Collective."""
        by_row = zip(places(lengths), self.advantages(scores, [len(group) for group in lengths]).tolist(), strict=True)
        found = dict(by_row)
        for row in rows:
            row.advantage = found[row.group, row.index]

    def advantages(self, scores: list[Any], sizes: list[int]) -> torch.Tensor:
        """(B,) of the completions of all processes, in groups of `sizes`."""
        raise AssertionError(f"{type(self).__name__} does not say what it learns")

    def precompute_logps(self, rows: list[Row]) -> None:
        """Log-probs before the first update, without gradient: the reference's if there is one, and the policy's own
        where they are needed."""
        if self.reference is not None:
            with self.reference.active() as reference:
                for row, logps in zip(rows, self.evaluated_logps(rows, reference), strict=True):
                    row.ref_logps = logps
        if self.needs_old_logps or not self.args.on_policy:
            self.precompute_old_logps(rows)

    def precompute_old_logps(self, rows: list[Row]) -> None:
        for row, logps in zip(rows, self.evaluated_logps(rows, self.model_wrapped), strict=True):
            row.old_logps = logps

    def evaluated_logps(self, rows: list[Row], model: nn.Module) -> list[list[float]]:
        """Of every row's tokens at the temperature of sampling, without gradient."""
        values: dict[tuple[int, int], list[float]] = {}
        with self.evaluating(model) as module:
            for batch in self.micro_batches(rows):
                for row, line in zip(batch.rows, self.policy_logps(module, batch).tolist(), strict=True):
                    values[row.group, row.index] = line[: len(row.token_ids)]
        return [values[row.group, row.index] for row in rows]

    def policy_logps(self, model: nn.Module, batch: PolicyBatch) -> torch.Tensor:
        """(B, T) at the temperature of sampling."""
        return self.logprobs(model, batch.stream, self.sampling.temperature).logps

    # From rows to micro-batches

    def window(self, micro_steps: list[list[Task]]) -> list[MicroBatch]:
        self.move_reference()
        chosen = []
        for tasks in micro_steps:
            if tasks:
                self.buffer = self.learn_from(self.collect(tasks))
            assert self.buffer is not None, "a window starts with prompts or with a pending rollout"
            chosen.append(self.buffer.next_slice())
        return list(self.batches(chosen))

    def batches(self, chosen: list[Slice]) -> list[PolicyBatch]:
        """The micro-batches of an update that consists of these slices. A row whose gradient is exactly 0 is left out
        of the forward, never out of the counts."""
        num_tokens = sum(part.num_tokens for part in chosen)
        self.metrics.note("num_tokens", num_tokens, 0.0)
        weighted = weighted_rows(chosen, self.objective, max_completion_length=self.sampling.max_new_tokens)
        update = self.describe_update([row for row, _ in weighted], num_tokens)
        kept = [(row, weight) for row, weight in weighted if self.has_gradient(row)]
        return self.micro_batches([row for row, _ in kept], [weight for _, weight in kept], update)

    def describe_update(self, rows: list[Row], num_tokens: int) -> PolicyUpdate:
        """What all micro-batches of an update are told. rows: this process's; num_tokens: over all processes.
        Collective."""
        return PolicyUpdate(num_tokens)

    def has_gradient(self, row: Row) -> bool:
        return True

    def micro_batches(self, rows: list[Row], weights: list[float] | None = None, update: PolicyUpdate | None = None) -> list[PolicyBatch]:
        """weights: of each row in the update's sum; None: rows are only evaluated."""
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        given = [0.0] * len(rows) if weights is None else weights
        return policy_batches(rows, given, max_tokens=self.token_budget, device=self.args.device, dtype=dtype, update=update)

    # What losses are made of

    def terms(self, batch: PolicyBatch, logps: torch.Tensor, policy_mask: torch.Tensor | None = None) -> Terms:
        """The algorithm's objective at these log-probs, (B, T). policy_mask (B, T): tokens whose policy term counts
        (None: all)."""
        return policy_terms(
            logps,
            batch.old_logps,
            batch.advantages,
            batch.mask,
            objective=self.objective,
            options=self.options,
            ref_logps=batch.ref_logps,
            rollout_logps=batch.rollout_logps,
            policy_mask=policy_mask,
        )

    def weighted_sum(self, batch: PolicyBatch, per_token: torch.Tensor) -> torch.Tensor:
        """What a micro-batch adds to the update's loss, from the loss of each token, (B, T); processes average their
        gradients."""
        return (per_token * batch.weights[:, None]).sum() * self.args.world_size

    def known_policy_grad(self, batch: PolicyBatch) -> torch.Tensor | None:
        """`known_grad` of the objective. None where log-probs are compared with frozen ones."""
        if batch.old_logps is not None:
            return None
        return self.known_grad(batch.stream.shape, lambda logps: self.weighted_sum(batch, self.terms(batch, logps).per_token))

    # A reference that moves

    def use_reference(self, *, needed: bool) -> None:
        """Take the policy as it is now for reference: its adapters off, or a frozen copy."""
        if self.args.sync_ref_model and type(self.model).__module__.startswith("peft."):
            raise UserError(
                "sync_ref_model: with LoRA the reference is the model without its adapter, which cannot move; train without LoRA, or leave it out"
            )
        self.reference = reference_for(self.model, needed)

    def move_reference(self) -> None:
        """Once per optimizer step: a synced reference follows when it is due."""
        step = self.state.global_step
        if self.args.sync_ref_model and self.reference is not None and step and step % self.args.ref_model_sync_steps == 0:
            self.reference.sync(self.accelerator.unwrap_model(self.model_wrapped), self.args.ref_model_mixup_alpha)

    def save_tensors(self, directory: Path) -> None:
        if self.args.sync_ref_model and self.reference is not None:
            self.reference.save(directory / "reference.safetensors")

    def load_tensors(self, directory: Path) -> None:
        if self.args.sync_ref_model and self.reference is not None:
            self.reference.load(directory / "reference.safetensors")

    # Metrics

    def note_update(self, batch: PolicyBatch, logps: torch.Tensor, entropy: torch.Tensor, terms: Terms) -> None:
        """What an update saw of a micro-batch. logps, entropy (B, T)."""
        logps, entropy, count = logps.detach(), entropy.detach(), batch.mask.sum()
        self.metrics.note("entropy", (entropy * batch.mask).sum(), count)
        for name, tally in terms.metrics.items():
            self.metrics.note(_NAMES.get(name, name), tally.total, tally.count)
        for name, kind in (("clip_ratio/low", "min"), ("clip_ratio/high", "max")):  # of a completion
            if name in terms.metrics:
                value = terms.metrics[name].row_min if kind == "min" else terms.metrics[name].row_max
                self.metrics.note_extreme(f"{name}_{kind}", kind, value)
        if self.args.on_policy:  # the policy is still the one that sampled, so engine and trainer must agree on every log-prob
            gap = (logps - batch.rollout_logps).abs() * batch.mask
            self.metrics.note("sampling/logp_difference/mean", gap.sum(), count)
            self.metrics.note_extreme("sampling/logp_difference/max", "max", gap.max() if gap.numel() else 0.0)
        self.record.tokens(self.state.global_step + 1, batch, logps, entropy)

    # Resuming in the middle of a rollout that is still being trained on

    def state_to_resume(self) -> dict[str, Any]:
        pending = self.buffer is not None and self.buffer.used < self.buffer.slices * self.args.num_iterations
        return {"rollout": self.buffer.to_json() if pending and self.buffer is not None else None}

    def load_state_to_resume(self, state: dict[str, Any]) -> None:
        self.buffer = GenerationBatch.from_json(state["rollout"]) if state["rollout"] else None

    def plan(self) -> str:
        args = self.args
        rollout = f"{args.prompts_per_generation} prompts x {args.num_generations} completions per rollout"
        updates = args.updates_per_rollout
        tokens = args.prompts_per_generation * (max(map(len, self.prompt_ids)) + args.num_generations * self.sampling.max_new_tokens)
        return (
            f"{rollout} = {args.generation_batch_size} · {updates:g} update{'s' if updates != 1 else ''} per rollout · "
            f"at most {tokens:,} tokens, {-(-tokens // args.token_budget)} micro-batches of {args.token_budget:,} · {self.state.max_steps or args.max_steps} steps · "
            f"{'no reward' if self.rubric is None else f'reward {self.rubric.span()}'}"
        )
