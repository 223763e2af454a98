"""`posttrain eval` and `posttrain sample`: what a model or a finished run answers, and how often it is right.

A run brings its own questions (exam.jsonl), templates and rubric (recipe.yaml) and token limit (summary.json); options say otherwise.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.cli import runs
from posttrain.cli.build import chosen, fill, make_rubric
from posttrain.cli.recipe import EvalSection, Recipe, read_recipe
from posttrain.data.prompts import to_tasks
from posttrain.data.sources import load_rows
from posttrain.errors import UserError
from posttrain.rewards.rubric import Rubric
from posttrain.types import Rollout, Sampling

DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class Question:
    """What an evaluation is made of, after options, the run's own files and the recipe were asked in that order."""

    model: str
    data: str
    recipe: Recipe | None
    max_new_tokens: int
    is_run_exam: bool  # its rows already have prompt and answer: no template applies


def find_question(target: str, data: str | None, recipe_name: str | None, max_new_tokens: int | None) -> Question:
    folder = Path(target).expanduser()
    own_recipe, own_exam = folder / runs.RECIPE, folder / runs.EXAM
    name = recipe_name or (str(own_recipe) if own_recipe.is_file() else None)
    recipe = read_recipe(name) if name else None
    is_run_exam = data is None and own_exam.is_file()
    source = data or (str(own_exam) if is_run_exam else None) or (recipe.eval.data if recipe else None)
    if source is None:
        raise UserError("nothing to ask: give --data FILE, or --recipe with eval.data")
    limit = max_new_tokens or _tokens_of_run(folder) or (recipe.train.get("max_completion_length") if recipe else None) or DEFAULT_TOKENS
    return Question(runs.model_of(target), source, recipe, limit, is_run_exam)


def _tokens_of_run(folder: Path) -> int | None:
    path = folder / runs.SUMMARY
    return json.loads(path.read_text()).get("max_new_tokens") if path.is_file() else None


def evaluate(question: Question, samples: int | None) -> dict[str, Any]:
    """Greedy answers, scored. `accuracy` is there only when some reward decides right or wrong."""
    from posttrain.exam import sit_exam
    from posttrain.models.load import load_tokenizer

    rubric = make_rubric(question.recipe) if question.recipe and question.recipe.rubric else Rubric("arithmetic")
    tokenizer = load_tokenizer(question.model)
    rows = chosen(load_rows(question.data), EvalSection(samples=samples or (question.recipe.eval.samples if question.recipe else None)))
    if question.recipe is not None and not question.is_run_exam:
        rows = fill(rows, question.recipe.data, tokenizer)
    tasks = to_tasks(rows)
    rubric.check_columns(tasks[0].columns)
    played: dict[str, Any] = {"environment": question.recipe.env.make(), **question.recipe.env.settings()} if question.recipe else {}
    paper = sit_exam(_load(question.model, question.recipe), tokenizer, tasks, rubric, max_new_tokens=question.max_new_tokens, **played)
    rewards = [rollout.reward for rollout in paper.rollouts if rollout.reward is not None]
    result: dict[str, Any] = {"questions": len(tasks), "truncated": paper.truncated, "mean_reward": sum(rewards) / len(rewards) if rewards else None}
    if rubric.can_decide():
        accuracy = paper.accuracy
        result |= {"accuracy": accuracy.value, "interval": [accuracy.low, accuracy.high], "right": accuracy.right}
    return result


def report(result: dict[str, Any]) -> str:
    """The result in one line."""
    parts = []
    if "accuracy" in result:
        low, high = result["interval"]
        parts.append(
            f"greedy accuracy {result['accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]: {result['right']} of {result['questions']} right"
        )
    else:
        parts.append(f"{result['questions']} questions; no accuracy, since no reward of the rubric decides right or wrong (mark one with @verifier)")
    if result["mean_reward"] is not None:
        parts.append(f"mean reward {result['mean_reward']:.3g}")
    if result["truncated"]:
        parts.append(f"{result['truncated']:.0%} cut off: try a larger --max-new-tokens")
    return " · ".join(parts)


def complete(target: str, text: str, system: str | None, n: int, sampling: Sampling, seed: int) -> list[Rollout]:
    """n completions of one prompt; a conversation where the tokenizer has a chat template."""
    from posttrain.models.load import load_tokenizer
    from posttrain.policy import Policy

    name = runs.model_of(target)
    tokenizer = load_tokenizer(name)
    if system and not tokenizer.chat_template:
        raise UserError(f"{target} has no chat template, so there is no place for --system; put it into the prompt")
    messages = [{"role": "system", "content": system}] if system else []
    prompt = [*messages, {"role": "user", "content": text}] if tokenizer.chat_template else text
    return Policy(_load(name, None), tokenizer).sample(prompt, n=n, seed=seed, **asdict(sampling))[0].rollouts


def _load(name: str, recipe: Recipe | None) -> Any:
    """The model in evaluation mode; adapters on the model that they were trained on."""
    import torch

    from posttrain.models.merge import load_trainable

    model: Any = load_trainable(name, dtype=(recipe.model.dtype if recipe is not None else None) or "float32")
    return model.to("cuda") if torch.cuda.is_available() else model
