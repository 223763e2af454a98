"""The best model of a run and what tells it: refused at the start where no evaluation could, and callbacks that count
evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from posttrain.data.given import named
from posttrain.errors import UserError, did_you_mean
from posttrain.trainers.core.config import BaseConfig


def check_settings(args: BaseConfig, eval_dataset: Any) -> None:
    """Of several evaluation data sets the metric must say which. Raises UserError."""
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == IntervalStrategy.NO:
        return
    names = [name for name in named(eval_dataset) if name]
    if names and not any(metric.removeprefix("eval_").startswith(f"{name}_") for name in names):
        examples = " or ".join(repr(f"{name}_{metric.removeprefix('eval_')}") for name in names)
        raise UserError(f"metric_for_best_model={metric!r}: there are several evaluation data sets; say of which, as in {examples}")


def unknown_metric(metric: str | None, metrics: Mapping[str, float]) -> str | None:
    """A sentence where an evaluation does not give the metric."""
    if metric is None:
        return None
    wanted = metric if metric.startswith("eval_") else f"eval_{metric}"
    if wanted in metrics:
        return None
    return f"metric_for_best_model={metric!r}: the evaluation gives no such metric.{did_you_mean(wanted, metrics)} It gives: {', '.join(sorted(metrics))}."


def matters(args: BaseConfig) -> bool:
    """Whether evaluations decide what is trained or kept."""
    return args.metric_for_best_model is not None


def check_callbacks(args: BaseConfig, saved: Mapping[str, Any], callbacks: Iterable[Any]) -> None:
    """A callback whose state comes back takes the arguments that are saved with it. Raises UserError where it was given
    others."""
    if not args.restore_callback_states_from_checkpoint:
        return
    stateful: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            stateful.setdefault(type(callback).__name__, []).append(callback)
    for name, given in stateful.items():
        states = saved.get(name, [])
        for callback, state in zip(given, states if isinstance(states, list) else [states], strict=False):
            before, now = state.get("args", {}), callback.state().get("args", {})
            changed = ", ".join(f"{key}: {before[key]} -> {now[key]}" for key in before if key in now and before[key] != now[key])
            if changed:
                raise UserError(
                    f"cannot resume: {name} was made with other arguments ({changed}). Put them back, or let it begin anew with "
                    "restore_callback_states_from_checkpoint=False"
                )
