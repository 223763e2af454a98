"""Tasks against an engine: G completions for each, as groups. Knows nothing of rewards or tensors.

A group is a position in the batch: the same prompt, even the same task, twice in a batch makes two groups with their own random numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from posttrain.rollout.local.engine import LocalEngine
from posttrain.types import Completion, Engine, Group, Request, Rollout, Sampling, Task


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
) -> list[Group]:
    """Draw `num_generations` completions of each task's prompt (within `engine.serving`); groups in the order of tasks.

    decode: token ids to text without special tokens. on_group: called with each group as soon as its last completion is there, in the order
    in which groups finish; rewards can start then.
    """
    occurrences: Counter[int] = Counter()
    requests = []
    for position, (task, prompt) in enumerate(zip(tasks, prompt_ids, strict=True)):
        first = occurrences[task.id] * num_generations  # a second occurrence of a task draws samples that the first did not
        occurrences[task.id] += 1
        for index in range(num_generations):
            key = (seed, step, task.id, first + index, 0)
            requests.append(Request(position * num_generations + index, tuple(prompt), sampling, key))

    drawn: list[dict[int, Completion]] = [{} for _ in tasks]
    groups: list[Group | None] = [None] * len(tasks)
    for completion in run(engine, requests):
        position, index = divmod(completion.request_id, num_generations)
        drawn[position][index] = completion
        if len(drawn[position]) == num_generations:
            ordered = [drawn[position][index] for index in range(num_generations)]
            rollouts = [_rollout(tasks[position], prompt_ids[position], completion, decode) for completion in ordered]
            group = groups[position] = Group(tasks[position], rollouts)
            if on_group is not None:
                on_group(group)
    return [group for group in groups if group is not None]


def run(engine: Engine, requests: Iterable[Request]) -> Iterator[Completion]:
    """Submit all requests, then yield completions as they finish."""
    pending = set()
    for request in requests:
        engine.submit(request)
        pending.add(request.id)
    while pending:
        for completion in engine.step():
            pending.remove(completion.request_id)
            yield completion


def _rollout(task: Task, prompt_ids: Sequence[int], completion: Completion, decode: Callable[[list[int]], str]) -> Rollout:
    text = decode(completion.token_ids)
    return Rollout(
        prompt_ids=list(prompt_ids),
        token_ids=completion.token_ids,
        sampled=[True] * len(completion.token_ids),
        logprobs=completion.logprobs,
        sampled_logprobs=completion.sampled_logprobs,
        stop=completion.stop,
        text=text,
        messages=None if isinstance(task.prompt, str) else [{"role": "assistant", "content": text}],
        policy_version=completion.policy_version,
    )


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    engine: Engine | None = None,
    num_generations: int = 1,
    seed: int = 0,
) -> list[list[Completion]]:
    """`num_generations` completions of each tokenized prompt, in order, outside of any training. engine: None makes a local one."""
    engine = engine or LocalEngine(tokenizer)
    requests = [
        Request(position * num_generations + index, tuple(prompt), sampling, (seed, 0, position, index, 0))
        for position, prompt in enumerate(prompts)
        for index in range(num_generations)
    ]
    with engine.serving(model, version=0):
        completions = sorted(run(engine, requests), key=lambda completion: completion.request_id)
    return [completions[start : start + num_generations] for start in range(0, len(completions), num_generations)]
