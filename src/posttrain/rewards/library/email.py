"""The rubric of e-mail replies: keywords +1, the desired reply +1, too long -1, the recipient's name +1, a signature
block +1. From -1 to +4.

The data bring, in columns: `answer` (the desired reply), `keywords` (a list, or text with commas), `recipient` (a
name). A row where a column is empty is not scored by that reward.
"""

from __future__ import annotations

import re
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.library.patterns import contains_word, fraction_present, listed
from posttrain.rewards.reward import RewardFunction, reward

SIGNATURE_LINES = 8  # of the end of a mail, where its signature is looked for
_LINE_CHARACTERS = 200
_PHONE = re.compile(r"(?<![\w.])\+?[0-9(][0-9 ()./-]{5,18}[0-9](?!\w)")
_MAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")
_STREET = re.compile(r"\b[0-9]{1,5}[a-z]?,? +[^\W\d_]{3,}|[^\W\d_]{3,}\.? +[0-9]{1,5}[a-z]?\b", re.IGNORECASE)  # 12 Main Street, Hauptstr. 5


def keywords_present(each: bool = False) -> RewardFunction:
    """The fraction of the row's keywords that occur as whole words, so all of them are +1. each: +1 for each instead
    (no upper end)."""

    def score(completion: str, keywords: Any) -> float | None:
        wanted = listed(keywords)
        if not wanted:
            return None
        return fraction_present(completion, wanted) * (len(wanted) if each else 1)

    return reward(name="keywords_present", range=(0.0, float("inf") if each else 1.0))(score)


@reward(range=(0.0, 1.0))
def desired_reply(completion: str, answer: Any) -> float | None:
    """+1 if the mail is the desired reply, word for word; differences in white space do not count."""
    if answer is None or not str(answer).strip():
        return None
    return 1.0 if completion.split() == str(answer).split() else 0.0


def too_long(max_words: int = 200) -> RewardFunction:
    """-1 if the mail has more than `max_words` words, else 0."""
    if max_words < 1:
        raise UserError(f"too_long: max_words={max_words}: use 1 or more")

    def score(completion: str) -> float:
        return -1.0 if len(completion.split()) > max_words else 0.0

    return reward(name="too_long", range=(-1.0, 0.0))(score)


@reward(range=(0.0, 1.0))
def recipient_named(completion: str, recipient: Any) -> float | None:
    """+1 if the recipient's name, or the first or last part of it, stands in the mail as whole words."""
    parts = str(recipient or "").split()
    if not parts:
        return None
    return 1.0 if any(contains_word(completion, name) for name in (" ".join(parts), parts[0], parts[-1])) else 0.0


@reward(range=(0.0, 1.0))
def signature_block(completion: str) -> float:
    """+1 if the last lines hold a phone number, an e-mail address and a street with a house number, else 0. They are
    not checked for truth."""
    lines = [line[:_LINE_CHARACTERS] for line in completion[-SIGNATURE_LINES * _LINE_CHARACTERS :].splitlines() if line.strip()][-SIGNATURE_LINES:]
    phones = [line for line in lines if _PHONE.search(line)]
    mails = [line for line in lines if _MAIL.search(line)]
    streets = [line for line in lines if _STREET.search(_PHONE.sub("", line))]
    return 1.0 if phones and mails and streets else 0.0


def email(max_words: int = 200, each: bool = False) -> list[RewardFunction]:
    return [keywords_present(each), desired_reply, too_long(max_words), recipient_named, signature_block]
