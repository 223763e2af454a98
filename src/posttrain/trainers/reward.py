"""A reward model learns from pairs which of two completions is better (Ouyang et al. 2022, eq. 1).

    loss = mean over pairs of -log sigmoid(score(chosen) - score(rejected) - margin) [+ coefficient * (score(chosen) + score(rejected))^2]

The score is that of a completion's last token, so chosen and rejected share their prompt's computation. What is saved
is transformers' own classifier with one label: it gives the same scores without this library.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.data.chat import encode_preference, encode_text, ended
from posttrain.data.formats import IMPLICIT_PREFERENCE, PREFERENCE
from posttrain.data.stream import PackItem, pack, split
from posttrain.errors import UserError, at_row
from posttrain.losses.reward import bradley_terry, centring, is_ordered
from posttrain.models.adapter_files import is_adapter
from posttrain.models.head import base_model
from posttrain.models.heads import HEAD, load_reward_model, make_scores, reward_model, with_own_padding
from posttrain.models.load import context_length, load_tokenizer
from posttrain.models.precision import make_trainable
from posttrain.trainers.core.base import MicroBatch
from posttrain.trainers.core.config import BaseConfig, as_config, setting, settings
from posttrain.trainers.core.starting import packing
from posttrain.trainers.offline.config import REFUSED
from posttrain.trainers.offline.rows import EncodedRow
from posttrain.trainers.offline.trainer import OfflineTrainer

logger = logging.getLogger(__name__)


@settings
@dataclass
class RewardConfig(BaseConfig):
    """per_device_train_batch_size counts pairs."""

    learns_from_pairs: ClassVar[bool] = True
    refused: ClassVar[dict[str, tuple[Any, str]]] = {
        "router_aux_loss_coef": REFUSED["router_aux_loss_coef"],
        "chat_template_path": (None, "set tokenizer.chat_template, and give the tokenizer as processing_class"),
        "eos_token": (None, "set tokenizer.eos_token, and give the tokenizer as processing_class"),
    }

    learning_rate: float = setting(1e-4, "AdamW's learning rate.")
    disable_dropout: bool = setting(True, "Set every dropout in the model to 0, so that scores can be compared.")
    max_length: int | None = setting(
        1024,
        "Tokens of a prompt with one completion. Of a longer pair, completions lose their end (but keep at least half of max_length), then the prompt "
        "loses its beginning, the same for both. No pair is dropped. None: only the model's context limits it.",
    )
    center_rewards_coefficient: float | None = setting(None, "Weight of (chosen + rejected)^2, which keeps scores around 0; 0.01 is usual.")
    shuffle_dataset: bool = setting(True, "A new order each epoch, drawn from (seed, epoch).")


@dataclass
class Pair(EncodedRow):
    """`completions` are the chosen and the rejected one."""

    margin: float = 0.0  # by how much the chosen one should be ahead


class RewardBatch(MicroBatch):
    """A stream of whole pairs: rows chosen, rejected, chosen, rejected..."""

    keeps_groups = True

    def __init__(self, items: list[PackItem], margins: list[float], weight: float, device: torch.device) -> None:
        super().__init__(items, device)
        self.margins = margins  # [pairs]
        self.weight = weight  # 1 / pairs of the update, times the number of processes

    def of(self, items: list[PackItem]) -> RewardBatch:
        margin_of = {tuple(item.row_ids or ()): margin for item, margin in zip(self.items, self.margins, strict=True)}
        return RewardBatch(items, [margin_of[tuple(item.row_ids or ())] for item in items], self.weight, self.stream.device)


class RewardTrainer(OfflineTrainer):
    """`RewardTrainer(model, args, train_dataset).train()`; rows have chosen and rejected, and prompt unless both begin
    with it; margin if wanted.

    model: a causal language model, which gets a new head, or a sequence classifier with one label; a name, a directory
    or a model.
    """

    title = "a reward model"
    formats = (PREFERENCE, IMPLICIT_PREFERENCE)
    args: RewardConfig  # type: ignore[assignment]

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RewardConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        quantization_config: Any = None,
    ) -> None:
        args = as_config(args, RewardConfig)
        name = model if isinstance(model, str) else model.config._name_or_path
        loaded = processing_class if processing_class is not None else load_tokenizer(name, trust_remote_code=args.trust_remote_code)
        tokenizer = with_own_padding(loaded)
        packed = packing(model, peft_config, quantization_config)
        if isinstance(model, str):
            if peft_config is not None and is_adapter(model):
                raise UserError(f"{model} holds adapters already: leave out peft_config to train them on, or merge them first (`posttrain export`)")
            model = load_reward_model(model, is_trainable=True, **args.loading(model, peft_config) | packed)
        elif not _has_trained_adapters(model):
            if peft_config is None:
                make_trainable(model, keeps=(args.model_init_kwargs or {}).get("dtype"))  # before its head is drawn, which is trained too
            model = reward_model(model, seed=args.seed)
        base_model(model).config.get_text_config().pad_token_id = tokenizer.pad_token_id
        super().__init__(
            model,
            args,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=_with_head(peft_config),
            refused={"data_collator": data_collator, "compute_metrics": compute_metrics},
        )

    def prepare_forward(self, model: nn.Module) -> None:
        self._scores = make_scores(model)

    # Rows

    def encode(self, rows: list[Any]) -> list[EncodedRow]:
        return self.to_compare(self._pairs(rows))

    def _pairs(self, rows: list[Any]) -> list[EncodedRow]:
        limits = [limit for limit in (self.args.max_length, context_length(self.model)) if limit is not None]
        pairs: list[EncodedRow] = []
        cut = 0
        for number, row in enumerate(rows):
            with at_row(number):
                prompt, chosen, rejected = self._ids(row)
            kept = fit(prompt, chosen, rejected, min(limits)) if limits else (prompt, chosen, rejected)
            cut += kept != (prompt, chosen, rejected)
            margin = row.get("margin")
            pairs.append(Pair(kept[0], [kept[1], kept[2]], margin=0.0 if margin is None else float(margin)))
        if cut:
            logger.warning("%d of %d pairs are longer than max_length=%d tokens and were cut; none was dropped", cut, len(rows), min(limits))
        return pairs

    def _ids(self, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
        if row["prompt"]:
            ids = encode_preference(self.tokenizer, row["prompt"], row["chosen"], row["rejected"], **self.template_options(row))
        else:  # nothing in common as text; a special token at the beginning may be
            chosen, rejected = (ended(encode_text(self.tokenizer, row[name]), self.tokenizer) for name in ("chosen", "rejected"))
            if chosen[0] != rejected[0]:
                raise UserError("`chosen` and `rejected` begin differently, so they have no prompt in common; give a column prompt")
            ids = chosen[:1], chosen[1:], rejected[1:]
        return ids

    # The loss

    def score(self, rows: list[Mapping[str, Any]]) -> list[tuple[float, float]]:
        """(score of chosen, score of rejected) of every pair, in eval mode, without a gradient."""
        pairs = self._pairs(self._checked(rows))
        scores: dict[int, float] = {}
        with self.evaluating(self.model_wrapped) as module:
            for part in split([PackItem(pair.prompt_ids, pair.completions) for pair in pairs], self.token_budget):
                stream = pack(part).to(self.args.device)
                scores.update(zip(stream.row_ids.tolist(), self._scores(module, stream).last.tolist(), strict=True))
        return [(scores[2 * number], scores[2 * number + 1]) for number in range(len(pairs))]

    def batches(self, mine: list[EncodedRow], everyone: list[EncodedRow]) -> Iterator[MicroBatch]:
        weight = self.args.world_size / max(len(everyone), 1)  # processes average their gradients
        items = [PackItem(pair.prompt_ids, pair.completions, row_ids=(2 * place, 2 * place + 1)) for place, pair in enumerate(mine)]
        for part in split(items, self.token_budget, whole=True):
            pairs = [mine[item.row_ids[0] // 2] for item in part if item.row_ids is not None]
            yield RewardBatch(part, [pair.margin for pair in pairs if isinstance(pair, Pair)], weight, self.args.device)

    def loss(self, model: nn.Module, batch: RewardBatch) -> torch.Tensor:
        scores = self._scores(model, batch.stream).last  # (2 * pairs,)
        chosen, rejected = scores[0::2], scores[1::2]
        losses = bradley_terry(chosen, rejected, torch.tensor(batch.margins, dtype=scores.dtype, device=scores.device))  # (pairs,)
        if self.args.center_rewards_coefficient:
            losses = losses + self.args.center_rewards_coefficient * centring(chosen, rejected)
        self._note(chosen.detach(), rejected.detach())
        return losses.sum() * batch.weight

    def _zero_loss(self, model: nn.Module) -> torch.Tensor:
        return self._scores(model, pack([PackItem([0], [[0]])]).to(self.args.device)).last.sum() * 0.0

    def _note(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        self.metrics.note("accuracy", is_ordered(chosen, rejected).sum(), len(chosen))
        self.metrics.note("margin", (chosen - rejected).sum(), len(chosen))
        self.metrics.note("mean_reward", (chosen + rejected).sum(), 2 * len(chosen))
        self.metrics.note_extreme("min_reward", "min", float(torch.minimum(chosen, rejected).min()))
        self.metrics.note_extreme("max_reward", "max", float(torch.maximum(chosen, rejected).max()))


def fit(prompt: list[int], chosen: list[int], rejected: list[int], limit: int) -> tuple[list[int], list[int], list[int]]:
    """At most `limit` tokens for the prompt with either completion. Completions are cut at their end, to what the
    prompt leaves or half of the limit, whichever is more; then the prompt at its beginning, so that it ends as before.
    At least one token of it stays."""
    room = min(max(limit - len(prompt), limit // 2), limit - 1)
    chosen, rejected = chosen[:room], rejected[:room]
    kept = limit - max(len(chosen), len(rejected))
    return prompt[-kept:], chosen, rejected


def _has_trained_adapters(model: nn.Module) -> bool:
    """Whether it is a reward model with adapters on it."""
    return type(model).__module__.startswith("peft.") and HEAD in dict(base_model(model).named_children())


def _with_head(peft_config: Any) -> Any:
    """The adapter's settings for a classifier: its head, which is new, is trained as a whole."""
    if peft_config is None or not hasattr(peft_config, "modules_to_save"):  # the latter is no LoRA and is refused by name
        return peft_config
    peft_config = copy.copy(peft_config)
    peft_config.task_type = "SEQ_CLS"
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), HEAD})
    return peft_config
