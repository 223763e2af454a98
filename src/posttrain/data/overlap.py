"""Questions of an evaluation that training has shown: a model that knows them by heart is not better for it. Compares
prompts, no completions.

Equal means the same text or conversation. Normalised means that only letters, digits and what stands within numbers and
formulas count: case, spaces, punctuation and the system message do not. Paraphrases are not found.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posttrain.types import Prompt

_PUNCTUATION = re.compile(r"(?<!\d)[.,:;](?=\d)|[.,:;](?!\d)|[!?\"'`´‘’“”„«»…()\[\]{}_#~]")
_STAR = re.compile(r"\*\*+")  # markdown's bold


@dataclass(frozen=True)
class Overlap:
    """Numbers of evaluation questions that are in the training data too."""

    exact: list[int]
    normalised: list[int]  # those that are equal only after normalising


def overlap(train: Iterable[Prompt], asked: Sequence[Prompt]) -> Overlap:
    """Which prompts of `asked` occur in `train`. One pass over each; keeps those texts only."""
    exact, normalised = {_whole(prompt) for prompt in asked}, {normalise(prompt) for prompt in asked}
    seen_exact, seen_normalised = set(), set()
    for prompt in train:
        if (whole := _whole(prompt)) in exact:
            seen_exact.add(whole)
        if (plain := normalise(prompt)) in normalised:
            seen_normalised.add(plain)
    same = [number for number, prompt in enumerate(asked) if _whole(prompt) in seen_exact]
    like = [number for number, prompt in enumerate(asked) if normalise(prompt) in seen_normalised]
    return Overlap(same, sorted(set(like) - set(same)))


def normalise(prompt: Prompt) -> str:
    """What the users of a prompt say, without what writers vary: "What is 2 + 2 ?" and "what is 2+2" are one question,
    "1.5" and "15" are two."""
    texts = [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt if message["role"] != "system"]
    text = unicodedata.normalize("NFKC", "\n".join(texts)).casefold()
    return " ".join(re.sub(r"\s*([+*/=<>^%-])\s*", r"\1", _STAR.sub("", _PUNCTUATION.sub(" ", text))).split())


def _whole(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\0".join(f"{message['role']}\0{message['content']}" for message in prompt)
