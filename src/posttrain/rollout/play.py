"""Tasks against an engine: G completions for each, as groups. Knows nothing of rewards or tensors.

A group is a position in the batch: the same prompt, even the same task, twice in a batch makes two groups with their
own random numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from posttrain.event_loops import settled
from posttrain.rollout.episodes import Episode, EpisodeStage, broke, let_go, opened
from posttrain.rollout.local.engine import LocalEngine
from posttrain.types import Engine, Group, Request, RequestOutput, Sampling, Task


def play(
    tasks: Sequence[Task],
    prompt_ids: Sequence[Sequence[int]],
    engine: Engine,
    sampling: Sampling,
    *,
    num_generations: int,
    seed: int,
    step: int,
    decode: Callable[[list[int]], str],
    on_group: Callable[[Group], None] | None = None,
    stage: EpisodeStage | None = None,
) -> list[Group]:
    """Draw `num_generations` completions of each task's prompt (within `engine.serving`); groups in the order of tasks.

    decode: token ids to text without special tokens. on_group: called with each group as soon as its last completion is
    there, in the order in which groups finish; rewards can start then. stage: environments that answer the policy, and
    that say what the prompts are: then `prompt_ids` is not read. Raises EnvError for an environment that breaks, unless
    the stage drops such episodes (`Completion.broken`). Every environment is finished once, whatever is raised.
    """
    left = [num_generations] * len(tasks)  # episodes of each group that go on
    groups: list[Group | None] = [None] * len(tasks)
    with _episodes(tasks, prompt_ids, sampling, num_generations, (seed, step), stage) as episodes:
        for number in _played(episodes, engine, decode):
            position = number // num_generations
            left[position] -= 1
            if not left[position]:
                members = episodes[position * num_generations : (position + 1) * num_generations]
                group = groups[position] = Group(tasks[position], [episode.completion for episode in members])
                if on_group is not None:
                    on_group(group)
    return [group for group in groups if group is not None]


@contextmanager
def _episodes(
    tasks: Sequence[Task], prompt_ids: Sequence[Sequence[int]], sampling: Sampling, count: int, key: tuple[int, int], stage: EpisodeStage | None
) -> Iterator[list[Episode]]:
    """All episodes, those of a task side by side. Environments that nobody finished let go at the end."""
    occurrences: Counter[int] = Counter()
    episodes: list[Episode] = []
    try:
        for position, task in enumerate(tasks):
            envs, ids = opened(task, stage, count) if stage is not None else ([None] * count, prompt_ids[position])
            first = occurrences[task.id] * count  # a second occurrence of a task draws samples that the first did not
            occurrences[task.id] += 1
            episodes += [Episode(task, ids, (*key, task.id, first + index), sampling, stage, env) for index, env in enumerate(envs)]
        yield episodes
    finally:
        let_go(episode.env for episode in episodes if episode.env is not None and not episode.is_let_go)


def _played(episodes: list[Episode], engine: Engine, decode: Callable[[list[int]], str]) -> Iterator[int]:
    """Numbers of episodes as they end. Environments answer, and the next turns are submitted, in the order of numbers
    and never of arrival."""
    for number, episode in enumerate(episodes):
        engine.submit(episode.request(number))
    running = len(episodes)
    while running:
        spoken = {completion.request_id % len(episodes): completion for completion in engine.step()}
        for number, completion in sorted(spoken.items()):
            episodes[number].hear(completion, decode)
        asked = [episodes[number] for number in sorted(spoken) if not episodes[number].is_over]
        for episode, answer in zip(asked, _called(asked, "reply"), strict=True):
            episode.answer(answer)
        over = [number for number in sorted(spoken) if episodes[number].is_over]
        ended = [episodes[number] for number in over if episodes[number].env is not None]
        for episode, finished in zip(ended, _called(ended, "finish"), strict=True):
            episode.end(finished)
        for number in sorted(spoken.keys() - set(over)):
            episode = episodes[number]
            engine.submit(episode.request(episode.completion.turns * len(episodes) + number))  # an id that no other turn has
        running -= len(over)
        yield from over


def _called(episodes: list[Episode], method: str) -> list[Any]:
    """What `method` (reply, finish) of each episode's environment answers, an EnvError where it raised; coroutines are
    awaited together."""
    answers: list[Any] = []
    for episode in episodes:
        try:
            answers.append(getattr(episode, method)())
        except (Exception, SystemExit) as error:  # sys.exit() in an environment must not end training without a word
            answers.append(error)
    return [
        broke(episode.name, answer, f"{method} of prompt {episode.task.id}") if isinstance(answer, (Exception, SystemExit)) else answer
        for episode, answer in zip(episodes, settled(answers), strict=True)
    ]


def run(engine: Engine, requests: Iterable[Request]) -> Iterator[RequestOutput]:
    """Submit all requests, then yield completions as they finish."""
    pending = set()
    for request in requests:
        engine.submit(request)
        pending.add(request.id)
    while pending:
        for completion in engine.step():
            pending.remove(completion.request_id)
            yield completion


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    engine: Engine | None = None,
    num_generations: int = 1,
    seed: int = 0,
) -> list[list[RequestOutput]]:
    """`num_generations` completions of each tokenized prompt, in order, outside of any training. engine: None makes a
    local one."""
    engine = engine or LocalEngine(tokenizer)
    requests = [
        Request(position * num_generations + index, tuple(prompt), sampling, (seed, 0, position, index, 0))
        for position, prompt in enumerate(prompts)
        for index in range(num_generations)
    ]
    with engine.serving(model, version=0):
        completions = sorted(run(engine, requests), key=lambda completion: completion.request_id)
    return [completions[start : start + num_generations] for start in range(0, len(completions), num_generations)]
