"""Text: fit for encoders and terminals, without secrets, written whole."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLANK = "***"  # stands where a secret stood inside a text
# Ends of names, in lower case and with "_" for "-": of text that nobody else may read,
_SECRETS = (
    *("token", "api_key", "apikey", "access_key", "secret_key", "private_key", "subscription_key"),
    *("password", "passwd", "passphrase", "secret", "authorization", "cookie", "auth", "credential", "credentials"),
)
_WHATEVER_THEY_HOLD = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "authorization",
    "cookie",
    "auth",
    "credential",
    "credentials",
)  # a number, a pair
_NO_SECRETS = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "mask_token",
    "sep_token",
    "cls_token",
    "image_token",
    "stop_token",
)  # of a vocabulary
_KNOWN_SHAPES = (
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
)
# What a text may hold whatever its setting is called: a password or a long name before the @ of a URL, a signed query, a key of a known shape.
_INSIDE = (
    (re.compile(r"(://[^\s/?#:@]*):[^\s/?#]*@"), rf"\1:{BLANK}@"),
    (re.compile(r"://[^\s/?#:@]{16,}@"), f"://{BLANK}@"),
    (re.compile(r"(?i)([?&][\w.-]*(?:token|key|password|secret|signature|sig|credential)=)[^&#\s'\"]+"), rf"\1{BLANK}"),
    (re.compile(_KNOWN_SHAPES), BLANK),
)
_HEADER = re.compile(r"Bearer\s+\S{4,}|(?:Basic|Token)\s+(?=\S*[\d=])\S{8,}", re.IGNORECASE)
# Further, in a message that quotes settings: `Bearer abc`, `api_key: abc`, `'token': 'abc'`.
_QUOTED = (
    (re.compile(r"\b(Bearer)\s+[\w.~+/=-]{6,}"), rf"\1 {BLANK}"),
    (
        re.compile(
            r"(?i)\b((?!(?:bos|eos|pad|unk|mask|sep|cls|image|stop)_token)[\w-]*(?:_token|api[_-]?key|access_key|secret_key|passw(?:or)?d|passphrase|secret|"
            r"authorization)['\"]?\s*[:=]\s*['\"]?|['\"]token['\"]\s*:\s*['\"]?|\btoken=['\"]?)(?!None\b|null\b|Bearer\b)[^\s'\",}\])]+"
        ),
        rf"\1{BLANK}",
    ),
)

# Control, format (bidirectional overrides among them), surrogate and line-breaking characters: they move cursors, recolour or reorder text.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class _Escapes(dict[int, str]):
    """For str.translate, filled as characters are met. `kept`: characters that do their work."""

    def __init__(self, kept: str = "") -> None:
        super().__init__({ord(char): char for char in kept})

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in _HIDDEN else char
        return self[code]


_ALL, _ALL_BUT_LINES = _Escapes(), _Escapes("\n\t")


def visible(text: str) -> str:
    """The text with every character that a terminal would obey instead of show written as its escape (`\\x1b`, `\\n`, ...)."""
    return text if text.isprintable() else text.translate(_ALL)


def shown(text: str) -> str:
    """As `visible`, but line breaks and tabs do their work: text of several lines, to be read as such."""
    return text if text.isprintable() else text.translate(_ALL_BUT_LINES)


def encodable(text: str) -> str:
    """Lone surrogates, which UTF-8 and so no tokenizer can hold, become question marks; everything else is kept as it is."""
    return text.encode("utf-8", "replace").decode("utf-8")


def spelled(text: str, encoding: str | None) -> str:
    """What the encoding lacks, written as its escape: an output that is cp1252 or ASCII takes the rest. None: it takes everything."""
    return text if encoding is None else text.encode(encoding, "backslashreplace").decode(encoding)


def is_secret(name: Any, value: Any) -> bool:
    """Whether a setting of this name holds what nobody else may read: hub_token, the `token` of from_pretrained, headers.Authorization."""
    plain = str(name).lower().replace("-", "_")
    if not plain.endswith(_SECRETS) or plain in _NO_SECRETS or value in (None, "", [], {}) or isinstance(value, bool):
        return False
    if isinstance(value, str):
        return not re.fullmatch(r"[<\[].*[>\]]", value, re.DOTALL)  # <|im_end|>, [PAD]: of a vocabulary
    return plain.endswith(_WHATEVER_THEY_HOLD) and not isinstance(value, Mapping)


def redacted(value: Any, *, dropped: bool = False) -> Any:
    """Settings as others may read them, at any depth: what `is_secret` is None, a password in a URL and a key of a known shape are blanked.

    The one filter for all that is written: recipes, records, manifests, cards, pages. `dropped`: secrets are left out, and with them a mapping that
    held nothing else, so that settings can be compared whatever secrets they were given.
    """
    if isinstance(value, Mapping):
        secret = {name for name, inner in value.items() if is_secret(name, inner) or (dropped and inner is None and is_secret(name, "x"))}
        kept = {name: redacted(inner, dropped=dropped) for name, inner in value.items() if name not in secret}
        if dropped:
            return kept if kept or not secret else None
        return {name: None if name in secret else kept[name] for name in value}
    if isinstance(value, list | tuple):
        return [redacted(inner, dropped=dropped) for inner in value]
    if isinstance(value, str):
        return BLANK if _HEADER.fullmatch(value) else _blanked(value)
    return value


def redacted_message(text: str) -> str:
    """A message without the secrets that it quotes: those of settings, URLs and headers, and what the environment's secret variables hold."""
    text = _blanked(text)
    for pattern, blank in _QUOTED:
        text = pattern.sub(blank, text)
    for name, value in os.environ.items():
        if len(value) >= 8 and name.upper().endswith(("_TOKEN", "_KEY", "_SECRET", "_PASSWORD")) and value in text:
            text = text.replace(value, BLANK)
    return text


def _blanked(text: str) -> str:
    for pattern, blank in _INSIDE:
        text = pattern.sub(blank, text)
    return text


def write_whole(path: Path, text: str) -> None:
    """The whole file or none of it: written beside, then renamed into place; until then an older one stays. Raises OSError.

    Links are followed; into what is no plain file, such as /dev/stdout, the text is written as it is.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    beside = target.with_name(f".{target.name}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # a full disk is told of an open file without its name
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
