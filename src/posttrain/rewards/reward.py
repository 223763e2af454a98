"""A reward is a plain function with a name and a weight. `@reward` and `@verifier` give it both; they change nothing
else.

Three shapes are told apart by their parameters: `completion` (one at a time, as text), `completions` (a whole batch,
called as TRL calls it) and `group` (one prompt with all its completions). Every other parameter is a dataset column.
Calling and checking is `scoring.py`'s job.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, overload

from posttrain.errors import UserError, did_you_mean
from posttrain.rewards.failures import OPEN, FailurePolicy

# What a reward of each shape can take besides the dataset's columns. The key is the parameter that tells the shape.
# completion_ids: in a batch, as in TRL, all tokens after the prompt; of one completion those that the policy sampled.
OFFERED = {
    "completion": ("completion", "prompt", "completion_ids", "trainer_state", "log_metric"),
    "completions": ("completions", "prompts", "completion_ids", "trainer_state", "log_metric", "log_extra"),
    "group": ("group", "trainer_state", "log_metric"),
}
NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # dataset columns that rewards never see as columns

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class RewardSource:
    """Where another process finds a reward: the arguments of `loading.load_reward`."""

    name: str
    settings: dict[str, Any]
    folder: str | None
    index: int | None = None  # which one of a preset's rewards; None: the name is of a single reward


@dataclass(eq=False)
class RewardFunction:
    """A function that scores completions. Calling it calls the function, so a decorated reward is tested like an
    undecorated one."""

    function: Callable[..., Any]
    name: str
    weight: float = 1.0
    range: tuple[float, float] | None = None  # lowest and highest score; None: not declared
    decides: bool = False  # full marks mean that the answer is right: what an evaluation counts. Needs a range
    is_verifier: bool = False  # answers True, False or None only
    policy: FailurePolicy = OPEN  # what it leaves open is taken from the rubric or the trainer
    prepare: Callable[[], Any] | None = None  # done once in each worker before its first call, outside of any time limit: slow imports
    check: Callable[[], Any] | None = None  # done where a rubric takes it. Raises UserError for what is missing here
    source: RewardSource | None = None  # None: it was passed as an object, so that no other process can find it
    shape: str = field(init=False)  # a key of OFFERED
    required: tuple[str, ...] = field(init=False)  # columns it cannot be called without
    optional: tuple[str, ...] = field(init=False)  # columns it takes when the data has them
    takes_everything: bool = field(init=False)  # has **kwargs

    def __post_init__(self) -> None:
        self.weight = checked_weight(self.weight, self.name)
        _check_range(self.range, self.decides, self.name)
        parameters = _parameters(self.function, self.name)
        self.takes_everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {p.name: p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        shapes = [shape for shape in OFFERED if shape in named]
        if not shapes and self.takes_everything:
            shapes = ["completions"]
        if len(shapes) != 1:
            raise UserError(
                f"reward '{self.name}' takes ({', '.join(named)}). It needs exactly one of: `completion` (the text of one completion), "
                "`completions` (all of a batch, as lists), `group`; further parameters are columns of the data."
            )
        self.shape = shapes[0]
        bound = _bound_keywords(self.function)
        self._takes = {name for name in named if name not in bound}
        self._bound = bound
        columns = {name: needed for name, needed in named.items() if name not in OFFERED[self.shape] and name not in bound}
        self.required = tuple(name for name, needed in columns.items() if needed)
        self.optional = tuple(name for name, needed in columns.items() if not needed)
        functools.update_wrapper(self, self.function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    @property
    def is_async(self) -> bool:
        function = self.function
        while isinstance(function, (functools.partial, RewardFunction)):
            function = function.func if isinstance(function, functools.partial) else function.function
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)

    def takes(self, name: str) -> bool:
        return name in self._takes or (self.takes_everything and name not in self._bound)

    def arguments(self, offered: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
        """The keywords to call it with. What is offered wins over a column of the same name."""
        return {name: value for name, value in {**columns, **offered}.items() if self.takes(name)}

    def check_columns(self, available: Iterable[str]) -> None:
        """Raises UserError when the data lacks a column that the function cannot do without."""
        known = list(available)
        for column in self.required:
            if column not in known:
                raise UserError(
                    f"reward '{self.name}' asks for the column '{column}'; the data has: {', '.join(known) or 'no columns'}."
                    + did_you_mean(column, known)
                )


@overload
def reward(function: Callable[..., Any]) -> RewardFunction: ...
@overload
def reward(
    *,
    name: str | None = None,
    weight: float = 1.0,
    range: tuple[float, float] | None = None,
    decides: bool = False,
    prepare: Callable[[], Any] | None = None,
    check: Callable[[], Any] | None = None,
    **policy: Any,
) -> Callable[[Callable[..., Any]], RewardFunction]: ...
def reward(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    weight: float = 1.0,
    range: tuple[float, float] | None = None,
    decides: bool = False,
    prepare: Callable[[], Any] | None = None,
    check: Callable[[], Any] | None = None,
    **policy: Any,
) -> RewardFunction | Callable[[Callable[..., Any]], RewardFunction]:
    """Marks a function that returns a number, or None where it cannot judge. Bare, or with a name, a weight, the range
    of its scores.

    prepare: done once in each worker before its first call. check: done where a rubric takes it, to say what is
    missing. policy: timeout, on_error, retries, workers (see FailurePolicy). Raises UserError for a worker that could
    not find the function.
    """
    governed = FailurePolicy.of(policy)

    def wrap(wrapped: Callable[..., Any]) -> RewardFunction:
        made = RewardFunction(wrapped, name or name_of(wrapped), weight, range, decides, policy=governed, prepare=prepare, check=check)
        return made if governed.workers is None else replace(made, source=_source_of(wrapped))

    return wrap if function is None else wrap(function)


@overload
def verifier(function: Callable[..., Any]) -> RewardFunction: ...
@overload
def verifier(*, name: str | None = None, weight: float = 1.0, **settings: Any) -> Callable[[Callable[..., Any]], RewardFunction]: ...
def verifier(
    function: Callable[..., Any] | None = None, *, name: str | None = None, weight: float = 1.0, **settings: Any
) -> RewardFunction | Callable[[Callable[..., Any]], RewardFunction]:
    """Marks a function that says whether a completion is right: True scores 1, False 0, None means that it could not
    tell.

    settings: prepare, check, timeout, on_error, retries, workers, as for `reward`.
    """

    decorate = reward(name=name, weight=weight, range=(0.0, 1.0), decides=True, **settings)

    def wrap(wrapped: Callable[..., Any]) -> RewardFunction:
        return replace(decorate(wrapped), is_verifier=True)

    return wrap if function is None else wrap(function)


def as_reward(function: Callable[..., Any]) -> RewardFunction:
    """A reward from any callable: function, lambda, partial, instance with `__call__`."""
    if isinstance(function, RewardFunction):
        return function
    if not callable(function) or isinstance(function, type):
        raise UserError(f"a reward must be a function or a callable object, not {function!r}")
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if isinstance(inner, RewardFunction):  # a partial of a decorated reward keeps what the decorator said
        return replace(inner, function=function, source=_source_of_partial(function, inner.source))
    return RewardFunction(function, name_of(function))


def name_of(function: Callable[..., Any]) -> str:
    """The function's own name; of a partial the inner function's; of an instance its class's."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "lambda" if name == "<lambda>" else name


def _source_of(function: Callable[..., Any]) -> RewardSource | None:
    """Where a function of a module is found again; None for a closure, a lambda, or a function of a script or
    notebook."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<locals>")
    if module in (None, "__main__") or not name.isidentifier():
        return None
    return RewardSource(f"{module}:{name}", {}, None)


def _source_of_partial(function: Callable[..., Any], source: RewardSource | None) -> RewardSource | None:
    """Where another process finds a partial of a reward that it can find: with the keywords as settings. None where
    they are not plain values."""
    if source is None or not isinstance(function, functools.partial) or function.args:
        return None
    try:
        json.dumps(function.keywords)
    except (TypeError, ValueError):
        return None
    return replace(source, settings=source.settings | function.keywords)


def checked_weight(weight: Any, name: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise UserError(f"the weight of reward '{name}' must be a finite number, not {weight!r}")
    return float(weight)


def _check_range(ends: Any, decides: bool, name: str) -> None:
    if ends is None and decides:
        raise UserError(f"reward '{name}' decides right or wrong, so it must say what full marks are: range=(lowest, highest)")
    if ends is not None and (len(ends) != 2 or not ends[0] <= ends[1]):
        raise UserError(f"the range of reward '{name}' must be (lowest, highest), not {ends!r}")
    if decides and math.isinf(ends[1]):
        raise UserError(f"reward '{name}' decides right or wrong, but its full marks are {ends[1]}; give range=(lowest, highest) a finite end")


def _parameters(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError) as error:
        raise UserError(f"reward '{name}' does not tell its parameters ({error}); wrap it: lambda completion: ...") from error


def _bound_keywords(function: Callable[..., Any]) -> set[str]:
    """Keywords that a partial has already fixed: a column of the same name must not replace them."""
    return set(function.keywords) if isinstance(function, functools.partial) else set()
