"""Finding and comparing numbers in model text. ASCII digits only, exact (Decimal), linear in the length of the text.

"1,080" is one number, "1,2" is two; a minus counts as a sign only where no digit, letter or bracket ends before it
("3-4" is 3 and 4); "1e3" is 1000. The last number of a text may be a fraction, a mixed number or a power: of "2/3" and
"10^6" no part is the number. Words ("inf" among them) are not read.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Context, Decimal, InvalidOperation

from posttrain.rewards.library.notation import unwrapped

_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212])?(?:[0-9](?:[0-9,]|(?:\{,\}|\\,|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9])))*(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:(?<=[0-9])[eE][-+]?[0-9]+(?!\w))?"
)
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+")
_SEPARATORS = re.compile(r"\{,\}|\\,|[\u00a0\u2009\u202f]")
_OVER = re.compile(r"\s*/\s*")
_FRAC = re.compile(r"\s*\\[dt]?frac\{")
_LONGEST = 1000  # characters of an answer that is read as one number in another writing
_QUIET = Context(prec=28, traps=[])  # too large becomes infinite instead of raising


def last_number(text: str) -> Decimal | None:
    """The last number in the text, or None. That of "2 2/3" is 8/3 to 28 digits, that of "10^6" a million."""
    found = list(deque(_NUMBER.finditer(text), maxlen=3))
    if not found:
        return None
    values = [_value(match.group()) for match in found]
    last = values[-1]
    if len(found) == 1 or values[-2] is None or last is None:
        return last
    before = text[found[-3].end() : found[-2].start()] if len(found) == 3 else None
    between = text[found[-2].end() : found[-1].start()]
    if between in ("^", "^{"):
        return _finite(_QUIET.power(values[-2], last))
    is_frac = between == "}{" and text.endswith(("\\frac{", "\\dfrac{", "\\tfrac{"), 0, found[-2].start())
    if not is_frac and (not _OVER.fullmatch(between) or (before is not None and _OVER.fullmatch(before))):
        return last  # no fraction, or a date
    fraction = _QUIET.divide(values[-2], last)
    is_mixed = before is not None and (_FRAC.fullmatch(before) if is_frac else before.isspace()) and 0 < fraction < 1
    if is_mixed and (whole := values[-3]) is not None and whole == whole.to_integral_value():
        return _finite(_QUIET.add(whole, fraction.copy_sign(whole)))
    return _finite(fraction)


def whole_number_text(text: str) -> Decimal | None:
    """The number that the text consists of ("$1,080.", "**1080**" and "\\$1080" are 1080), or None when there is
    anything else."""
    bare = text.strip().lstrip("$").rstrip(".").strip()
    match = _NUMBER.fullmatch(bare)
    if match is None and len(bare) <= _LONGEST:
        bare = unwrapped(text)
        match = _NUMBER.fullmatch(bare)
    if match is None or ("," in bare and not _is_grouped(bare)):
        return None
    return _value(bare)


def _finite(value: Decimal) -> Decimal | None:
    return value if value.is_finite() else None


def _is_grouped(written: str) -> bool:
    written = _SEPARATORS.sub(",", written)
    whole, _, _ = written.lstrip("-\u2212").lower().partition("e")[0].partition(".")
    return _THOUSANDS.fullmatch(whole) is not None


def relative_error(said: Decimal, gold: Decimal) -> float:
    """|said - gold| / |gold|; at gold 0, where that has no value, |said|. Infinite when beyond floats."""
    error = _QUIET.abs(_QUIET.subtract(said, gold))
    return abs(float(error if gold == 0 else _QUIET.divide(error, _QUIET.abs(gold))))


def is_near(said: Decimal, gold: Decimal, *, tolerance: float = 0.0, relative: float = 0.0) -> bool:
    """Equal, or no farther apart than `tolerance` or than `relative` times the gold number. Without either the
    comparison is exact."""
    if said == gold:
        return True
    error = _QUIET.abs(_QUIET.subtract(said, gold))
    return error <= _QUIET.multiply(Decimal(str(relative)), _QUIET.abs(gold)) or (tolerance > 0 and error <= Decimal(str(tolerance)))


def _value(written: str) -> Decimal | None:
    """None where the exponent is too large for a Decimal."""
    plain = (
        _SEPARATORS.sub("" if written.count(",") == written.count("{,}") + written.count("\\,") else ",", written).replace("\u2212", "-").rstrip(",")
    )
    if "," in plain:
        plain = plain.replace(",", "") if _is_grouped(plain) else plain.rpartition(",")[2]
    try:
        return Decimal(plain)
    except InvalidOperation:
        return None
