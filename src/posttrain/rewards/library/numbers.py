"""Finding and comparing numbers in model text. ASCII digits only, exact (Decimal), linear in the length of the text.

"1,080" is one number, "1,2" is two; a minus counts as a sign only where no digit, letter or bracket ends before it ("3-4" is 3 and 4).
Exponents, fractions and words are not read.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal

_NUMBER = re.compile(r"(?:(?<![\w)\]])[-\u2212])?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")


def last_number(text: str) -> Decimal | None:
    """The last number in the text, or None."""
    found = deque(_NUMBER.finditer(text), maxlen=1)
    return _value(found[0].group()) if found else None


def whole_number_text(text: str) -> Decimal | None:
    """The number that the text consists of ("$1,080." is 1080), or None when there is anything else."""
    bare = text.strip().lstrip("$").rstrip(".").strip()
    match = _NUMBER.fullmatch(bare)
    if match is None or ("," in bare and not _is_grouped(bare)):
        return None
    return _value(bare)


def _is_grouped(written: str) -> bool:
    return _THOUSANDS.fullmatch(written.lstrip("-\u2212").partition(".")[0]) is not None


def _value(written: str) -> Decimal:
    plain = written.replace("\u2212", "-").rstrip(",")
    if "," in plain:
        plain = plain.replace(",", "") if _is_grouped(plain) else plain.rpartition(",")[2]
    return Decimal(plain)
