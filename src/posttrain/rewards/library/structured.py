"""Completions that are JSON: at all, or valid under a JSON schema. Nothing is fetched: a schema that refers to another
address is refused.

The JSON is the whole completion, or its last fenced block. Python's extensions (NaN, Infinity), numbers beyond floats
and repeated keys are refused. A model may find a text on which a schema's regular expression takes years: a rubric
checks schemas in processes that can be killed, and a completion that takes too long is dropped and counted.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError
from posttrain.rewards.reward import RewardFunction, RewardSource, reward

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_FENCE = re.compile(r"^```[a-z]*[ \t]*$", re.MULTILINE)
SECONDS, MEMORY_MB = 5.0, 1024  # for one completion; almost all take less than a millisecond
MAX_CHARACTERS = 50_000  # some schema keywords (uniqueItems) take quadratic time


class NotJSON(ValueError):
    """The completion is not JSON."""


def json_valid() -> RewardFunction:
    """1 if the completion is JSON, else 0."""

    def score(completion: str) -> float:
        try:
            read_json(completion)
        except NotJSON:
            return 0.0
        return 1.0

    return reward(name="json_valid", range=(0.0, 1.0))(score)


def json_schema(schema: dict[str, Any] | str | None = None) -> RewardFunction:
    """1 if the completion is JSON that the schema accepts, else 0. Without `schema` a row brings its own in the column
    `schema`, as text or object.

    Needs the package jsonschema. A row without a schema is not scored; a schema that is not one is an error.
    """
    fixed = None if schema is None else _text(schema)

    def judged(completion: str, schema: str) -> float:
        try:
            return 1.0 if _validator(schema).is_valid(read_json(completion)) else 0.0
        except (NotJSON, RecursionError, ArithmeticError):  # nested deeper, or an integer larger, than the validator can compute with
            return 0.0

    def of_column(completion: str, schema: Any) -> float | None:
        return None if schema is None else judged(completion, _text(schema))

    def of_setting(completion: str) -> float:
        assert fixed is not None
        return judged(completion, fixed)

    _import()
    if fixed is not None:
        _validator(fixed)
    marked = reward(name="json_schema", range=(0.0, 1.0), prepare=_import, timeout=SECONDS, on_error="drop", workers=2, memory_mb=MEMORY_MB)
    made = marked(of_column if fixed is None else of_setting)
    return replace(made, source=RewardSource("json_schema", {} if fixed is None else {"schema": fixed}, None))


def read_json(completion: str) -> Any:
    """The JSON value of a completion. Raises NotJSON."""
    fences = list(_FENCE.finditer(completion))
    text = completion[fences[-2].end() : fences[-1].start()] if len(fences) >= 2 else completion
    if len(text) > MAX_CHARACTERS:
        raise NotJSON("too long")
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # among them integers of too many digits
        raise NotJSON(str(error)) from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(written: str) -> float:
    value = float(written)
    if not math.isfinite(value):
        raise ValueError(f"{written} is beyond floating-point numbers")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _text(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def _import() -> Any:
    try:
        import jsonschema
    except ImportError as error:
        raise UserError("json_schema needs the package jsonschema: pip install 'posttrain[json]'") from error
    return jsonschema


@functools.lru_cache(maxsize=1024)
def _validator(schema: str) -> Validator:
    jsonschema = _import()
    from referencing import Registry

    try:
        value = json.loads(schema)
        kind = jsonschema.validators.validator_for(value, default=jsonschema.Draft202012Validator)
        kind.check_schema(value)
    except (ValueError, RecursionError, jsonschema.SchemaError) as error:
        raise UserError(f"json_schema: {schema[:80]!r} is not a JSON schema: {str(error).splitlines()[0]}") from error
    validator: Validator = kind(value, registry=Registry())  # an empty registry fetches nothing
    return validator
