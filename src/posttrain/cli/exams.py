"""What a model or a finished run answers, and how often it is right: the work behind `posttrain eval` and `posttrain sample`.

A run brings its own questions (exam.jsonl), templates and rubric (recipe.yaml) and token limit (summary.json); options say otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.cli import runs
from posttrain.cli.build import chosen, fill, make_rubric
from posttrain.cli.completions import lines
from posttrain.cli.figures import Answers, categories, compared, summary
from posttrain.cli.recipe import EvalSection, Recipe, read_recipe
from posttrain.data.mixture import load_data
from posttrain.data.overlap import overlap
from posttrain.data.prompts import to_tasks
from posttrain.data.sources import load_rows
from posttrain.errors import UserError, did_you_mean
from posttrain.rewards.rubric import Rubric
from posttrain.types import Rollout, Sampling, Task

DEFAULT_TOKENS = 256
START = "start"  # --against start: the model that the run began with
ONLINE = ("train", "rloo", "ppo")  # sections whose settings say how completions are drawn, in the order in which they are asked


@dataclass(frozen=True)
class Question:
    """What an evaluation is made of, after options, the run's own files and the recipe were asked in that order."""

    model: str
    data: str
    recipe: Recipe | None
    max_new_tokens: int
    is_run_exam: bool  # its rows already have prompt and answer: no template applies

    @property
    def settings(self) -> dict[str, Any]:
        """How the run drew its completions."""
        sections = [getattr(self.recipe, name) for name in ONLINE] if self.recipe is not None else []
        return next((section for section in sections if section), {})


@dataclass(frozen=True)
class Asking:
    """How a model is asked, besides greedily."""

    samples: int | None = None  # questions; None: the recipe's, else all
    generations: int = 0  # further answers to each, drawn at the temperature
    temperature: float | None = None  # None: the recipe's, else 1
    seed: int = 0
    by: str | None = None  # a column: accuracy for each of its values
    duplicates: bool = True  # compare the questions with the training data


def find_question(target: str, data: str | None, recipe_name: str | None, max_new_tokens: int | None) -> Question:
    folder = Path(target).expanduser()
    own_recipe, own_exam = folder / runs.RECIPE, folder / runs.EXAM
    name = recipe_name or (str(own_recipe) if own_recipe.is_file() else None)
    recipe = read_recipe(name) if name else None
    is_run_exam = data is None and own_exam.is_file()
    source = data or (str(own_exam) if is_run_exam else None) or (recipe.eval.data if recipe else None)
    if source is None:
        raise UserError("nothing to ask: give --data FILE, or --recipe with eval.data")
    model = runs.model_of(target)
    if not is_run_exam and (recipe is None or not recipe.rubric):
        raise UserError("nothing says what a right answer is: give --recipe with a recipe that has a rubric")
    found = Question(model, source, recipe, DEFAULT_TOKENS, is_run_exam)
    limit = max_new_tokens or _tokens_of_run(folder) or found.settings.get("max_completion_length") or DEFAULT_TOKENS
    return replace(found, max_new_tokens=limit)


def _tokens_of_run(folder: Path) -> int | None:
    path = folder / runs.SUMMARY
    return json.loads(path.read_text()).get("max_new_tokens") if path.is_file() else None


def evaluate(question: Question, asking: Asking, against: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the result, every completion as a line). `accuracy` is there only when some reward decides right or wrong."""
    rubric = make_rubric(question.recipe) if question.recipe and question.recipe.rubric else Rubric("arithmetic")
    tasks = questions(question, asking, rubric)
    if asking.by is not None and asking.by not in tasks[0].columns:
        raise UserError(
            f"--by {asking.by}: the questions have no such column.{did_you_mean(asking.by, tasks[0].columns)} They have: {', '.join(tasks[0].columns)}."
        )
    other = None if against is None else _other(question, against)
    try:
        ours = ask(question, asking, tasks, rubric)
        theirs = None if other is None else ask(other, asking, tasks, rubric)
    finally:
        rubric.close()
    result = summary(ours, rubric)
    written = _lines(question.model, ours, rubric)
    if asking.by is not None:
        result["by"] = {"column": asking.by, "values": categories(ours.greedy, rubric, asking.by)}
    if other is not None and theirs is not None:
        result["against"] = {"model": other.model, **summary(theirs, rubric), **compared(theirs, ours, rubric)}
        written += _lines(other.model, theirs, rubric)
    if asking.duplicates:
        result["duplicates"] = duplicates(question, tasks)
    return result, written


def _other(question: Question, against: str) -> Question:
    """The same questions for another model; found before anything is spent."""
    if against == START:
        if question.recipe is None or question.recipe.model.name is None:
            raise UserError("--against start: the run has no recipe that names the model it began with; give that model's name or directory")
        model = question.recipe.model.name
    else:
        model = runs.model_of(against)
    return replace(question, model=model)


def questions(question: Question, asking: Asking, rubric: Rubric) -> list[Task]:
    """The held-out rows with the templates of training."""
    from posttrain.models.load import load_tokenizer

    wanted = asking.samples or (question.recipe.eval.samples if question.recipe else None)
    rows = chosen(load_rows(question.data), EvalSection(samples=wanted))
    if question.recipe is not None and not question.is_run_exam:
        rows = fill(rows, question.recipe.data, load_tokenizer(question.model))
    tasks = to_tasks(rows)
    rubric.check_columns(tasks[0].columns)
    return tasks


def ask(question: Question, asking: Asking, tasks: Sequence[Task], rubric: Rubric) -> Answers:
    """One greedy answer to each, and if wanted several at the temperature."""
    from posttrain.exam import answers
    from posttrain.models.load import load_tokenizer, stop_token_ids
    from posttrain.rollout.engines import make_engine
    from posttrain.trainers.inputs import place_reward_models

    model, tokenizer, recipe, settings = _load(question.model, question.recipe), load_tokenizer(question.model), question.recipe, question.settings
    place_reward_models(rubric, model.device)
    played: dict[str, Any] = dict(settings.get("chat_template_kwargs") or {})
    if recipe is not None:
        played |= {"environment": recipe.env.make(), **recipe.env.settings()}
    played["engine"] = make_engine("local" if recipe is None else recipe.engine.kind, tokenizer)
    stops = stop_token_ids(model, tokenizer)
    greedy = answers(model, tokenizer, tasks, rubric, Sampling(question.max_new_tokens, 0.0, stop_token_ids=stops), **played)
    if not asking.generations:
        return Answers(greedy)
    sampling = Sampling(
        question.max_new_tokens,
        asking.temperature if asking.temperature is not None else float(settings.get("temperature", 1.0)),
        top_k=settings.get("top_k") or 0,
        top_p=float(settings.get("top_p", 1.0)),
        min_p=settings.get("min_p"),
        stop_token_ids=stops,
    )
    return Answers(greedy, answers(model, tokenizer, tasks, rubric, sampling, num_generations=asking.generations, seed=asking.seed, **played))


def duplicates(question: Question, tasks: Sequence[Task]) -> dict[str, Any]:
    """Questions that the run was trained on, or why that is not known."""
    if question.recipe is None or question.recipe.data.train is None:
        return {"unknown": "no recipe names the training data"}
    from posttrain.models.load import load_tokenizer

    try:
        rows = fill(load_data(question.recipe.data.train), question.recipe.data, load_tokenizer(question.model))
    except UserError as error:  # the data of an old run may be gone: that is no reason not to examine it
        return {"unknown": str(error)}
    if "prompt" not in rows[0]:
        return {"unknown": f"the training data have no prompts, but: {', '.join(map(str, rows[0]))}"}
    found = overlap((row["prompt"] for row in rows), [task.prompt for task in tasks])
    example = next(iter([*found.exact, *found.normalised]), None)
    return {"exact": len(found.exact), "normalised": len(found.normalised), "example": None if example is None else tasks[example].prompt}


def _lines(model: str, given: Answers, rubric: Rubric) -> list[dict[str, Any]]:
    return lines(given.greedy, rubric, model=model, drawn="greedy") + lines(given.sampled, rubric, model=model, drawn="sampled")


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
