"""`posttrain eval`: how often is a model right on held-out questions, how sure is that, and is it better than
another?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.characters import visible
from posttrain.cli import runs
from posttrain.cli.options import say, sentences


def evaluate(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model's directory or name, or a run's directory.")],
    data: Annotated[
        str | None, typer.Option(help="Questions: a file or a name on the hub. Default: the run's own questions, else the recipe's eval.data.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Its templates and rubric are used. Default: the run's own.")] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL_OR_RUN", help="Compare with this one on the same questions; `start`: with the model that the run began with."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Ask so many of them, always the same ones. Default: the recipe's eval.samples, else all.")
    ] = None,
    generations: Annotated[int, typer.Option("-n", "--generations", min=0, help="Also draw so many answers to each, for pass@k.")] = 0,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Of those. Default: what the run was trained with, else 1.")] = None,
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="Accuracy for each value of a column.")] = None,
    save: Annotated[str | None, typer.Option(metavar="FILE.jsonl", help="Write every completion. Default: eval.jsonl in a run's directory.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: what the run was trained with.")] = None,
    seed: Annotated[int, typer.Option(help="Of the drawn answers.")] = 0,
    duplicates: Annotated[bool, typer.Option(help="Look for the questions in the training data.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Accuracy with its 95 % interval: greedy, and with -n also pass@k of drawn answers."""
    with sentences():
        from posttrain.cli import completions
        from posttrain.cli.build import hide_progress_bars
        from posttrain.cli.evaluations import Asking, find_question
        from posttrain.cli.evaluations import evaluate as evaluate_plan

        hide_progress_bars()
        question = find_question(target, data, recipe, max_new_tokens)
        if (path := save or _own_file(target)) is not None:
            completions.check(path)
        result, written = evaluate_plan(question, Asking(samples, generations, temperature, seed, by, duplicates), against)
        if path is not None:
            result["completions"] = path
        say(json.dumps(result) if as_json else "\n".join(report(result)))
        if path is not None:
            completions.save(path, written)


def _own_file(target: str) -> str | None:
    """A run keeps what it was asked; a bare model's directory is left alone."""
    folder = Path(target).expanduser()
    return str(folder / runs.ANSWERS) if folder.is_dir() and not runs.is_model(folder) else None


def report(result: dict[str, Any]) -> list[str]:
    """The result in lines, the greedy accuracy first."""
    said = [_greedy(result)]
    if "sampled" in result:
        said.append(_sampled(result["sampled"]))
    said += _broken(result)
    if "against" in result:
        said += _against(result["against"])
    if "by" in result:
        said += _table(result["by"])
    if "duplicates" in result:
        said += _duplicates(result["duplicates"], result["questions"])
    if "completions" in result:
        said.append(f"completions: {result['completions']}")
    return said


def _greedy(result: dict[str, Any]) -> str:
    parts = []
    if "accuracy" in result:
        parts.append(f"greedy accuracy {_share(result)}: {result['right']} of {result['questions'] - result['unjudged']} right")
        parts += _unjudged(result["unjudged"], result["questions"], "questions")
    elif "unjudged" in result:
        parts.append(f"{result['questions']} questions; no accuracy, since no answer could be judged")
    else:
        parts.append(f"{result['questions']} questions; no accuracy, since no reward of the rubric decides right or wrong (mark one with @verifier)")
    if result["mean_reward"] is not None:
        parts.append(f"mean reward {result['mean_reward']:.3g}" + (f" ({result['unscored']} not scored)" if result["unscored"] else ""))
    if result["truncated"]:
        parts.append(f"{result['truncated']:.0%} truncated: try a larger --max-new-tokens")
    return " · ".join(parts)


def _share(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{result['accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _sampled(result: dict[str, Any]) -> str:
    parts = [f"{result['completions']} drawn answers each"]
    parts += [f"pass@{k} {100 * value:.1f}% [{100 * low:.1f}, {100 * high:.1f}]" for k, (value, low, high) in result.get("pass_at", {}).items()]
    parts += _unjudged(result.get("unjudged", 0), result["answers"], "answers")
    if "mean_reward" in result:
        value, low, high = result["mean_reward"]
        parts.append(f"mean reward {value:.3g} [{low:.3g}, {high:.3g}]")
    if result["truncated"]:
        parts.append(f"{result['truncated']:.1%} truncated")
    return " · ".join(parts)


def _unjudged(count: int, of: int, what: str) -> list[str]:
    return [f"{count} of {of} {what} could not be judged"] if count else []


def _broken(result: dict[str, Any]) -> list[str]:
    """How many answers have no reward because it broke, or the environment did."""
    if "broken" not in result:
        return []
    count, first = result["broken"]["answers"], visible(result["broken"]["first"])
    return [f"warning: {count} answers, drawn ones included, have no reward, since something broke over them; the first time: {first}"]


def _against(other: dict[str, Any]) -> list[str]:
    lines = [f"against {visible(other['model'])}: " + _greedy(other), *_broken(other)]
    if "difference" in other:
        both = f" · of {other['paired']} questions judged in both" if other["paired"] < other["questions"] else ""
        changes = f"{other['gained']} questions gained, {other['lost']} lost{both}"
        lines.append(f"  {_points('greedy', other['difference'], other['p_value'])} · {changes}")
    if other.get("sampled_difference"):
        lines.append(f"  {_points('drawn', other['sampled_difference']['difference'], other['sampled_difference']['p_value'])}")
    if other["reward"] is not None:
        value, low, high = other["reward"]["difference"]
        lines.append(f"  reward {value:+.3g} [{low:+.3g}, {high:+.3g}], {_p(other['reward']['p_value'])}")
    return lines


def _points(what: str, difference: list[float], p: float) -> str:
    value, low, high = (100 * number for number in difference)
    return f"{what} {value:+.1f} points [{low:+.1f}, {high:+.1f}], {_p(p)}"


def _p(p: float) -> str:
    return "p < 1e-9" if p < 1e-9 else f"p = {p:.2g}"


def _table(by: dict[str, Any]) -> list[str]:
    width = max(len(visible(row["value"])) for row in by["values"])
    lines = [f"by {visible(by['column'])}:"]
    for row in by["values"]:
        said = _share(row) if "accuracy" in row else "mean reward " + ("n/a" if row["mean_reward"] is None else f"{row['mean_reward']:.3g}")
        parts = [said, *_unjudged(row.get("unjudged", 0), row["questions"], "questions")]
        lines.append(f"  {visible(row['value']):<{width}}  {row['questions']:>6}  {' · '.join(parts)}")
    return lines


def _duplicates(found: dict[str, Any], questions: int) -> list[str]:
    if "unknown" in found:
        return [f"not compared with the training data: {found['unknown']}"]
    if not found["exact"] and not found["normalised"]:
        return ["no question is in the training data"]
    more = f" and {found['normalised']} more but for case, spaces and punctuation" if found["normalised"] else ""
    return [f"warning: {found['exact']} of {questions} questions are in the training data{more}; what is remembered is not learned"]
