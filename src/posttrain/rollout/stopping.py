"""When a completion ends. One pure function for every engine, so that STOP and LENGTH mean the same everywhere.

The tokens are the truth: a stop string ends a completion with the token whose text completes it, and no token is cut or
re-encoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from posttrain.errors import UserError
from posttrain.types import Sampling, StopReason

# A stop string of n bytes spans at most n tokens that show text; these many more may show none (special or incomplete
# ones).
_SILENT_TOKENS = 8


def stop_reason(token_ids: Sequence[int], sampling: Sampling, tokenizer: Any) -> StopReason | None:
    """Why the completion ends with its last token, or None if it goes on. Call it once per new token. STOP wins over
    LENGTH."""
    if token_ids[-1] in sampling.stop_token_ids:
        return StopReason.STOP
    if sampling.stop_strings and _reaches(token_ids, sampling.stop_strings, tokenizer):
        return StopReason.STOP
    return StopReason.LENGTH if len(token_ids) >= sampling.max_new_tokens else None


def _reaches(token_ids: Sequence[int], stop_strings: tuple[str, ...], tokenizer: Any) -> bool:
    """Whether the text of the last tokens holds a stop string: only so many are decoded as the longest of them can
    span."""
    span = max(len(string.encode()) for string in stop_strings) + _SILENT_TOKENS
    tail = tokenizer.decode(token_ids[-span:], skip_special_tokens=False)
    return any(string in tail for string in stop_strings)


def check_sampling(sampling: Sampling, tokenizer: Any) -> None:
    """Refuse, in a sentence, settings that no engine can draw from."""
    wrong = [
        (sampling.max_new_tokens < 1, f"max_new_tokens is {sampling.max_new_tokens}; a completion has at least 1 token"),
        (not 0 <= sampling.temperature < math.inf, f"temperature is {sampling.temperature}; it must be a finite number, 0 (greedy) or more"),
        (sampling.top_k < 0, f"top_k is {sampling.top_k}; it must be 0 (off) or more"),
        (not 0 < sampling.top_p <= 1, f"top_p is {sampling.top_p}; it must be above 0 and at most 1 (off)"),
        (sampling.min_p is not None and not 0 <= sampling.min_p <= 1, f"min_p is {sampling.min_p}; it must lie between 0 and 1, or be None (off)"),
        ("" in sampling.stop_strings, "a stop string is empty: every completion would end with its first token; remove it"),
        (
            bool(sampling.stop_strings) and tokenizer is None,
            "stop_strings need a tokenizer to read the text: give the engine one, or use stop_token_ids",
        ),
    ]
    for is_wrong, sentence in wrong:
        if is_wrong:
            raise UserError(sentence)
