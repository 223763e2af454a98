"""Scalar heads: a value head beside the LM head of a policy, and reward models, which are transformers' sequence
classifiers with one label.

A reward model's score is that of a completion's last token. On a stream all completions of a prompt are scored in one
forward, and a model that cannot take a stream goes in padded rows. For the length of a forward the classifier's head
answers for every position.

S stream tokens, D hidden, B rows (one a completion), T columns (the longest completion), L the longest row of a padded
chunk.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.models.adapter_files import base_of, is_adapter, is_scorer, put_adapters
from posttrain.models.head import base_model, linear_in_use, replaced
from posttrain.models.layout import TrainLayout
from posttrain.models.load import check_exists, explained, load_model, prepare_model
from posttrain.models.merge import load_merged, merge_adapters
from posttrain.models.rows import unroll
from posttrain.models.seeding import seeded
from posttrain.models.support import score_support
from posttrain.ops.attention import layout_kwargs

if TYPE_CHECKING:
    from posttrain.data.stream import Stream

logger = logging.getLogger(__name__)

HEAD = "score"  # what decoder-only classifiers of transformers call their head
VALUE_HEAD = "value_head"


class ValueHead(nn.Module):
    """Hidden states (M, D) -> values (M,). Starts at 0, so that an untrained head changes no advantage."""

    def __init__(self, width: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, device=device, dtype=torch.promote_types(dtype, torch.float32))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype))[:, 0]


def add_value_head(model: nn.Module) -> ValueHead:
    """A value head inside `model` (so that it is trained, moved and wrapped with it), reading what the LM head
    reads."""
    base = base_model(model)
    lm_head = linear_in_use(base.get_output_embeddings())
    head = ValueHead(lm_head.in_features, device=base.device, dtype=base.dtype)
    base.add_module(VALUE_HEAD, head)
    return head


@contextmanager
def without_submodule(model: nn.Module, name: str) -> Iterator[None]:
    """`model` as it was before the submodule was added: what is saved inside is a plain language model."""
    base = base_model(model)
    module = base._modules.pop(name)
    try:
        yield
    finally:
        base.add_module(name, module)


def load_reward_model(name: str, *, seed: int = 0, is_trainable: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A classifier with one label from a directory or the hub; a causal language model there gets a new head. `kwargs`
    as for `load_model`.

    Adapters of a reward model come merged, or with `is_trainable` on the model that they belong to; those of a language
    model are merged first.
    """
    check_exists(name)
    if is_scorer(name):
        base = load_reward_model(base_of(name), seed=seed, **kwargs)
        adapted: Any = put_adapters(base, name, is_trainable=is_trainable, seed=seed)
        return adapted if is_trainable else merge_adapters(adapted)
    if is_adapter(name):
        return reward_model(load_merged(name, seed=seed, **kwargs), seed=seed)
    is_classifier = has_score(name, trust_remote_code=kwargs.get("trust_remote_code", False))
    model = load_model(name, auto=AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM, seed=seed, **kwargs)
    return reward_model(model, seed=seed)


def has_score(name: str, *, trust_remote_code: bool = False) -> bool:
    """Whether the model or the adapters of that name were trained to score: a language model's new head would score at
    random."""
    if is_adapter(name):
        return is_scorer(name)
    check_exists(name)
    with explained(f"the model '{name}'"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return any(str(kind).endswith("ForSequenceClassification") for kind in config.architectures or ())


def reward_model(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """`model` if it is a classifier with one label; around a causal language model's backbone (not a copy) a classifier
    with a new head.

    Raises UserError for a classifier with more labels, and for models that transformers has no decoder-only classifier
    for.
    """
    if type(model).__module__.startswith("peft."):
        raise UserError("a reward model cannot be made from a model that has adapters already; merge them first, and give peft_config for new ones")
    if isinstance(getattr(model, HEAD, None), nn.Linear):
        if getattr(model, HEAD).out_features != 1:
            raise UserError(f"a reward model has one label, but this {type(model).__name__} has {getattr(model, HEAD).out_features}")
        prepare_model(model)
        return model
    lm_head = model.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear):
        raise UserError(f"{type(model).__name__} is neither a causal language model nor a decoder-only sequence classifier; a reward model needs one")
    classifier = _classifier_around(model)
    head = skip_init(nn.Linear, lm_head.in_features, 1, bias=False, device=model.device, dtype=lm_head.weight.dtype)
    with seeded(seed), torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape) / lm_head.in_features**0.5)  # scores of size 1 on normed hidden states
    setattr(classifier, HEAD, head)
    prepare_model(classifier)
    return classifier


def _classifier_around(model: PreTrainedModel) -> PreTrainedModel:
    """The model's backbone in transformers' classifier; its own backbone is never allocated."""
    model.config.num_labels = 1
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(model.config)
    except ValueError as error:
        raise UserError(f"transformers has no sequence classifier for {model.config.model_type}, so no reward model can be made of it") from error
    if not isinstance(getattr(classifier, HEAD, None), nn.Linear):
        raise UserError(f"{type(classifier).__name__} does not score the last token of a decoder; use another model")
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    classifier.config = model.config  # the layers hold this very object
    return classifier


def with_own_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose padding is not its EOS. transformers' classifiers score the last token that is not padding: with EOS
    as padding that would be the token before it. Without another special token the copy has no padding, and
    transformers refuses batches of it."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        others = [token for token in tokenizer.all_special_tokens if tokenizer.convert_tokens_to_ids(token) != tokenizer.eos_token_id]
        tokenizer.pad_token = others[0] if others else None
    return tokenizer


class StreamScores(NamedTuple):
    """Float32 (float64 for a float64 model), with gradients."""

    states: torch.Tensor  # (B, T) at the state before each target; 0 where there is no target
    last: torch.Tensor  # (B,) at each row's last token: a reward model's score


ScoresFn = Callable[[nn.Module, "Stream"], StreamScores]


def make_scores(model: nn.Module) -> ScoresFn:
    """The way that this classifier can go: streams, or padded rows with a warning that names the reason."""
    reason = score_support(model, _row_scores, _position_scores)
    if reason is None:
        return stream_scores
    logger.warning("prompts are computed once per completion, in padded rows: %s", reason)
    return padded_scores


def stream_scores(model: nn.Module, stream: Stream) -> StreamScores:
    """One call of `model`, as it is wrapped, on the packed stream."""
    scores = _position_scores(model, stream.input_ids, stream.position_ids, TrainLayout(stream.segments, stream.device))  # (S,)
    return StreamScores(stream.scatter(scores[stream.logit_index]), scores[stream.last_index])


def padded_scores(model: nn.Module, stream: Stream) -> StreamScores:
    """One right-padded row per completion."""
    states, order, last = [], [], []
    for rows in unroll(stream):
        scores = _row_scores(model, rows.input_ids, rows.attention_mask).flatten()  # (rows * L,)
        states.append(scores[rows.predicted_by])
        order.append(rows.chosen)
        last.append(scores[rows.last])
    return StreamScores(stream.scatter(torch.cat(states)[torch.cat(order).argsort()]), torch.cat(last))


def _position_scores(model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, layout: TrainLayout) -> torch.Tensor:
    """(S,) -> (S,)"""
    with _every_position(model, rows=1):
        output = model(input_ids=input_ids[None], position_ids=position_ids[None], **layout_kwargs(layout, input_ids.device))
    return output.logits[0]


def _row_scores(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(rows, L) -> (rows, L)"""
    with _every_position(model, rows=len(input_ids)):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@contextmanager
def _every_position(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, `model(...).logits` are the scores of all positions, (rows, L). transformers takes those of the last
    token that is not padding; with a padding id that no token has (or none, for one row) that is the last place, at
    which the head has put all of them."""
    base = base_model(model)
    head = _EveryPosition(linear_in_use(getattr(base, HEAD)))
    with replaced(base.config.get_text_config(), "pad_token_id", None if rows == 1 else -1), replaced(base, HEAD, head):
        yield


class _EveryPosition(nn.Module):
    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, L, D) -> (rows, L, L) without copies, or (1, 1, L): at the last place stand the scores of all
        places"""
        dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            scores = hidden.to(dtype) @ self.head.weight[0].to(dtype)  # (rows, L)
        rows, length = scores.shape
        return scores[:, None] if rows == 1 else scores[:, None].expand(rows, length, length)
