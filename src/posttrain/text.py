"""Text that comes from models and their tools: made fit for encoders."""

from __future__ import annotations


def encodable(text: str) -> str:
    """Lone surrogates, which UTF-8 and so no tokenizer can hold, become question marks; everything else is kept as it is."""
    return text.encode("utf-8", "replace").decode("utf-8")
