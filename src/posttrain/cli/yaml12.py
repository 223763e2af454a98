"""YAML as people read it: only true and false are booleans (`save_strategy: no` is text), 1e-6 is a number, a doubled
key is an error.

PyYAML follows YAML 1.1, where these are traps. Objects are never built from tags: this is the safe loader.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from posttrain.errors import UserError
from posttrain.io import bounded

_BOOL, _FLOAT, _MERGE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]:
            if isinstance(key, Hashable) and key in seen:
                raise UserError(f"the key '{key}' stands twice (line {node.start_mark.line + 1} and below); keep one")
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, place: str) -> Any:
    """The value of a YAML text. Raises UserError with the line and column of what is not YAML."""
    try:
        values = yaml.load(text, Loader=_Loader)
        bounded(values)  # a few lines of aliases can stand for gigabytes
    except yaml.YAMLError as error:
        raise UserError(f"{place} is not valid YAML: {_cause(error)}") from error
    except RecursionError as error:
        raise UserError(f"{place} is not valid YAML: nested too deeply") from error
    except UserError:
        raise
    except ValueError as error:  # a date that is none, digits without end, too much of everything
        raise UserError(f"{place} is not valid YAML: {error}") from error
    return values


def _cause(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem or error.context} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return str(error)
