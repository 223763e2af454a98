"""What a model or a finished run answers, and how often it is right: the work behind `posttrain eval` and `posttrain
sample`.

A run brings its own questions (a file that only posttrain writes), and its recipe says how they are asked: as in
training, with the same templates, sampling, environment and rewards. Options say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli import runs
from posttrain.cli.build import chosen, fill, loading, make_engine, make_rubric, read_drawing
from posttrain.cli.completions import lines
from posttrain.cli.figures import Answers, categories, compared, summary
from posttrain.cli.recipe import EvalSection, Recipe, read_recipe
from posttrain.data.mixture import load_data
from posttrain.data.overlap import overlap
from posttrain.data.prompts import to_tasks
from posttrain.data.sources import load_rows
from posttrain.errors import UserError, did_you_mean
from posttrain.io import read_json
from posttrain.methods import METHODS, Method
from posttrain.rewards.rubric import Rubric
from posttrain.types import Completion, Group, Sampling, Task

if TYPE_CHECKING:
    from posttrain.envs import Environment
    from posttrain.rewards.scoring import Report
    from posttrain.trainers.online.config import OnlineConfig

START = "start"  # --against start: the model that the run began with


@dataclass(frozen=True)
class EvalPlan:
    """What an evaluation is made of, after options, the run's own files and the recipe were asked in that order."""

    model: str
    data: str
    recipe: Recipe | None
    args: OnlineConfig  # how the run drew its completions and had them scored
    environment: Environment | None  # None: one question, one answer
    max_new_tokens: int | None  # None: as in `args`
    is_of_run: bool  # its rows already have prompt and answer: no template applies

    def sampling(self, stop_token_ids: tuple[int, ...]) -> Sampling:
        drawn = self.args.sampling(stop_token_ids)
        return drawn if self.max_new_tokens is None else replace(drawn, max_new_tokens=self.max_new_tokens)

    def rubric(self) -> Rubric:
        """The rewards with their weights, and the environment's own reward."""
        from posttrain.trainers.online.inputs import as_rubric

        given = make_rubric(self.recipe) if self.recipe is not None and self.recipe.rubric else Rubric("arithmetic")
        return as_rubric(given, self.args.reward_weights, self.environment)


@dataclass(frozen=True)
class Asking:
    """How a model is asked, besides greedily."""

    samples: int | None = None  # questions; None: the recipe's, else all
    generations: int = 0  # further answers to each, drawn at the temperature
    temperature: float | None = None  # None: as in training
    seed: int = 0
    by: str | None = None  # a column: accuracy for each of its values
    duplicates: bool = True  # compare the questions with the training data


def find_question(target: str, data: str | None, recipe_name: str | None, max_new_tokens: int | None) -> EvalPlan:
    run = runs.run_of(target)  # of a checkpoint too
    folder = Path(target).expanduser() if run is None else run.directory
    own_recipe, own_questions = folder / runs.RECIPE, folder / runs.QUESTIONS
    name = recipe_name or (str(own_recipe) if own_recipe.is_file() else None)
    recipe = read_recipe(name) if name else None
    is_of_run = data is None and own_questions.is_file()
    source = data or (str(own_questions) if is_of_run else None) or (recipe.eval.data if recipe else None)
    if source is None:
        raise UserError("nothing to ask: give --data FILE, or --recipe with eval.data")
    model = runs.model_of(target)
    if not is_of_run and (recipe is None or not recipe.rubric):
        raise UserError("nothing says what a right answer is: give --recipe with a recipe that has a rubric")
    environment = None if recipe is None else recipe.env.make()
    if recipe is None:
        args = METHODS["grpo"].config_class()(bf16=False)
    else:
        args = read_drawing(_kind(str(folder), recipe, is_own=recipe_name is None), recipe)
    return EvalPlan(model, source, recipe, args, environment, max_new_tokens or _tokens_of_run(folder), is_of_run)


def _kind(folder: str, recipe: Recipe, *, is_own: bool) -> Method:
    """Whose settings count: those of the run's own training, unless another recipe has no section for it; else the
    first online section's."""
    online = [kind for kind in METHODS.values() if kind.is_online]
    named = [kind for kind in online if getattr(recipe, kind.section)]
    trained = runs.method_of(folder)
    ran = [kind for kind in online if kind.recorded_as == trained and (is_own or kind in named)]
    return next(iter([*ran, *named]), METHODS["grpo"])


def _tokens_of_run(folder: Path) -> int | None:
    path = folder / runs.SUMMARY
    found = read_json(path).get("max_new_tokens") if path.is_file() else None
    if found is not None and not (isinstance(found, int) and found > 0):
        raise UserError(f"{path}: max_new_tokens is {found!r:.40}, not a number of tokens; give --max-new-tokens, or remove the file")
    return found


def evaluate(question: EvalPlan, asking: Asking, against: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the result, every completion as a line). What can be wrong with the questions is found before a model is
    asked."""
    rubric = question.rubric()
    try:
        tasks = questions(question, asking, rubric)
        other = None if against is None else _other(question, against)
        for asked in (question, *([] if other is None else [other])):
            check_prompts(asked, tasks)
        found = duplicates(question, tasks) if asking.duplicates else None
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
    if found is not None:
        result["duplicates"] = found
    return result, written


def _other(question: EvalPlan, against: str) -> EvalPlan:
    """The same questions for another model."""
    if against == START:
        if question.recipe is None or question.recipe.model.name is None:
            raise UserError("--against start: the run has no recipe that names the model it began with; give that model's name or directory")
        model = question.recipe.model.name
    else:
        model = runs.model_of(against)
    return replace(question, model=model)


def questions(question: EvalPlan, asking: Asking, rubric: Rubric) -> list[Task]:
    """The held-out rows with the templates of training."""
    from posttrain.models.load import load_tokenizer

    wanted = asking.samples or (question.recipe.eval.samples if question.recipe else None)
    rows = chosen(load_rows(question.data), EvalSection(samples=wanted))
    if question.recipe is not None and not question.is_of_run:
        rows = fill(rows, question.recipe.data, load_tokenizer(question.model))
    tasks = to_tasks(rows)
    rubric.check_columns(tasks[0].columns)
    columns = list(dict.fromkeys(column for task in tasks for column in task.columns))
    if asking.by is not None and asking.by not in columns:
        raise UserError(f"--by {asking.by}: the questions have no such column.{did_you_mean(asking.by, columns)} They have: {', '.join(columns)}.")
    return tasks


def check_prompts(question: EvalPlan, tasks: Sequence[Task]) -> None:
    """Raises UserError, which names the model, for prompts that its tokenizer cannot write."""
    from posttrain.data.chat import encode_task
    from posttrain.data.turns import TurnTokens
    from posttrain.envs.formats import find_parser
    from posttrain.models.load import load_tokenizer
    from posttrain.rollout.episodes import EpisodeStage
    from posttrain.trainers.online.environment import first_prompts

    tokenizer, environment, keywords = load_tokenizer(question.model), question.environment, question.args.chat_template_kwargs or {}
    try:
        if environment is None:
            for task in tasks:
                encode_task(tokenizer, task, keywords)
            return
        if environment.tools:
            find_parser(tokenizer, environment.call_format)
        first_prompts(environment, EpisodeStage(environment.make, TurnTokens(tokenizer, (), tools=environment.tools, **keywords)), tasks)
    except UserError as error:
        raise UserError(f"{question.model} cannot be asked: {error}") from error


def ask(question: EvalPlan, asking: Asking, tasks: Sequence[Task], rubric: Rubric) -> Answers:
    """One greedy answer to each, and if wanted several at the temperature."""
    from posttrain.evaluate import answers
    from posttrain.models.load import load_tokenizer, stop_token_ids
    from posttrain.trainers.online.inputs import place_reward_models

    model, tokenizer, args = _load(question.model, question.recipe), load_tokenizer(question.model), question.args
    place_reward_models(rubric, model.device)
    reports: list[Report] = []
    played: dict[str, Any] = {
        "engine": make_engine(args, tokenizer),
        "environment": question.environment,
        "max_turns": args.max_turns,
        "max_turn_tokens": args.max_turn_tokens,
        "reward_policy": args.reward_policy,
        "env_on_error": args.env_on_error,
        "skip_special_tokens": args.skip_special_tokens,
        "on_report": reports.append,
        **(args.chat_template_kwargs or {}),
    }
    sampling = question.sampling(stop_token_ids(model, tokenizer))
    sampled: list[Group] = []
    greedy = answers(model, tokenizer, tasks, rubric, replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=None), **played)
    if asking.generations:
        drawn = sampling if asking.temperature is None else replace(sampling, temperature=asking.temperature)
        sampled = answers(model, tokenizer, tasks, rubric, drawn, num_generations=asking.generations, seed=asking.seed, **played)
    return Answers(greedy, sampled, [how for report in reports for how in report.broken])


def duplicates(question: EvalPlan, tasks: Sequence[Task]) -> dict[str, Any]:
    """Questions that the run was trained on, or why that is not known."""
    data = None if question.recipe is None else question.recipe.data
    if data is None or data.train is None:
        return {"unknown": "no recipe names the training data"}
    from posttrain.models.load import load_tokenizer

    try:
        rows = fill(load_data(data.train, streaming=data.streaming), data, load_tokenizer(question.model))
        first = next(iter(rows), {})
        if "prompt" not in first:
            return {"unknown": f"the training data have no prompts, but: {', '.join(map(str, first)) or 'no rows'}"}
        found = overlap((row["prompt"] for row in rows if row.get("prompt") is not None), [task.prompt for task in tasks])
    except (UserError, OSError) as error:  # the data of an old run may be gone: that is no reason not to examine it
        return {"unknown": str(error)}
    example = next(iter([*found.exact, *found.normalised]), None)
    return {"exact": len(found.exact), "normalised": len(found.normalised), "example": None if example is None else tasks[example].prompt}


def _lines(model: str, given: Answers, rubric: Rubric) -> list[dict[str, Any]]:
    return lines(given.greedy, rubric, model=model, drawn="greedy") + lines(given.sampled, rubric, model=model, drawn="sampled")


def complete(target: str, text: str, system: str | None, n: int, sampling: Sampling, seed: int) -> list[Completion]:
    """n completions of one prompt; a conversation where the tokenizer has a chat template."""
    from posttrain.models.load import load_tokenizer
    from posttrain.policy import Policy

    name = runs.model_of(target)
    tokenizer = load_tokenizer(name)
    if system and not tokenizer.chat_template:
        raise UserError(f"{target} has no chat template, so there is no place for --system; put it into the prompt")
    messages = [{"role": "system", "content": system}] if system else []
    prompt = [*messages, {"role": "user", "content": text}] if tokenizer.chat_template else text
    return Policy(_load(name, None), tokenizer).sample(prompt, n=n, seed=seed, **asdict(sampling))[0].completions


def _load(name: str, recipe: Recipe | None) -> Any:
    """The model as the run that left it has it (`recipe`: for what no run left), on the GPU where there is one."""
    import torch

    from posttrain.models.load import is_quantised
    from posttrain.models.merge import load_trainable

    model: Any = load_trainable(name, **loading(name, recipe))
    return model.to("cuda") if torch.cuda.is_available() and not is_quantised(model) else model  # packed weights are where they were packed
