"""Text: fit for encoders, without secrets, written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_SECRETS = ("token", "api_key", "password", "secret")  # ends of names
_NO_SECRETS = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")  # of a vocabulary


def encodable(text: str) -> str:
    """Lone surrogates, which UTF-8 and so no tokenizer can hold, become question marks; everything else is kept as it is."""
    return text.encode("utf-8", "replace").decode("utf-8")


def is_secret(name: Any, value: Any) -> bool:
    """Whether a setting of this name holds what nobody else may read: hub_token, or the `token` of from_pretrained."""
    return isinstance(value, str) and str(name).lower().endswith(_SECRETS) and name not in _NO_SECRETS


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
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
