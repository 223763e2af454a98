"""The nouns and the protocols. Standard library only: every other room of the house may import this one.

P prompt tokens, G completions per group, R tokens after the prompt. Tokens are the truth; text is a view of them.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

Message = dict[str, Any]  # {"role": "user", "content": "..."}; tool calls as in transformers' chat templates
Prompt = str | list[Message]
ROUNDING = 1e-12  # rewards that differ by less than this part of their summands are equal: 0.1 + 0.2 is 0.3


class StopReason(str, Enum):
    """Why a completion ended. A truncated completion is LENGTH, whatever its last token is."""

    STOP = "stop"  # the model sampled a stop token, or its text reached a stop string
    LENGTH = "length"  # the token limit came first


@dataclass(frozen=True)
class Task:
    """One dataset row: a prompt and the columns that rewards may ask for."""

    id: int  # position in the dataset; with seed and step it keys the randomness of its completions
    prompt: Prompt
    columns: dict[str, Any] = field(default_factory=dict)  # every column but the prompt


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature=0` is greedy; 0, 1.0 and None switch top_k, top_p and min_p off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One completion to be drawn. Requests with equal `prompt_ids` share one computation of the prompt."""

    id: int  # unique within a `serving` block; completions carry it back
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    key: tuple[int, ...]  # (seed, step, task id, sample index, turn): all that its random numbers depend on


@dataclass(frozen=True)
class RequestOutput:
    """What an engine answers to a Request: R sampled tokens (the stop token included) with the log-prob of each under
    the policy."""

    request_id: int
    token_ids: list[int]  # [R]
    logps: list[float]  # [R] full softmax at the temperature: what the trainer's ratio compares with
    sampled_logps: list[float]  # [R] after top-k/top-p/min-p: the distribution that was sampled
    stop: StopReason
    policy_version: int


@dataclass
class Completion:
    """One prompt with one completion, which may hold several turns. `reward` is None when it could not be scored."""

    prompt_ids: list[int]  # [P]
    token_ids: list[int]  # [R] everything after the prompt
    sampled: list[bool]  # [R] True where the policy drew the token; only these are trained
    logps: list[float]  # [R] full softmax at the temperature; 0.0 where not sampled
    sampled_logps: list[float]  # [R] of the truncated distribution; 0.0 where not sampled
    stop: StopReason
    text: str  # the policy's last turn, decoded without special tokens: what rewards read
    messages: list[Message] | None = None  # the completion as messages, for conversational prompts; every turn and every answer to it
    scores: dict[str, float | None] = field(default_factory=dict)  # reward name -> score; None: could not be scored
    reward: float | None = None  # weighted total of the scores
    policy_version: int = 0
    turns: int = 1  # how often the policy spoke
    info: dict[str, float] = field(default_factory=dict)  # what its environment reports; "reward" is its own reward
    broken: str | None = None  # how its environment broke, where such episodes are dropped: nobody can score it

    @property
    def sampled_ids(self) -> list[int]:
        """What the policy itself said, all turns of it: `token_ids` without answers and the template's text between
        turns."""
        return [token for token, sampled in zip(self.token_ids, self.sampled, strict=True) if sampled]

    @property
    def is_truncated(self) -> bool:
        return self.stop is StopReason.LENGTH


@dataclass
class Group:
    """One prompt and its G completions: the unit of sampling, scoring and learning."""

    task: Task
    completions: list[Completion]  # [G]

    @property
    def rewards(self) -> list[float | None]:  # [G]
        return [completion.reward for completion in self.completions]

    @property
    def has_signal(self) -> bool:
        """Whether any two scored completions got different rewards: without that, nothing can be compared. The rounding
        of sums is no difference."""
        scored = [reward for reward in self.rewards if reward is not None]
        return bool(scored) and max(scored) - min(scored) > ROUNDING * max(map(abs, scored))


class Engine(Protocol):
    """Draws completions. `local` runs the very module that trains; `hf` is the slow oracle."""

    def serving(self, model: Any, version: int) -> AbstractContextManager[None]:
        """Rollout mode: `model` in eval, KV memory taken on entry and freed on exit. `submit` and `step` work inside it
        only."""
        ...

    def submit(self, request: Request) -> None:
        """Queue a request. Admission is in order of submission."""
        ...

    def step(self) -> list[RequestOutput]:
        """Decode at least one token for every active request; return the completions that finished, in order of request
        id."""
        ...


class Env(Protocol):
    """One episode: what the policy is asked and what it is answered. Made for one rollout and never reset. Inherit from
    it for `finish`.

    `reply` and `finish` may be coroutines; those of all episodes that wait at the same moment run together.
    """

    def start(self) -> Prompt:
        """The conversation that the policy answers first. Equal for all completions of a task: they are compared with
        each other."""
        ...

    def reply(self, completion: Completion) -> list[Message] | Awaitable[list[Message] | None] | None:
        """The messages that follow the policy's latest turn (`completion.messages[-1]`, `completion.text`); None ends
        the episode.

        Called after every turn that the policy ended itself, not after one that was cut.
        """
        ...

    def finish(self, completion: Completion) -> Awaitable[None] | None:
        """The episode is over, for whatever reason: put numbers into `completion.info`, free what was held.

        Called once, also of one that was made only to see its prompt or was given up in the middle because training
        ends: there `completion.turns` is 0.
        """
        return None
