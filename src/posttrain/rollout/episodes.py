"""One rollout in the making: the policy's turns, the environment's answers, and the limits on both. Tokens are only
ever appended.

An answer's tokens are attended to and never trained on (`sampled` is False). Nothing that the policy wrote is decoded
and encoded again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, SupportsFloat

from posttrain.errors import EnvError, UserError
from posttrain.event_loops import settled
from posttrain.types import Completion, Env, Message, Prompt, Request, RequestOutput, Sampling, StopReason, Task

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # of a row: they go to the chat template
GIVE_UP_SECONDS = 10.0  # that environments may take to free what they hold once training ends


class ChatTokens(Protocol):
    """Messages as tokens (`data.turns.TurnTokens`)."""

    def encode(self, prompt: Prompt) -> list[int]:
        """[P] ids of the first prompt, the opening of the policy's turn included."""
        ...

    def message(self, token_ids: Sequence[int]) -> Message:
        """What the policy said in one turn."""
        ...

    def between(self, token_ids: Sequence[int], messages: list[Message]) -> list[int]:
        """What follows the policy's turn `token_ids`: its end, if it was not sampled, the messages, and the opening of
        its next turn."""
        ...

    def with_row(self, columns: Mapping[str, Any]) -> ChatTokens:
        """The same with a row's `tools` and keywords of the chat template."""
        ...


@dataclass(frozen=True)
class EpisodeStage:
    """Where episodes are played. The whole of a completion, answers included, has `Sampling.max_new_tokens`."""

    make: Callable[[Task], Env]
    chat: ChatTokens
    max_turns: int | None = None  # of the policy; None: as many as fit
    max_turn_tokens: int | None = None  # of one turn; None: what is left of the whole
    on_error: str = "stop"  # an environment that breaks: "stop" raises EnvError, "drop" ends the episode, which nobody scores

    def chat_of(self, task: Task) -> ChatTokens:
        """The chat with what the task's row gives to the chat template, if it gives anything."""
        return self.chat.with_row(task.columns) if any(task.columns.get(name) for name in TEMPLATE_COLUMNS) else self.chat


class Episode:
    """Grows one rollout. `env` None: the policy speaks once."""

    def __init__(
        self, task: Task, prompt_ids: Sequence[int], key: tuple[int, ...], sampling: Sampling, stage: EpisodeStage | None, env: Env | None
    ) -> None:
        self.task, self.key, self.sampling = task, key, sampling
        self.stage, self.env = stage, env
        self.is_over = False
        self.is_let_go = False  # its environment was told that it is over
        self._turn: list[int] = []  # tokens of the policy's latest turn
        self.chat = None if stage is None else stage.chat_of(task)
        has_messages = env is not None or not isinstance(task.prompt, str)
        self.completion = Completion(list(prompt_ids), [], [], [], [], StopReason.LENGTH, "", [] if has_messages else None, turns=0)
        if stage is not None and stage.max_turns is not None:
            self.completion.info["out_of_turns"] = 0.0

    def request(self, id: int) -> Request:
        """The policy's next turn. Only the turn's number changes in the key of its random numbers."""
        room = self.sampling.max_new_tokens - len(self.completion.token_ids)
        if self.stage is not None and self.stage.max_turn_tokens is not None:
            room = min(room, self.stage.max_turn_tokens)
        turn = self.completion.turns
        sampling = self.sampling if room == self.sampling.max_new_tokens else replace(self.sampling, max_new_tokens=room)
        return Request(id, (*self.completion.prompt_ids, *self.completion.token_ids), sampling, (*self.key, turn))

    def hear(self, output: RequestOutput, decode: Callable[[list[int]], str]) -> None:
        """The policy's turn. One that was cut ends the episode: half a sentence is no move."""
        completion, ids = self.completion, output.token_ids
        self._extend(ids, True, output.logps, output.sampled_logps)
        completion.text, completion.stop, completion.policy_version = decode(ids), output.stop, output.policy_version
        completion.turns += 1
        if completion.messages is not None:
            said = {"role": "assistant", "content": completion.text} if self.chat is None else self.chat.message(ids)
            completion.messages.append(said)
        self.is_over = self.env is None or completion.is_truncated
        self._turn = ids

    def answer(self, messages: Any) -> None:
        """The environment's answer, if there is one, a turn is left for it, and it fits. One that does not fit is left
        out whole.

        An EnvError is the answer of an environment that broke.
        """
        assert self.stage is not None
        completion = self.completion
        if messages is None:
            self.is_over = True
            return
        if (problem := messages if isinstance(messages, EnvError) else self._problem(messages)) is not None:
            self.fail(problem)
            return
        if self.stage.max_turns is not None and completion.turns >= self.stage.max_turns:
            self.is_over = True
            completion.info["out_of_turns"] = 1.0
            return
        assert self.chat is not None
        ids = self.chat.between(self._turn, messages)
        if len(completion.token_ids) + len(ids) >= self.sampling.max_new_tokens:
            self.is_over, completion.stop = True, StopReason.LENGTH
            return
        assert completion.messages is not None
        completion.messages.extend(messages)
        nothing = [0.0] * len(ids)
        self._extend(ids, False, nothing, nothing)

    def _extend(self, ids: list[int], sampled: bool, logps: list[float], sampled_logps: list[float]) -> None:
        self.completion.token_ids.extend(ids)
        self.completion.sampled.extend([sampled] * len(ids))
        self.completion.logps.extend(logps)
        self.completion.sampled_logps.extend(sampled_logps)

    def reply(self) -> Any:
        assert self.env is not None
        return self.env.reply(self.completion)

    def finish(self) -> Any:
        assert self.env is not None
        self.is_let_go = True
        return self.env.finish(self.completion)

    def end(self, finished: Any) -> None:
        """The environment let go, with an EnvError where it broke over that. What it reports is made plain numbers."""
        if isinstance(finished, EnvError):
            self.fail(finished)
        said, self.completion.info = self.completion.info, {}
        for name, value in said.items():
            if (number := _number(value)) is not None:
                self.completion.info[name] = number
            else:
                self.fail(EnvError(f"{self.name} reports {name}={str(value)[:80]!r} for prompt {self.task.id}; rollout.info holds numbers only"))

    def fail(self, error: EnvError) -> None:
        """Raises the error, unless such episodes are dropped: then this one is over, and the first error is kept."""
        assert self.stage is not None
        if self.stage.on_error == "stop":
            raise error
        trace = "" if error.__cause__ is None else "".join(traceback.format_exception(error.__cause__))
        self.is_over, self.completion.broken = True, self.completion.broken or f"{error}\n{trace}".rstrip()

    def _problem(self, messages: Any) -> EnvError | None:
        is_list = isinstance(messages, list) and messages
        if is_list and all(isinstance(message, dict) and "role" in message and "content" in message for message in messages):
            return None
        wanted = 'a list of messages such as [{"role": "user", "content": "..."}], or None to end the episode'
        return EnvError(f"{self.name} answered {str(messages)[:80]!r} for prompt {self.task.id}; it must answer with {wanted}")

    @property
    def name(self) -> str:
        return f"the environment {type(self.env).__name__}"


def broke(name: str, error: BaseException, where: str) -> EnvError:
    """The sentence for what user code raised. Raises UserError as it is: the input is wrong, and no policy goes on from
    there."""
    if isinstance(error, UserError):
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    line = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    made = EnvError(f"{name} raised {type(error).__name__}: {error}{line}, in {where}")
    made.__cause__ = error
    return made


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, SupportsFloat) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array of several numbers
        return None


def unplayed() -> Completion:
    """What an environment is finished with that was not played in: it gives no reward."""
    return Completion([], [], [], [], [], StopReason.LENGTH, "", [], turns=0)


def let_go(envs: Iterable[Env]) -> None:
    """`finish` of environments that nobody will play in any more. What comes of it is not heard: another error is on
    its way."""
    waiting = []
    for env in envs:
        with contextlib.suppress(Exception, SystemExit):
            waiting.append(env.finish(unplayed()))
    with contextlib.suppress(concurrent.futures.TimeoutError):
        settled(waiting, GIVE_UP_SECONDS)


def _begun(task: Task, stage: EpisodeStage, envs: list[Env]) -> Prompt:
    """The prompt of one more environment, which joins `envs` as soon as it is made."""
    name = "an environment"
    try:
        envs.append(stage.make(task))
        name = f"the environment {type(envs[-1]).__name__}"
        return envs[-1].start()
    except (Exception, SystemExit) as error:
        raise broke(name, error, f"the beginning of prompt {task.id}") from error


def opened(task: Task, stage: EpisodeStage, count: int) -> tuple[list[Env], list[int]]:
    """`count` environments of a task, and the prompt with which all of them start. Raises UserError where they do not,
    EnvError for one that breaks."""
    envs: list[Env] = []
    try:
        starts = [_begun(task, stage, envs) for _ in range(count)]
        _check_starts(task, envs, starts)
        return envs, stage.chat_of(task).encode(starts[0])
    except BaseException:
        let_go(envs)
        raise


def _check_starts(task: Task, envs: Sequence[Env], starts: Sequence[Prompt]) -> None:
    for env, start in zip(envs, starts, strict=True):
        if inspect.isawaitable(start):
            raise UserError(f"{type(env).__name__}.start must be a plain function; `reply` and `finish` may be coroutines")
        if start != starts[0]:
            raise UserError(
                f"{type(env).__name__} starts prompt {task.id} in different ways, so its completions cannot be compared; "
                "draw what is random from the row (a column `seed`, say)"
            )
