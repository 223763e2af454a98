"""A completion as coloured pieces of text: one for each token, tinted by what an update saw there.

A tint is a colour with an opacity, so that it works on white and on black. Texts stay texts: whoever shows a piece must
not read it as markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.characters import shown
from posttrain.tracking.browse import Trust
from posttrain.watch.story import ToldCompletion

LIMIT = 1500  # pieces that are shown of one completion
MAX_CHARS = 6000  # characters of one without tokens


@dataclass(frozen=True)
class ColouredToken:
    text: str
    tint: str  # a CSS colour; empty: none
    title: str  # the numbers of this token
    is_given: bool = False  # by an environment: the policy did not write it


@dataclass(frozen=True)
class Mode:
    label: str
    legend: str
    tint: Callable[[float], str]


def _tint(rgb: str, strength: float) -> str:
    return f"rgba({rgb},{0.85 * min(max(strength, 0.0), 1.0):.2f})" if strength > 0.02 else ""


_UP, _DOWN, _PLAIN = "19,154,116", "217,98,43", "139,114,214"


def _diverging(full: float) -> Callable[[float], str]:
    return lambda value: _tint(_UP if value > 0 else _DOWN, abs(value) / full)


MODES = {
    "advantage": Mode("advantage", "green: made likelier · orange: made less likely", _diverging(2.0)),
    "ratio": Mode(
        "ratio",
        "new probability over old · green: above 1 · orange: below 1, full at a factor of 1.3",
        lambda value: _diverging(math.log(1.3))(math.log(max(value, 1e-9))),
    ),
    "log-prob": Mode("log-prob", "how unlikely the token was when it was drawn · full at -4 nats", lambda value: _tint(_PLAIN, -value / 4.0)),
    "entropy": Mode("entropy", "how open the choice was at this place · full at 2.5 nats", lambda value: _tint(_PLAIN, value / 2.5)),
    "KL": Mode("KL", "distance from the reference at this token · full at 0.5 nats", lambda value: _tint(_PLAIN, value / 0.5)),
}


def values(completion: ToldCompletion, mode: str, update: int = -1) -> list[float] | None:
    """One number a token, of the update at place `update`. None: it was not kept, or there is no such number."""
    tokens = completion.tokens
    if tokens is None:
        return None
    if mode == "log-prob":
        return tokens.logps
    seen = tokens.updates[max(update, -len(tokens.updates))] if tokens.updates else None
    if mode == "advantage":
        own = seen.advantage if seen is not None else None
        return own if own is not None else [completion.row.advantage] * len(tokens.token_ids)
    if seen is None:
        return None
    return {"ratio": seen.ratio, "entropy": seen.entropy, "KL": seen.kl}[mode]


def pieces(completion: ToldCompletion, mode: str, vocabulary: dict[int, str], trust: Trust, update: int = -1) -> list[ColouredToken]:
    """The whole completion where its tokens cannot be told: then it has one tint, or none."""
    tokens = completion.tokens
    if tokens is None or not vocabulary:
        tint = MODES[mode].tint(completion.row.advantage) if mode == "advantage" else ""
        return [ColouredToken(shown(completion.row.text[:MAX_CHARS]), tint, ""), *_more(len(completion.row.text) - MAX_CHARS, "characters")]
    numbers = values(completion, mode, update)
    given = _given(completion, len(tokens.token_ids))
    columns = {name: values(completion, name, update) for name in MODES}
    made = []
    for place, token in enumerate(tokens.token_ids[:LIMIT]):
        text = shown(vocabulary.get(token, f"⟨{token}⟩"))
        tint = "" if numbers is None or given[place] or not math.isfinite(numbers[place]) else MODES[mode].tint(numbers[place])
        made.append(ColouredToken(text.replace("\n", "↵\n"), tint, _title(token, place, columns, given[place], trust), given[place]))
    return made + _more(len(tokens.token_ids) - LIMIT, "tokens")


def _more(count: int, what: str) -> list[ColouredToken]:
    return [ColouredToken(f" … {count:,} more {what}", "", "")] if count > 0 else []


def _title(token: int, place: int, columns: dict[str, list[float] | None], is_given: bool, trust: Trust) -> str:
    if is_given:
        return f"token {place}, id {token}: given by the environment, not trained"
    said = [f"{name} {column[place]:.3g}" for name, column in columns.items() if column is not None]
    ratio, advantage = columns["ratio"], columns["advantage"]
    if ratio is not None and advantage is not None and trust.is_clipped(ratio[place], advantage[place]):
        said.append("clipped")
    return f"token {place}, id {token}: {', '.join(said)}"


def _given(completion: ToldCompletion, count: int) -> Sequence[bool]:
    """[R] True where an environment wrote the token."""
    runs = completion.episode.runs if completion.episode is not None else None
    if runs is None or sum(runs) != count:
        return [False] * count
    return [index % 2 == 1 for index, length in enumerate(runs) for _ in range(length)]
