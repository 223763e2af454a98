"""Finding and comparing numbers in model text. ASCII digits only, exact (Decimal), linear in the length of the text.

"1,080" is one number, "1,2" is two; a minus counts as a sign only where no digit, letter or bracket ends before it ("3-4" is 3 and 4);
"1e3" is 1000. Fractions and words ("inf" among them) are not read.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Context, Decimal, InvalidOperation

_NUMBER = re.compile(r"(?:(?<![\w)\]])[-\u2212])?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:(?<=[0-9])[eE][-+]?[0-9]+(?!\w))?")
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
_QUIET = Context(prec=28, traps=[])  # too large becomes infinite instead of raising


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
    whole, _, _ = written.lstrip("-\u2212").lower().partition("e")[0].partition(".")
    return _THOUSANDS.fullmatch(whole) is not None


def relative_error(said: Decimal, gold: Decimal) -> float:
    """|said - gold| / |gold|; at gold 0, where that has no value, |said|. Never negative, infinite when beyond floats."""
    error = _QUIET.abs(_QUIET.subtract(said, gold))
    return abs(float(error if gold == 0 else _QUIET.divide(error, _QUIET.abs(gold))))


def is_near(said: Decimal, gold: Decimal, *, tolerance: float = 0.0, relative: float = 0.0) -> bool:
    """Equal, or no farther apart than `tolerance` or than `relative` times the gold number. Without either the comparison is exact."""
    if said == gold:
        return True
    error = _QUIET.abs(_QUIET.subtract(said, gold))
    return error <= _QUIET.multiply(Decimal(str(relative)), _QUIET.abs(gold)) or (tolerance > 0 and error <= Decimal(str(tolerance)))


def _value(written: str) -> Decimal | None:
    """None where the exponent is beyond what decimals can hold."""
    plain = written.replace("\u2212", "-").rstrip(",")
    if "," in plain:
        plain = plain.replace(",", "") if _is_grouped(plain) else plain.rpartition(",")[2]
    try:
        return Decimal(plain)
    except InvalidOperation:
        return None
