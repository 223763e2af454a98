"""From YAML values to dataclass fields: names are checked, and types as far as YAML can get them wrong ("1e-6" is text
to YAML).

No general validator: a mistake in meaning is the dataclass's own `__post_init__` to find.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.errors import UserError

_WORDS = re.compile(r"\b(str|int|float|bool|dict|list|None|Optional|Any)\b")
_INSIDE = re.compile(r"\b(dict|list)\[[^\]]*\]")  # what a container holds is not looked at
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "dict": ((dict,), "a mapping"),
    "list": ((list,), "a list"),
}


def nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """' Did you mean train.beta?', or nothing."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f" Did you mean {prefix}{near[0]}?" if near else ""


def read_section(path: str, values: Any, sections: Mapping[str, type]) -> Any:
    """The dataclass that `sections` names for `path` ("" is the whole recipe), filled from a mapping, sections within
    it included."""
    cls = sections[path or "recipe"]
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a section with settings such as {{{next(iter(_fields(cls)))}: ...}}, not {values!r}"[:300])
    known, prefix = _fields(cls), f"{path}." if path else ""
    filled = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{prefix}{key} is not a setting; {path or 'a recipe'} has: {', '.join(known)}.{nearest(str(key), known, prefix)}")
        where = prefix + key
        if where in sections and not (value is None and _takes_none(known[key])):
            filled[key] = read_section(where, {} if value is None else value, sections)
        else:
            filled[key] = typed(value, known[key], where)
            if isinstance(filled[key], float) and not math.isfinite(filled[key]):
                raise UserError(f"{where} must be a finite number, not {value}")
    return cls(**filled)


def read_settings(path: str, values: Mapping[str, Any], cls: Any, title: str) -> dict[str, Any]:
    """Keywords for a trainer's config. Names that the config knows and refuses pass: it says itself why."""
    known = vars(cls).get("types") or _fields(cls)  # as written: a parser of scripts may have changed the fields
    for key in values:
        if key not in known and key not in cls.refused and key not in cls.unused:
            raise UserError(f"{path}.{key} is not a setting of {title}.{nearest(str(key), known, f'{path}.')}")
    return {key: typed(value, known[key], f"{path}.{key}") if key in known else value for key, value in values.items()}


def typed(value: Any, annotation: Any, where: str) -> Any:
    """The value as the annotation wants it: text that is a number becomes one where only a number fits. Raises
    UserError for a wrong type."""
    kinds = _kinds(annotation)
    named = [kind for kind in _KINDS if kind in kinds]
    if isinstance(value, str) and "float" in kinds:
        value = _as_float(value)
    if value is None:
        if not named or _takes_none(annotation):
            return None
        raise UserError(f"{where} is empty; it must be {_listed(named)}")
    accepted = tuple(kind for name in named for kind in _KINDS[name][0])
    is_stray_bool = isinstance(value, bool) and "bool" not in kinds  # Python's True is also 1
    if named and "Any" not in kinds and _only_plain(annotation) and (not isinstance(value, accepted) or is_stray_bool):
        raise UserError(f"{where} must be {_listed(named)}, not {value!r}"[:300])
    return value


def _fields(cls: Any) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(cls) if field.init}


def _kinds(annotation: Any) -> set[str]:
    """The kinds an annotation names: {"float", "None"} of `float | None`, {"dict"} of `dict[str, int]`."""
    return set(_WORDS.findall(_INSIDE.sub(r"\1", str(annotation))))


def _takes_none(annotation: Any) -> bool:
    return bool({"None", "Optional", "Any"} & _kinds(annotation))


def _only_plain(annotation: Any) -> bool:
    """Whether it consists of the kinds known here; enumerations and literals are left to the config."""
    return not re.sub(r"\b(NoneType|Union|typing|class)\b|\W|_", "", _WORDS.sub("", _INSIDE.sub(r"\1", str(annotation))))


def _as_float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _listed(named: list[str]) -> str:
    return " or ".join(_KINDS[name][1] for name in named)
