"""Does the text keep to one language? Told by script (Latin, Han, Cyrillic ...), which is what mixing looks like in
practice.

It is not language identification: French passes for English. In exchange it needs no model, and short text and names do
no harm.
"""

from __future__ import annotations

import functools
import re
import unicodedata

from posttrain.errors import UserError, did_you_mean
from posttrain.rewards.reward import RewardFunction, reward

# The first word of a letter's Unicode name is its script.
SCRIPTS: dict[str, frozenset[str]] = {
    "ar": frozenset({"ARABIC"}),
    "el": frozenset({"GREEK"}),
    "he": frozenset({"HEBREW"}),
    "hi": frozenset({"DEVANAGARI"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
    "ko": frozenset({"HANGUL", "CJK"}),
    "ru": frozenset({"CYRILLIC"}),
    "th": frozenset({"THAI"}),
    "uk": frozenset({"CYRILLIC"}),
    "zh": frozenset({"CJK"}),
    **{code: frozenset({"LATIN"}) for code in ("cs", "de", "en", "es", "fr", "id", "it", "nl", "pl", "pt", "sv", "tr", "vi")},
}
_LETTERS = re.compile(r"[^\W\d_]+")
_SYMBOLS = frozenset({"GREEK"})  # alpha, pi: a lone Greek letter is mathematics


def language(code: str = "en") -> RewardFunction:
    """The fraction of words that are written in the language's script. A text without words earns 1."""
    if code not in SCRIPTS:
        raise UserError(f"language: there is no script for '{code}'; known are {', '.join(SCRIPTS)}.{did_you_mean(code, SCRIPTS)}")
    scripts = SCRIPTS[code]

    def score(completion: str) -> float:
        words = _LETTERS.findall(completion)
        return sum(_is_written_in(word, scripts) for word in words) / len(words) if words else 1.0

    return reward(name="language", range=(0.0, 1.0))(score)


def _is_written_in(word: str, scripts: frozenset[str]) -> bool:
    found = {script for letter in set(word) if (script := _script(letter)) is not None}
    return found <= scripts or (len(word) == 1 and found <= _SYMBOLS)


@functools.lru_cache(maxsize=65_536)
def _script(letter: str) -> str | None:
    """None for letters of no script: modifiers, letterlike and mathematical symbols."""
    first = unicodedata.name(letter, "").partition(" ")[0]
    return None if first in ("", "MODIFIER", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "MICRO", "FEMININE", "MASCULINE", "FULLWIDTH") else first
