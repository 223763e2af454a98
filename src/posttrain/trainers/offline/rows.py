"""A row of the data as the trainers on given completions keep it: token ids, without padding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EncodedRow:
    """A prompt with its completions as token ids. A completion ends with a stop token unless it was truncated."""

    prompt_ids: list[int]
    completions: list[list[int]]
    is_good: bool = True  # KTO's label
    ref_logps: list[float] | None = None  # the reference's log-prob of each completion, summed. None: not computed ahead
