"""Who decodes next. Plain Python, no tensors: rows and prompts have slots, and the active ones are always slots 0..A-1.

A finished row's slot is filled by the last active row, so a view of the first A slots holds exactly the work to be
done. KV tokens are reserved for a row's worst case when it is admitted: nothing that was admitted is ever evicted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from posttrain.errors import UserError
from posttrain.types import Request

Move = tuple[int, int, int]  # (from slot, to slot, cached tokens): the keys and values of what changed its slot must follow


@dataclass(eq=False)
class Prompt:
    """A prompt in the cache, shared by every row that continues it."""

    token_ids: tuple[int, ...]
    slot: int
    users: int = 0  # active rows
    next_logits: Any = None  # (V,) tensor after the last prompt token: where its rows draw their first token from

    @property
    def cached(self) -> int:
        return len(self.token_ids)


@dataclass(eq=False)
class DecodingRow:
    """One completion in the making."""

    request: Request
    prompt: Prompt
    slot: int
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    sampled_logps: list[float] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens after the prompt whose keys and values are stored: all but the newest, which the next step feeds."""
        return len(self.token_ids) - 1

    @property
    def reserved(self) -> int:
        return self.request.sampling.max_new_tokens


class _Slotted(Protocol):
    slot: int

    @property
    def cached(self) -> int: ...


S = TypeVar("S", bound=_Slotted)


def _vacate(items: list[S], slot: int) -> list[Move]:
    """Remove items[slot]; the last item takes its place."""
    last = items.pop()
    if slot == len(items):
        return []
    items[slot] = last
    move = (last.slot, slot, last.cached)
    last.slot = slot
    return [move]


class Scheduler:
    """Admits requests strictly in order of submission, as far as slots and KV tokens reach."""

    def __init__(self, max_slots: int, max_kv_tokens: int | None):
        self.max_slots = max_slots
        self.max_kv_tokens = max_kv_tokens
        self.waiting: deque[Request] = deque()
        self.rows: list[DecodingRow] = []  # rows[i].slot == i
        self.prompts: list[Prompt] = []  # prompts[i].slot == i
        self.reserved = 0  # KV tokens promised: each prompt once, each row at its longest
        self._prompt_of: dict[tuple[int, ...], Prompt] = {}

    def submit(self, request: Request) -> None:
        needed = len(request.prompt_ids) + request.sampling.max_new_tokens
        if self.max_kv_tokens is not None and needed > self.max_kv_tokens:
            raise UserError(
                f"request {request.id} may need {needed} cached tokens ({len(request.prompt_ids)} of the prompt and max_new_tokens="
                f"{request.sampling.max_new_tokens}), but max_kv_tokens is {self.max_kv_tokens}; raise it, or shorten prompt or completion"
            )
        self.waiting.append(request)

    def admit(self) -> tuple[list[DecodingRow], list[Prompt]]:
        """The rows that start now, and those of their prompts that are not in the cache yet."""
        new_rows: list[DecodingRow] = []
        new_prompts: list[Prompt] = []
        while self.waiting and len(self.rows) < self.max_slots:
            request = self.waiting[0]
            prompt = self._prompt_of.get(request.prompt_ids)
            cost = request.sampling.max_new_tokens + (len(request.prompt_ids) if prompt is None else 0)
            if self.max_kv_tokens is not None and self.reserved + cost > self.max_kv_tokens:
                break
            self.waiting.popleft()
            self.reserved += cost
            if prompt is None:
                prompt = self._prompt_of[request.prompt_ids] = Prompt(request.prompt_ids, slot=len(self.prompts))
                self.prompts.append(prompt)
                new_prompts.append(prompt)
            prompt.users += 1
            new_rows.append(DecodingRow(request, prompt, slot=len(self.rows)))
            self.rows.append(new_rows[-1])
        return new_rows, new_prompts

    def finish(self, row: DecodingRow) -> tuple[list[Move], list[Move]]:
        """Free the row's slot, and its prompt's after its last row: (moves among rows, moves among prompts), at most
        one each."""
        self.reserved -= row.reserved
        row_moves = _vacate(self.rows, row.slot)
        prompt = row.prompt
        prompt.users -= 1
        if prompt.users:
            return row_moves, []
        self.reserved -= len(prompt.token_ids)
        del self._prompt_of[prompt.token_ids]
        return row_moves, _vacate(self.prompts, prompt.slot)
