"""TRL's parser: dataclasses from the command line and, with `--config file.yaml`, from a flat YAML file, which the
command line overrides.

Settings that a config knows without having a field for them (`use_vllm`, `vllm_mode`, ...) are taken too; the config
says what becomes of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from posttrain.errors import UserError, did_you_mean
from posttrain.io import read_text
from posttrain.trainers.core.config import BaseConfig
from posttrain.trainers.core.unused import RENAMED


class TrlParser(HfArgumentParser):
    """`TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config()`. Raises UserError for what no
    dataclass knows."""

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        types = [] if dataclass_types is None else list(dataclass_types) if isinstance(dataclass_types, Iterable) else [dataclass_types]
        for one in types:
            if "config" in {known.name for known in fields(one)}:
                raise UserError(f"{one.__name__} has a field named 'config', which is the option that names the YAML file; rename it")
        super().__init__(types, **kwargs)
        known = {action.dest for action in self._actions}
        for name in sorted({name for one in types for name in _foreign(one)} - known):
            self.add_argument(f"--{name}", nargs="?", const=True, default=argparse.SUPPRESS, type=yaml.safe_load, help=argparse.SUPPRESS)

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """One object a dataclass. A mapping `env` in the file sets environment variables.

        return_remaining_strings: append what is unknown (of the file and the command line apart, if
        separate_remaining_strings).
        """
        given = list(sys.argv[1:] if args is None else args)
        file, given = _config_file(given)
        unknown = self.set_defaults_with_config(**_read(file)) if file is not None else []
        if unknown and fail_with_unknown_args and not return_remaining_strings:
            near = did_you_mean(unknown[0].removeprefix("--"), {action.dest for action in self._actions})
            raise UserError(f"{file}: {', '.join(unknown[::2])} is not known to {', '.join(one.__name__ for one in self.dataclass_types)}.{near}")
        parsed = self.parse_args_into_dataclasses(given, return_remaining_strings=return_remaining_strings)
        if not return_remaining_strings:
            return parsed
        *objects, rest = parsed
        return (*objects, unknown, rest) if separate_remaining_strings else (*objects, unknown + rest)

    def parse_args_into_dataclasses(
        self,
        args: Any = None,
        return_remaining_strings: bool = False,
        look_for_args_file: bool = True,
        args_filename: Any = None,
        args_file_flag: Any = None,
    ) -> tuple[Any, ...]:
        """As transformers' parser, with the settings that have no field, and without its files of arguments."""
        namespace, rest = self.parse_known_args(args)
        if rest and not return_remaining_strings:
            near = did_you_mean(rest[0].lstrip("-").partition("=")[0], {action.dest for action in self._actions})
            raise UserError(f"{' '.join(rest)} is not known to {', '.join(one.__name__ for one in self.dataclass_types)}.{near}")
        objects, values = [], vars(namespace)
        for one in self.dataclass_types:
            names = {known.name for known in fields(one) if known.init} | set(_foreign(one))
            objects.append(one(**{name: value for name, value in values.items() if name in names}))
        return (*objects, rest) if return_remaining_strings else tuple(objects)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take values of a file as defaults. Returns those that nothing takes, as words of a command line."""
        actions = {action.dest: action for action in self._actions}
        for name in config.keys() & actions.keys():
            actions[name].default, actions[name].required = config[name], False
        return [word for name, value in config.items() if name not in actions for word in (f"--{name}", str(value))]


def _foreign(one: Any) -> Iterable[str]:
    """Settings of other libraries that the dataclass has an answer to."""
    return [*getattr(one, "refused", ()), *getattr(one, "unused", ()), *(RENAMED if issubclass(one, BaseConfig) else ())]


def _config_file(given: list[str]) -> tuple[str | None, list[str]]:
    """The file after `--config`, and the command line without it."""
    for place, word in enumerate(given):
        if word == "--config" and place + 1 < len(given):
            return given[place + 1], given[:place] + given[place + 2 :]
        if word.startswith("--config="):
            return word.partition("=")[2], given[:place] + given[place + 1 :]
    return None, given


def _read(file: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(read_text(Path(file)))
    except OSError as error:
        raise UserError(f"--config: {file} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no YAML: {error}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UserError(f"{file} must be a mapping of settings")
    environment = config.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise UserError(f"{file}: env must be a mapping of names to values")
    os.environ.update({name: str(value) for name, value in environment.items()})
    return config
