"""What an online trainer hands to the recorder: the scored groups of all processes, and what an update saw at each
token."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from posttrain.losses.kl import k3
from posttrain.tracking.recorder import CompletionKey, Recorder
from posttrain.trainers.core.ranks import gather_json, world_size
from posttrain.trainers.online.rows import PolicyBatch, Row
from posttrain.types import Completion, Group, StopReason, Task


class RolloutRecord:
    """Numbers the groups of a step in the record, over all its rollouts."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._step, self._count = 0, 0

    def groups(self, step: int, groups: list[tuple[int, Group]], rows: list[Row], decode: Any, device: torch.device) -> None:
        """Record a rollout that `step` begins with, and tell its rows where they stand. Collective: every process calls
        it."""
        if step != self._step:
            self._step, self._count = step, 0
        offset = self._count
        advantages: dict[int, list[float]] = {}
        for row in rows:
            row.recorded_at, row.recorded_group = step, offset + row.group
            advantages.setdefault(row.group, []).append(row.advantage)
        collected = {number: (group, advantages[number], decode(group.completions[0].prompt_ids)) for number, group in groups}
        if world_size() > 1:
            parts = gather_json([[number, asdict(group), *rest] for number, (group, *rest) in collected.items()], device)
            collected = {number: (_group(held), shares, prompt) for part in parts for number, held, shares, prompt in part}
        ordered = [collected[number] for number in sorted(collected)]
        self._count += len(ordered)
        self.recorder.groups(step, [group for group, _, _ in ordered], [shares for _, shares, _ in ordered], [prompt for _, _, prompt in ordered])
        seen = {token for group, _, _ in ordered for completion in group.completions for token in completion.token_ids}
        self.recorder.name_tokens(step, seen, lambda token: text_of(token, decode))

    def tokens(self, step: int, batch: PolicyBatch, logps: torch.Tensor, entropy: torch.Tensor) -> None:
        """What the update of `step` saw, of the rows that the record wants. logps, entropy (B, T)."""
        for i, row in enumerate(batch.rows):
            key = CompletionKey(row.recorded_at, row.recorded_group, row.index)
            if self.recorder.wants_tokens(key):
                R = len(row.token_ids)
                self.recorder.tokens(
                    step,
                    key,
                    logps=logps[i, :R],
                    ratio=torch.ones(R) if batch.old_logps is None else (logps[i, :R] - batch.old_logps[i, :R]).exp(),
                    entropy=entropy[i, :R],
                    kl=None if batch.ref_logps is None else k3(logps[i, :R], batch.ref_logps[i, :R]),
                    advantage=row.token_advantages,
                )


def text_of(token: int, decode: Any) -> str:
    """What a token adds to a text. Said twice, since many tokenizers leave out a space at the beginning; U+FFFD is a
    part of a character."""
    once, twice = decode([token]), decode([token, token])
    return str(twice[len(once) :]) if twice.startswith(once) else str(once)


def _group(held: dict[str, Any]) -> Group:
    completions = [Completion(**completion | {"stop": StopReason(completion["stop"])}) for completion in held["completions"]]
    return Group(Task(**held["task"]), completions)
