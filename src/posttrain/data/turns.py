"""The tokens between two turns of the policy: only what is new is rendered and tokenized, behind the tokens that were
sampled.

The chat template is asked with a stand-in conversation of two messages, so what the policy really wrote is never
rendered. Templates that rewrite earlier messages are refused, but for one thing: some drop a finished thought
(<think>...</think>) from earlier replies. Here a thought stays as it was sampled, since what the policy has seen is
what it must be trained on.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.characters import encodable
from posttrain.data.chat import encode_continuation, encode_prompt, render
from posttrain.data.formats import template_keywords
from posttrain.errors import UserError
from posttrain.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "XstandXinX"  # letters alone: no template and no JSON writes it differently
_ANSWER = "YanswersY"
_CALL_ID = "call00000"  # nine letters and digits, as Mistral's templates want
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


class TurnTokens:
    """A model's conversation as tokens. `parse` turns the text of one turn into a message (`envs.formats`); None: the
    text is the content."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        *,
        tools: Sequence[dict[str, Any]] = (),
        parse: Callable[[str], Message] | None = None,
        skip_special_tokens: bool = True,
        **chat_template_kwargs: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stop_token_ids)
        self.parse, self.skips = parse, skip_special_tokens
        self.template: dict[str, Any] = chat_template_kwargs | ({"tools": list(tools)} if tools else {})
        self._stop_texts = [str(tokenizer.decode([id])) for id in self.stops]
        special = sorted({re.escape(token) for token in _special_tokens(tokenizer)}, key=lambda text: (-len(text), text))
        self._special = re.compile("|".join(special)) if special else None

    def encode(self, prompt: Prompt) -> list[int]:
        """[P] ids of the first prompt and the opening of the policy's turn."""
        return encode_prompt(self.tokenizer, prompt, **({} if isinstance(prompt, str) else self.template))

    def with_row(self, columns: Mapping[str, Any]) -> TurnTokens:
        """The same with a row's `tools` and `chat_template_kwargs`. Raises UserError for tools beside the environment's
        own."""
        keywords = template_keywords(columns)
        if "tools" in keywords and "tools" in self.template:
            raise UserError("it has `tools`, but the environment brings its own; remove the column")
        made = copy.copy(self)
        made.template = self.template | keywords
        return made

    def message(self, token_ids: Sequence[int]) -> Message:
        """What the policy said: its content without special tokens, and its tool calls where there are tools."""
        ids = list(token_ids[:-1]) if token_ids and token_ids[-1] in self.stops else list(token_ids)
        if self.parse is None:
            return {
                "role": "assistant",
                "content": str(self.tokenizer.decode(ids if self.skips else list(token_ids), skip_special_tokens=self.skips)),
            }
        return {"role": "assistant", **self.parse(str(self.tokenizer.decode(ids, skip_special_tokens=False)))}

    def between(self, token_ids: Sequence[int], messages: list[Message]) -> list[int]:
        """Ids that follow the turn `token_ids`: its end, unless it was sampled, then the messages and the opening of
        the next turn."""
        text = self._behind([self._plain(message) for message in messages])
        if token_ids[-1] in self.stops:
            text = text[len(self._stop_at(text, 0)) :]
        return encode_continuation(self.tokenizer, text)

    def check(self, role: str) -> None:
        """Raises UserError, with the reason, for a template that cannot go on after a message of `role` without
        rewriting what stands before."""
        new: list[Message] = [{"role": role, "content": _ANSWER, **_call_of(role)}]
        if _ANSWER not in self._behind(new):
            raise UserError(
                f"the model's chat template drops what a message of '{role}' says, so the model would never see it; set one that writes it"
            )
        turns: list[Message] = [{"role": "user", "content": "x"}, _spoken(new), *new]
        once = _THOUGHT.sub("", render(self.tokenizer, turns, **self.template))
        twice = _THOUGHT.sub("", render(self.tokenizer, [*turns, _spoken(new), *new], **self.template))
        if not twice.startswith(once.rstrip()):
            raise UserError(_rewrites(role))

    def _behind(self, new: list[Message]) -> str:
        """What the template writes from the end of a turn on, when `new` follows it."""
        turn: list[Message] = [{"role": "user", "content": "x"}, _spoken(new)]
        head, _, end = render(self.tokenizer, turn, **self.template).partition(_STAND_IN)
        new_head, _, text = render(self.tokenizer, [*turn, *new], add_generation_prompt=True, **self.template).partition(_STAND_IN)
        if _THOUGHT.sub("", head) != _THOUGHT.sub("", new_head):
            raise UserError(_rewrites(new[0]["role"]))
        ends = [place for stop in self._stop_texts if (place := end.find(stop)) >= 0]
        if not ends:
            raise UserError(
                f"the chat template does not end the assistant's turn with a stop token ({', '.join(self._stop_texts) or 'there is none'}), so the "
                "next message could not be told from the turn; set tokenizer.eos_token to the token that the template writes there"
            )
        closing, rest = end[: min(ends)], end[min(ends) :]
        if not text.startswith(closing + rest.rstrip()):
            raise UserError(_rewrites(new[0]["role"]))
        return text[len(closing) :]

    def _stop_at(self, text: str, place: int) -> str:
        return next(stop for stop in sorted(self._stop_texts, key=len, reverse=True) if text.startswith(stop, place))

    def _plain(self, message: Message) -> Message:
        """The message with special tokens in its texts broken up: an answer cannot end its own turn or begin
        another's."""
        texts = {key: self._broken_up(value) for key, value in message.items() if key != "role"}
        return {**message, **texts, **(_call_of(message["role"]) if "tool_call_id" not in message else {})}

    def _broken_up(self, value: Any) -> Any:
        """Every text within the value: of a content of several blocks too, and a tool's name, which the policy
        wrote."""
        if isinstance(value, Mapping):
            return {key: self._broken_up(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._broken_up(inner) for inner in value]
        if not isinstance(value, str):
            return value
        text = encodable(value)
        return text if self._special is None else self._special.sub(lambda found: found[0][0] + " " + found[0][1:], text)


def _call_of(role: str) -> dict[str, str]:
    return {"name": "x", "tool_call_id": _CALL_ID} if role == "tool" else {}


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Those that have a name, and those that only templates write."""
    try:
        control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    except (AttributeError, NotImplementedError):  # mistral-common's tokenizer keeps no such table
        control = set()
    return control | set(tokenizer.all_special_tokens)


def _spoken(new: list[Message]) -> Message:
    """The policy's turn before `new`: a tool call where tools answer, since some templates insist on one."""
    if new[0]["role"] != "tool":
        return {"role": "assistant", "content": _STAND_IN}
    return called({"value": _STAND_IN})


def called(arguments: dict[str, Any], name: str = "x") -> Message:
    """A message of the assistant that calls one tool."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": _CALL_ID, "type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def _rewrites(role: str) -> str:
    return (
        f"the model's chat template writes a conversation differently once a message of '{role}' follows, so what the policy saw could not be what it "
        "is trained on; set a template that only appends (tokenizer.chat_template)"
    )
