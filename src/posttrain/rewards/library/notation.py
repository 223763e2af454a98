"""How answers are written: bold, money, thousands, scientific notation, mixed numbers, words after a number. What is
left is plain mathematics.

Text to text, linear in its length; nothing is computed but small fractions. A comparison must not depend on any of
these.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

CURRENCY = "€£¥₹"  # and the dollar, which also begins a formula
_WRITTEN_OUT = 15  # 1e15 is written out, what is larger stays a power of ten
_BOLD = re.compile(r"(?<![\w)*])(\*\*|__)(?=[^\s*_])([^*_\n]*[^\s*_])\1(?![\w(*])")
_WRAPPED = (
    re.compile(r"\$\$(?P<inner>[^$]*)\$\$"),
    re.compile(r"\$(?P<inner>[^$]*[^$\\])\$"),
    re.compile(r"\\\((?P<inner>.*)\\\)", re.DOTALL),
    re.compile(r"\\\[(?P<inner>.*)\\\]", re.DOTALL),
    re.compile(r"`(?P<inner>[^`]*)`"),
    re.compile(r"\\boxed\{(?P<inner>[^{}]*)\}"),
    re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|bf)\{(?P<inner>\s*[-+]?(?:\\?\$)?[\d.][^{}]*)\}"),  # of numbers only
)
_MONEY = re.compile(rf"(?:US)?(?:\\\$|[{CURRENCY}])\s*(?=[-+]?\.?\d)|(?<=\d)\s*(?:\\\$|[{CURRENCY}])(?!\w)")
_LONE_DOLLAR = re.compile(r"(?:US)?(?<!\\)\$\s*(?=[-+]?\.?\d)|(?<=\d)\s*\$$")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|\\[,!;: ]|[ \u00a0\u2009\u202f])\d{3})+(?![\d,]|[ ]*/)")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,4})(?![\w.]*\w)")
_TIMES_TEN = re.compile(r"\s*(?:\\times|\\cdot|\*)\s*10\^(?:\{([-+]?\d{1,4})\}|(\d))(?!\d)")
_POWER = re.compile(r"(?<=[\w)])\*\*(\d+|[a-z]\b)")
_FACTOR = re.compile(r"(?<=\d)\((?=[-+]?[\d./]+\))")  # math-verify reads 2(2/3) as a mixed number
_SQRT = re.compile(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)")
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])")
_WORDS = re.compile(r"[A-Za-z]{4,}(?: [A-Za-z]+)*")  # without \text it would be a product of letters, and "silent" be "listen"
_WORD = re.compile(r"(?P<text>\\text\{)?\s*(?P<words>[A-Za-z]{2,}(?: [A-Za-z]+)*)\s*(?(text)\})")
_MIXED = re.compile(r"(?<![\w.,/^}\\])(\d{1,15})(?:[ \u00a0]|\\[ ,;:])+(\d{1,15})\s*/\s*(\d{1,15})(?![\w/^]|\.\d)")
_REPEATING = re.compile(r"(?<![\w.])(\d{0,15})\.(\d{0,15})\\(?:overline|bar|dot)\{(\d{1,15})\}")
_UNIT = re.compile(
    r"(?P<number>[-+]?(?:[\d.,]*\d|\d+\s*/\s*\d+|\d[\d.]*\s*\\(?:times|cdot)\s*10\^\{?-?\d+\}?))\s+(?=[A-Za-z]*[aeiou])[A-Za-z]{3,}(?: [A-Za-z.'-]+)*"
)
_NO_UNITS = {
    *("or", "and", "to", "mod", "sin", "cos", "tan", "log", "exp", "pi", "sqrt", "if", "percent", "percentage", "inf", "infinity"),
    *("alpha", "beta", "gamma", "delta", "theta", "lambda", "omega", "sigma", "phi", "psi"),
}
_TEXT = re.compile(  # behind a number, π or a variable
    r"(?:(?<=[\d})])|(?<=\\pi)|(?<=(?<![A-Za-z])[A-Za-z]))(?:\s|~|\\[,;: ])*\\(?:text|mbox|mathrm|rm)\{[^{}]*\}(?:\^\{?\d\}?)?"
    r"(?=\s*(?:\.?$|\$|\\\)|\\\]))"
)
_SHORT_UNIT = re.compile(r"(?<=[\d}])(?:\s*(?:[cmk]m|[km]g|ml)|(?:\s|\\[,;: ]|~)+(?:ft|in|mi|lb|oz|ms|[mgshL]))(?:/[a-z]{1,3})?(?:\^\{?\d\}?)?$")
_AFTER_NUMBER = re.compile(
    r"(?:[\d)}](?:\\pi)?|\\pi)(?:\s|~|\\[,;: ])*(?P<text>\\(?:text|mathrm|mbox|rm)\{)?\s*\\?(?P<name>[A-Za-z]+|[%$€£¥₹])(?P<per>/[a-z]+)?\}?(?:\^\{?(?P<power>\d)\}?)?"
    r"|\\?(?P<money>[$€£¥₹])\s*[-+]?\.?\d"
)
_SPELLED = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet",
    "mi": "mile", "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "pound", "oz": "ounce", "ml": "milliliter millilitre", "L": "l liter litre",
    "ms": "millisecond", "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "", "year": "", "$": "dollar", "cent": "", "€": "euro",
    "£": "", "¥": "yen", "₹": "rupee", "%": "percent", "degree": "", "radian": "rad",
}  # fmt: skip
_UNITS = {spelling: unit for unit, spellings in _SPELLED.items() for spelling in (unit, *spellings.split())}
_SIGNS = {
    "\u2212": "-",
    "\u2013": "-",
    "×": r"\times ",
    "÷": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "∪": r"\cup ",
    "∩": r"\cap ",
}


def plain_notation(text: str) -> str:
    """The text without emphasis, money signs and separators of thousands; numbers as decimals or fractions that have
    one reading only.

    "**$1,080**" is "1,080", "2 2/3" is "8/3", "1e-7" is "0.0000001", "1 080" is "1080".
    """
    text = _plain_characters(text)
    text = _BOLD.sub(r"\2", text)
    text = _MONEY.sub("", text)
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    text = _TIMES_TEN.sub(lambda match: f"e{int(match[1] or match[2])}", text) if "10^" in text else text
    text = _SCIENTIFIC.sub(lambda match: _written_out(match.group(), match[1], match[2]), text)
    text = _REPEATING.sub(lambda match: _repeating(*match.groups()), text)
    text = _TEXT.sub("", text)
    return _MIXED.sub(lambda match: _mixed(match.group(), *map(int, match.groups())), text)


def unwrapped(text: str) -> str:
    """`plain_notation` of an answer that stands alone: also without what wraps the whole of it, or a full stop."""
    while True:
        text = text.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        bare = _BOLD.sub(r"\2", text)
        for wrapper in _WRAPPED:
            if (match := wrapper.fullmatch(bare)) is not None:
                bare = match["inner"]
        if bare == text:
            break
        text = bare
    return plain_notation(_LONE_DOLLAR.sub("", text) if text.count("$") == 1 else text).strip()


def bare_answer(text: str) -> str:
    """`unwrapped`, and without the unit or the words after a number; words as LaTeX's text, names of functions as its
    commands."""
    text = unwrapped(text)
    text = _SHORT_UNIT.sub("", text)
    match = _UNIT.fullmatch(text)
    if match is not None and not _NO_UNITS & set(re.findall(r"[a-z]+", text.casefold())):
        return match["number"]
    if _WORDS.fullmatch(text) and text.casefold() not in _NO_UNITS:
        return rf"\text{{{text}}}"
    text = _FUNCTION.sub(r"\\\1", _SQRT.sub(r"\\sqrt{\1}", text))
    return _FACTOR.sub(r"\\cdot (", _POWER.sub(r"^{\1}", text))


def same_words(one: str, other: str) -> bool:
    """Whether two answers are the same words. Where one is marked as text, their case does not matter: "yes" and
    "\\text{Yes}"."""
    first, second = _WORD.fullmatch(unwrapped(one)), _WORD.fullmatch(unwrapped(other))
    if first is None or second is None:
        return False
    is_text = bool(first["text"] or second["text"])  # without a mark short words may be products of variables
    return first["words"] == second["words"] or (is_text and first["words"].casefold() == second["words"].casefold())


def unit_of(answer: str) -> tuple[str, str, str] | None:
    """The first known unit of a number, what it is divided by, and its power: "5 centimeters" is ("cm", "", ""). None
    where there is none.

    One letter is a unit only where LaTeX says that it is text: 5m may be a product.
    """
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer[1:-1]
    for match in _AFTER_NUMBER.finditer(answer[:1000]):
        name = match["money"] or match["name"]
        unit = _UNITS.get(name) or _UNITS.get(name.casefold().removesuffix("s"))
        if unit is not None and (len(name) > 1 or match["text"] or not name.isalpha()):
            return unit, match["per"] or "", match["power"] or ""
    return None


def _plain_characters(text: str) -> str:
    """Signs of Unicode as LaTeX; ½ as 1/2, and 2½ as the mixed number 2 1/2."""
    if text.isascii():
        return text
    made: list[str] = []
    for char in text:
        sign = _SIGNS.get(char)
        if sign is None and unicodedata.category(char) == "No" and "\u2044" in (written := unicodedata.normalize("NFKC", char)):
            sign = (" " if made and made[-1][-1:].isdigit() else "") + written.replace("\u2044", "/")
        made.append(char if sign is None else sign)
    return re.sub(r"√\s*(\d+)", r"\\sqrt{\1}", "".join(made))


def _written_out(written: str, digits: str, exponent: str) -> str:
    if abs(int(exponent)) > _WRITTEN_OUT:
        return rf"{digits} \cdot 10^{{{int(exponent)}}}"
    return f"{Decimal(written):f}"


def _mixed(written: str, whole: int, numerator: int, denominator: int) -> str:
    """An improper fraction is no part of a mixed number: it stays as it is written."""
    return f"{whole * denominator + numerator}/{denominator}" if numerator < denominator else written


def _repeating(whole: str, before: str, period: str) -> str:
    """0.1 with 6 repeating is (16 - 1) / 90."""
    return f"{int((whole or '0') + before + period) - int((whole or '0') + before)}/{(10 ** len(period) - 1) * 10 ** len(before)}"
