"""`posttrain probe RECIPE`: will RL work here? Exit codes: 0 it can, 1 it will not (nothing is right, or no group has a
signal), 2 the input cannot work, 3 there is nothing left to learn.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.characters import visible
from posttrain.cli.options import overrides, say, sentences
from posttrain.errors import UserError
from posttrain.methods import METHODS

if TYPE_CHECKING:
    from posttrain.cli.recipe import Recipe
    from posttrain.evaluation import Estimate
    from posttrain.probe import Component, Probe
    from posttrain.types import Completion, Group

SHOWN = 160  # characters of a completion


def probe(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a packaged recipe.")],
    prompts: Annotated[int, typer.Option(min=2, help="Prompts to ask, drawn from data.train.")] = 32,
    completions: Annotated[int | None, typer.Option(min=2, help="Completions of each. Default: 16, or num_generations if that is more.")] = None,
    trainer: Annotated[str, typer.Option(help="Whose settings count: grpo (section train) or rloo.")] = "grpo",
    save: Annotated[str | None, typer.Option(metavar="FILE.jsonl", help="Write every completion with its scores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Before a run: is anything ever right, and do groups carry signal? Any setting can follow:
    --train.num_generations=16"""
    with sentences():
        from posttrain.cli import completions as answers
        from posttrain.cli.build import hide_progress_bars
        from posttrain.cli.recipe import read_recipe

        hide_progress_bars()
        if trainer not in METHODS or not METHODS[trainer].compares_groups:
            grouped = [name for name, method in METHODS.items() if method.compares_groups]
            raise UserError(f"--trainer {trainer}: the probe is about groups of completions; use {' or '.join(grouped)}")
        if save is not None:
            answers.check(save)
        found, groups, rubric, rows = measure(read_recipe(recipe, overrides(ctx)), trainer, prompts, completions)
        if as_json:
            say(json.dumps(as_mapping(found)))
        else:
            say("\n".join(report(found, recipe, rows, _shown(groups))))
        if save is not None:
            answers.save(save, answers.lines(groups, rubric))
        raise typer.Exit(found.exit_code)


def measure(recipe: Recipe, trainer: str, prompts: int, completions: int | None) -> tuple[Probe, list[Group], Any, int]:
    """(probe, what was sampled, the rubric, rows of the data), from a recipe as its trainer would read it. In the order
    of cost."""
    from posttrain.cli import build
    from posttrain.data.mixture import load_data
    from posttrain.data.prompts import to_tasks
    from posttrain.models.load import stop_token_ids
    from posttrain.probe import probe as ask
    from posttrain.trainers.online.inputs import as_rubric, check_trains, place_reward_models

    kind = METHODS[trainer]
    args = build.read_args(kind, recipe, default_output="runs/probe")
    environment = recipe.env.make()
    rubric = as_rubric(build.make_rubric(recipe), args.reward_weights, environment)
    check_trains(rubric)
    raw = load_data(build.needed(recipe.data.train, "data.train"))
    tokenizer = build.make_tokenizer(recipe.model, raw)
    tasks = to_tasks(build.fill(raw, recipe.data, tokenizer, rubric))
    model = load(recipe, args, tokenizer)
    place_reward_models(rubric, args.device)
    sampled: list[Group] = []
    try:
        found = ask(
            model,
            tokenizer,
            tasks,
            rubric,
            args.sampling(stop_token_ids(model, tokenizer)),
            num_generations=args.num_generations,
            prompts=prompts,
            completions=completions,
            groups_per_rollout=args.prompts_per_generation,
            max_steps=_steps(args, len(tasks)),
            seed=args.seed,
            engine=build.make_engine(args, tokenizer),
            on_groups=sampled.extend,
            environment=environment,
            max_turns=args.max_turns,
            max_turn_tokens=args.max_turn_tokens,
            reward_policy=args.reward_policy,
            env_on_error=args.env_on_error,
            skip_special_tokens=args.skip_special_tokens,
            **(args.chat_template_kwargs or {}),
        )
    finally:
        rubric.close()
    return found, sampled, rubric, len(tasks)


def load(recipe: Recipe, args: Any, tokenizer: Any) -> Any:
    """The model as the run would start with it: new adapters change nothing, so none are made."""
    from posttrain.cli.build import lora_config, make_model
    from posttrain.models.load import prepare_model
    from posttrain.models.merge import load_trainable

    model: Any = make_model(recipe.model, tokenizer, args)
    if isinstance(model, str):
        model = load_trainable(model, **args.loading(model, lora_config(recipe.model)))
    else:
        prepare_model(model)
    return model if recipe.model.load_in_4bit else model.to(args.device)


def _steps(args: Any, rows: int) -> int:
    """Optimizer steps of the planned run."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * rows / args.prompts_per_generation * args.updates_per_rollout)


def as_mapping(found: Probe) -> dict[str, Any]:
    return {"can_work": found.can_work, "exit_code": found.exit_code, "verdict": found.verdict, **asdict(found)}


def report(found: Probe, name: str, rows: int, samples: list[tuple[str, Completion]]) -> list[str]:
    """The findings, a line each, the verdict last."""
    size, of_rollout = found.num_generations, found.groups_per_rollout
    return [
        f"probe of {name}: {found.n} of {rows:,} prompts x {found.k} completions, {found.seconds:.1f} s",
        _row("right", [f"{'pass' if k == 1 else ''}@{k} {share(estimate)}" for k, estimate in found.pass_at.items()] or ["no reward of the rubric decides"]),
        _row(f"groups of {size}", [f"{share(found.signal[size])} with signal", *_dead(found)]),
        _row("", [f"of {of_rollout} in a rollout: {_of(found.signal_per_rollout.low, of_rollout)} to {_of(found.signal_per_rollout.high, of_rollout)}"]),
        _row("signal by size", [f"{group} {estimate.value:.0%}" for group, estimate in found.signal.items()]),
        _row("num_generations", [_suggestion(found)]),
        _row("completions", [f"{found.completion_tokens:.0f} tokens", f"cut {share(found.truncated)}", f"ended {share(found.ended)}", *_form(found)]),
        _row("a rollout", [f"{found.tokens_per_rollout:,} tokens", f"{found.rollout_seconds:.2g} s to sample and score; the update comes on top"]),
        "",
        *_table([*found.components, found.reward]),
        "",
        *(f"  {'ok  ' if check.ok else 'look'}  {check.says}" for check in found.checks),
        *(f"  {title}  {'   n/a' if one.reward is None else f'{one.reward:+6.2f}'}  {visible(one.text[:SHOWN])}" for title, one in samples),
        "",
        found.verdict,
    ]  # fmt: skip


def share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _row(title: str, parts: list[str]) -> str:
    return f"  {title:<16}{' · '.join(parts)}"


def _of(part: float, count: int) -> int:
    return round(part * count)


def _dead(found: Probe) -> list[str]:
    if found.all_wrong is None or found.all_right is None:
        return []
    return [f"all wrong {found.all_wrong.value:.0%}", f"all right {found.all_right.value:.0%}"]


def _form(found: Probe) -> list[str]:
    return [] if found.form is None else [f"in form {share(found.form)}"]


def _suggestion(found: Probe) -> str:
    if found.suggested is None:
        return f"no size up to {found.k} gives half of the groups a signal"
    return f"from {found.suggested} on half of the groups carry signal (the recipe has {found.num_generations})"


def _table(components: list[Component]) -> list[str]:
    """One line a reward, the total last."""
    rows: list[tuple[str, ...]] = [("", "weight", "least", "most", "mean", "std", "full marks", "unscored")]
    for one in components:
        numbers = ["-" if value is None else f"{value:+.3g}" if value else "0" for value in (one.low, one.high, one.mean)]
        rest = ["-" if one.std is None else f"{one.std:.3g}", "-" if one.full is None else f"{one.full:.0%}", f"{one.unscored:.0%}"]
        rows.append((visible(one.name), f"{one.weight:g}", *numbers, *rest))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _shown(groups: list[Group]) -> list[tuple[str, Completion]]:
    """The best and the worst completion of the group whose rewards differ most; a single one where no group has two
    different rewards."""
    scored = [group for completions in groups if (group := [completion for completion in completions.completions if completion.reward is not None])]
    if not scored:
        return [("one  ", groups[0].completions[0])]
    group = max(scored, key=lambda group: _reward(max(group, key=_reward)) - _reward(min(group, key=_reward)))
    best, worst = max(group, key=_reward), min(group, key=_reward)
    return [("one  ", best)] if best.reward == worst.reward else [("best ", best), ("worst", worst)]


def _reward(completion: Completion) -> float:
    return completion.reward if completion.reward is not None else math.nan
