"""What TRL has about the form of data and the library does under another name."""

from __future__ import annotations

from typing import Any


def is_conversational_from_value(example: dict[str, Any]) -> bool:
    """Whether a row is a conversation of ShareGPT's kind: `conversations` with `from` and `value` (SFT converts them by
    itself)."""
    turns = example.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and {"from", "value"} <= turns[0].keys()
