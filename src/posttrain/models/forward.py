"""Log-probs of a stream under a model: (B, T), never (B, T, V). Two ways to the same numbers.

`logprobs` runs the stream as it is, each prompt once. `padded_logprobs` unrolls it into one padded row per completion,
for models whose layers cannot take a stream; `make_logprobs` chooses by trying. Neither touches gradients, modes or
autocast: those are the caller's.

S stream tokens, N targets, B rows (one a completion), T columns (the longest completion).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

from posttrain.models.head import HeadOutput, HeadRequest, answering, read
from posttrain.models.layout import TrainLayout
from posttrain.models.rows import unroll
from posttrain.models.support import stream_support
from posttrain.ops.attention import layout_kwargs

if TYPE_CHECKING:
    from posttrain.data.stream import Stream

logger = logging.getLogger(__name__)


class StreamLogprobs(NamedTuple):
    """(B, T) each, zero where there is no target. `logps`, `entropy` and values are float32 and carry gradients."""

    logps: torch.Tensor
    entropy: torch.Tensor
    argmax: torch.Tensor | None  # greedy tokens. None: not asked for
    sum_p2: torch.Tensor | None  # sum of the squared probabilities. None: not asked for
    values: torch.Tensor | None = None  # the scorer on the state before each target. None: there was no scorer
    last_values: torch.Tensor | None = None  # (B,) the scorer on the state after the last token. None: there was no scorer


Scorer = Callable[[torch.Tensor], torch.Tensor]  # hidden states (M, D) -> (M,)


class LogprobsFn(Protocol):
    """`logprobs` or `padded_logprobs`. `model` may be wrapped in PEFT and DDP; it is called as it is given.

    entropy_grad, and known_grad as (B, T): as `ops.linear_logprobs` takes them.
    """

    def __call__(
        self,
        model: nn.Module,
        stream: Stream,
        *,
        temperature: float = 1.0,
        want_argmax: bool = False,
        want_sum_p2: bool = False,
        scorer: Scorer | None = None,
        entropy_grad: bool = True,
        known_grad: torch.Tensor | None = None,
    ) -> StreamLogprobs: ...


def make_logprobs(model: nn.Module) -> LogprobsFn:
    """The way that `model` can go: streams, or padded rows with a warning that names the reason."""
    reason = stream_support(model)
    if reason is None:
        return logprobs
    logger.warning("prompts are computed once per completion, in padded rows: %s", reason)
    return padded_logprobs


def logprobs(
    model: nn.Module,
    stream: Stream,
    *,
    temperature: float = 1.0,
    want_argmax: bool = False,
    want_sum_p2: bool = False,
    scorer: Scorer | None = None,
    entropy_grad: bool = True,
    known_grad: torch.Tensor | None = None,
) -> StreamLogprobs:
    """One call of `model` on the packed stream. Its attention must be hooked (`models.load.prepare_model`)."""
    states = None if scorer is None else torch.cat([stream.logit_index, stream.last_index])
    picked_grad = None if known_grad is None else stream.gather(known_grad)
    request = HeadRequest(stream.logit_index, stream.targets, temperature, want_argmax, want_sum_p2, states, scorer, entropy_grad, picked_grad)
    layout = TrainLayout(stream.segments, stream.device)
    with answering(model, request):
        output = model(input_ids=stream.input_ids[None], position_ids=stream.position_ids[None], **layout_kwargs(layout, stream.device))
    return _scattered(stream, read(output.logits, request))


def padded_logprobs(
    model: nn.Module,
    stream: Stream,
    *,
    temperature: float = 1.0,
    want_argmax: bool = False,
    want_sum_p2: bool = False,
    scorer: Scorer | None = None,
    entropy_grad: bool = True,
    known_grad: torch.Tensor | None = None,
) -> StreamLogprobs:
    """One right-padded row per completion, in as many calls of `model` as `rows.MAX_TOKENS` makes necessary."""
    answers, order, last = [], [], []
    chunks = list(unroll(stream))
    if len(chunks) > 1:  # each would keep a gradient of the head until backward
        known_grad = None
    for rows in chunks:
        states = None if scorer is None else torch.cat([rows.predicted_by, rows.last])
        picked_grad = None if known_grad is None else stream.gather(known_grad)[rows.chosen]
        request = HeadRequest(
            rows.predicted_by, stream.targets[rows.chosen], temperature, want_argmax, want_sum_p2, states, scorer, entropy_grad, picked_grad
        )
        with answering(model, request):
            output = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
        answer = read(output.logits, request)
        if answer.scores is not None:
            values, after = answer.scores.tensor_split([len(rows.chosen)])
            answer = answer._replace(scores=values)
            last.append(after)
        answers.append(answer)
        order.append(rows.chosen)
    back = torch.cat(order).argsort()
    together: list[Any] = [None if parts[0] is None else torch.cat(parts)[back] for parts in zip(*answers, strict=True)]
    if last:
        together[-1] = torch.cat([together[-1], *last])
    return _scattered(stream, HeadOutput(*together))


def _scattered(stream: Stream, answer: HeadOutput) -> StreamLogprobs:
    *columns, scores = answer
    values, last_values = (None, None) if scores is None else scores.tensor_split([len(stream.targets)])
    logps, entropy, argmax, sum_p2, values = (None if column is None else stream.scatter(column) for column in (*columns, values))
    assert logps is not None
    assert entropy is not None
    return StreamLogprobs(logps, entropy, argmax, sum_p2, values, last_values)
