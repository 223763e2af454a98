"""Secrets are blanked in whatever is written or shown: settings, URLs, headers, messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

BLANK = "***"  # stands where a secret stood inside a text
# A name that ends so (in lower case, with "_" for "-") is a secret's: of the first list whatever it holds (a number, a
# pair), of both a text.
_ANY_VALUE = ("password", "passwd", "passphrase", "secret", "authorization", "cookie", "auth", "credential", "credentials")
_TEXT = ("token", "api_key", "apikey", "access_key", "secret_key", "private_key", "subscription_key")
_VOCABULARY = tuple(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "mask", "sep", "cls", "image", "stop"))
_KNOWN_SHAPES = (
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
)
# Secrets inside a text, whatever its setting is called: a password or a long name before the @ of a URL, a signed
# query, a key of a known shape.
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


def is_secret(name: Any, value: Any) -> bool:
    """Whether a setting of this name holds a secret: hub_token, the `token` of from_pretrained,
    headers.Authorization."""
    plain = str(name).lower().replace("-", "_")
    if not plain.endswith((*_ANY_VALUE, *_TEXT)) or plain in _VOCABULARY or value in (None, "", [], {}) or isinstance(value, bool):
        return False
    if isinstance(value, str):
        return not re.fullmatch(r"[<\[].*[>\]]", value, re.DOTALL)  # <|im_end|>, [PAD]: of a vocabulary
    return plain.endswith(_ANY_VALUE) and not isinstance(value, Mapping)


def redacted(value: Any, *, dropped: bool = False) -> Any:
    """Settings that others may read, at any depth: secrets become None; passwords in URLs and keys of known shapes are
    blanked.

    The one filter for all that is written: recipes, records, manifests, cards, pages. dropped: secrets are left out
    instead, and with them a mapping that held nothing else, so that settings compare equal whatever their secrets are.
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
    """A message without the secrets that it quotes: those of settings, URLs and headers, and what the environment's
    secret variables hold."""
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
