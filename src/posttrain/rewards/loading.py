"""From a name to a reward: a preset or a function of the library, `file.py:function`, or `module:function`.

Importing a user's file runs it. Unknown names are refused, with the nearest known one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain.errors import UserError, did_you_mean
from posttrain.rewards.reward import RewardFunction, RewardSource, as_reward


def load_reward(name: Any, settings: dict[str, Any] | None = None, *, folder: str | None = None) -> list[RewardFunction] | RewardFunction:
    """A reward, or the list of a preset's rewards. `settings` are keywords of the function or preset; paths are looked
    for in `folder` first."""
    settings = settings or {}
    loaded = _load(name, settings, folder)
    source = RewardSource(name, settings, str(Path(folder or ".").resolve()))
    if isinstance(loaded, list):
        return [replace(reward, source=replace(source, index=index)) for index, reward in enumerate(loaded)]
    return replace(loaded, source=source)


def _load(name: Any, settings: dict[str, Any], folder: str | None) -> list[RewardFunction] | RewardFunction:
    if not isinstance(name, str):
        raise UserError(f"a reward is named by text, not {name!r}")
    if ":" in name:
        function = load_function(name, folder)
        return as_reward(_with_settings(function, settings, name) if settings else function)
    from posttrain.rewards.library import FUNCTIONS, MAKERS, PRESETS

    makers: dict[str, Callable[..., list[RewardFunction] | Callable[..., Any]]] = {**PRESETS, **MAKERS}
    if name in makers:
        _check_settings(makers[name], settings, name)
        _check_complete(makers[name], settings, name)
        made = makers[name](**settings)
        return made if isinstance(made, list) else as_reward(made)
    if name in FUNCTIONS:
        return as_reward(_with_settings(FUNCTIONS[name], settings, name) if settings else FUNCTIONS[name])
    known = [*makers, *FUNCTIONS]
    raise UserError(
        f"there is no reward '{name}'; the library has: {', '.join(known)}; your own is named file.py:function.{did_you_mean(name, known)}"
    )


def names_model(name: Any) -> bool:
    """Whether a reward's name is that of a reward model: a directory with a model or adapters, or a name on the hub
    (owner/model)."""
    if not isinstance(name, str):
        return False
    is_directory = any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json"))
    return is_directory or ("/" in name and ":" not in name and not name.endswith(".py"))


def preset_names() -> list[str]:
    from posttrain.rewards.library import PRESETS

    return list(PRESETS)


def _with_settings(function: Callable[..., Any], settings: dict[str, Any], name: str) -> Callable[..., Any]:
    _check_settings(function, settings, name)
    return functools.partial(function, **settings)


def _check_settings(function: Callable[..., Any], settings: dict[str, Any], name: str) -> None:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in settings:
        if key not in parameters:
            raise UserError(f"'{key}' is not a setting of the reward '{name}'; it takes: {', '.join(parameters)}.{did_you_mean(key, parameters)}")


def _check_complete(maker: Callable[..., Any], settings: dict[str, Any], name: str) -> None:
    needed = [key for key, parameter in inspect.signature(maker).parameters.items() if parameter.default is parameter.empty]
    for key in needed:
        if key not in settings:
            raise UserError(f"the reward '{name}' needs the setting '{key}', as in {{reward: {name}, {key}: ...}}")


def load_function(name: str, folder: str | None = None) -> Callable[..., Any]:
    """What "file.py:function" or "module:function" names. Raises UserError for a file or a name that is not there."""
    place, _, function_name = name.rpartition(":")
    module = _from_file(place, folder) if place.endswith(".py") else _from_module(place)
    functions = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    if function_name not in functions:
        raise UserError(
            f"{place} has no function '{function_name}'; it has: {', '.join(functions) or 'none'}.{did_you_mean(function_name, functions)}"
        )
    return functions[function_name]


def _from_file(place: str, folder: str | None) -> ModuleType:
    candidates = [Path(folder) / place] if folder else []
    candidates.append(Path(place).expanduser())
    path = next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)
    if path is None:
        near = did_you_mean(Path(place).name, [found.name for found in candidates[0].parent.glob("*.py")])
        raise UserError(f"the file {place} does not exist (looked in {', '.join(str(c.parent.resolve()) for c in candidates)}).{near}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # a reward may import what lies beside it, as if its file were run
    module_name = f"_posttrain_reward_{path.stem}_{abs(hash(str(path)))}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a function's module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UserError(f"the file {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _from_module(place: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a console script does not have the working directory on its path
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise UserError(f"the module '{place}' cannot be imported: {type(error).__name__}: {error}") from error
