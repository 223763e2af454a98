"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): completions that are good or bad, one by one; no pairs are needed.

    loss = mean of w_y * (1 - sigmoid(beta * (r - z))) over the good, w_y * (1 - sigmoid(beta * (z - r))) over the bad completions,
    r = log pi(y|x) - log ref(y|x),   z = max(0, mean over the update of log pi(y'|x) - log ref(y'|x)), without a gradient

y' is a completion of another prompt: z estimates how far the policy is from its reference on the whole. It is taken
over the whole update on all processes, so no micro-batch changes it. A row's y' is the completion of the next row of
the data that has another prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.data.chat import encode_example
from posttrain.data.convert import unpair_preference_dataset
from posttrain.data.formats import IMPLICIT_PREFERENCE, PREFERENCE, UNPAIRED_PREFERENCE
from posttrain.data.stream import PackItem, split
from posttrain.errors import UserError, at_row
from posttrain.losses.kto import LOSSES, estimated_kl
from posttrain.trainers.core.base import MicroBatch
from posttrain.trainers.core.config import as_config, setting, settings
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.offline.config import ReferenceConfig, check_choice
from posttrain.trainers.offline.reference import ReferenceLogps
from posttrain.trainers.offline.rows import EncodedRow
from posttrain.trainers.offline.trainer import OfflineTrainer

__all__ = ["KTOConfig", "KTOTrainer"]

logger = logging.getLogger(__name__)

OWN, OTHER = slice(0, 1), slice(1, 2)  # of an example's completions: the row's, and the mismatched one


@settings
@dataclass
class KTOConfig(ReferenceConfig):
    """Names and defaults are TRL's; rows are shuffled, since the mismatched completion goes with its row."""

    _strategies = ("random", "sequential")  # TRL asks for the second, because its mismatched completions come from the neighbour in a batch
    no_effect = ReferenceConfig.no_effect | {"train_sampling_strategy": (_strategies, ReferenceConfig.no_effect["train_sampling_strategy"][1])}

    loss_type: str = setting("kto", f"Which loss: {', '.join(LOSSES)}. The second measures against 0 instead of z.")
    desirable_weight: float = setting(1.0, "Weight of good completions. With few of them raise it, so that good and bad weigh about the same.")
    undesirable_weight: float = setting(1.0, "Weight of bad completions.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss_type", self.loss_type, LOSSES)
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: a weight is 0 or more")

    @property
    def needs_kl(self) -> bool:
        return self.loss_type == "kto"


@dataclass(frozen=True)
class KTOUpdate:
    """What the completions of one update have in common, over all processes. Tensors are of this process's completions,
    (N,)."""

    ref_logps: torch.Tensor
    is_good: torch.Tensor
    kl: float
    weight: float  # 1 / completions of the update, times the number of processes, which average their gradients
    margin_weights: torch.Tensor  # 1 / good completions, -1 / bad ones: rewards times this add up to the margin; 0 where one kind is missing


class KTOBatch(MicroBatch):
    """A stream of n completions. `places` (n,): which of this process's they are."""

    def __init__(self, items: list[PackItem], device: torch.device, update: KTOUpdate) -> None:
        super().__init__(items, device)
        self.places, self.update = self.stream.row_ids, update

    def of(self, items: list[PackItem]) -> KTOBatch:
        return KTOBatch(items, self.stream.device, self.update)


class KTOTrainer(OfflineTrainer):
    """`KTOTrainer(model, args=KTOConfig(...), train_dataset=rows).train()`. Rows are (prompt, completion, label); pairs
    are taken apart.

    ref_model: the reference; None: the model as it is now (with a new adapter: without it). Raises UserError for what
    cannot work.
    """

    title: ClassVar[str] = "KTO"
    formats = (UNPAIRED_PREFERENCE, PREFERENCE, IMPLICIT_PREFERENCE)
    trained = OWN
    args: KTOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: str | PreTrainedModel | None = None,
        args: KTOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        super().__init__(
            model,
            as_config(args, KTOConfig),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            quantization_config=quantization_config,
            refused={"data_collator": data_collator, "compute_metrics": compute_metrics},
        )
        settings = f"KTO, {self.args.loss_type}"
        self.references = ReferenceLogps(self.model, ref_model, self.args, self.sums, vocabulary=len(self.tokenizer), settings=settings)

    # Rows

    def encode(self, rows: list[Any]) -> list[EncodedRow]:
        given = len(rows)
        if "chosen" in rows[0]:
            rows = unpair_preference_dataset(rows)
        examples = [self._encode_row(row, number % given) for number, row in enumerate(rows)]  # both halves of a pair are its row
        self._count_useless(examples)
        if self.args.needs_kl:
            self._add_mismatched(examples)
        return examples

    def _count_useless(self, examples: list[EncodedRow]) -> None:
        """Says how many completions can teach nothing: they are called good and bad, or their weight is 0. Raises
        UserError where all are such."""
        weights = {True: self.args.desirable_weight, False: self.args.undesirable_weight}
        labels: dict[tuple[tuple[int, ...], tuple[int, ...]], set[bool]] = {}
        for example in examples:
            labels.setdefault((tuple(example.prompt_ids), tuple(example.completions[0])), set()).add(example.is_good)
        both = sum(len(labels[tuple(e.prompt_ids), tuple(e.completions[0])]) == 2 for e in examples)
        unweighted = sum(not weights[e.is_good] for e in examples)
        for count, why in ((both, "are called good and bad, both"), (unweighted, "have weight 0 (desirable_weight, undesirable_weight)")):
            if count == len(examples):
                raise UserError(f"all completions {why}, so nothing can be learned from them (max_length={self.args.max_length})")
            if count:
                logger.warning("%d of %d completions %s: they teach nothing", count, len(examples), why)

    def _encode_row(self, row: Any, number: int) -> EncodedRow:
        with at_row(number):
            prompt_ids, completion = encode_example(self.tokenizer, row["prompt"], row["completion"], **self.template_options(row))
        return EncodedRow(prompt_ids, [completion[: self.room(prompt_ids, number)]], is_good=bool(row["label"]))

    def _add_mismatched(self, examples: list[EncodedRow]) -> None:
        if len(examples) < 2:
            raise UserError("KTO compares with completions of other rows, but there is only one row; give more, or use loss_type='apo_zero_unpaired'")
        others = [examples[other].completions[0] for other in following_of_another([example.prompt_ids for example in examples])]
        for number, (example, other) in enumerate(zip(examples, others, strict=True)):
            example.completions.append(other[: self.room(example.prompt_ids, number)])

    # An update

    def batches(self, mine: list[EncodedRow], everyone: list[EncodedRow]) -> Iterator[KTOBatch]:
        assert self.references is not None
        with self.metrics.timed("time/reference"):
            refs = self.references.of(mine)  # [N][1 or 2]: both completions of a row behind its prompt, computed once
        good = sum(example.is_good for example in everyone)
        bad = len(everyone) - good
        margin_weights = [(1 / good if example.is_good else -1 / bad) if good and bad else 0.0 for example in mine]
        device = self.args.device
        update = KTOUpdate(
            ref_logps=torch.tensor([values[0] for values in refs], dtype=torch.float64, device=device),
            is_good=torch.tensor([example.is_good for example in mine], dtype=torch.bool, device=device),
            kl=self._kl(mine, [values[-1] for values in refs]) if self.args.needs_kl else 0.0,
            weight=self.args.world_size / len(everyone),
            margin_weights=torch.tensor(margin_weights, dtype=torch.float64, device=device),
        )
        items = [PackItem(example.prompt_ids, example.completions[OWN]) for example in mine]
        for part in split(items, self.token_budget):
            yield KTOBatch(part, device, update)

    def _kl(self, mine: list[EncodedRow], ref_logps: list[float]) -> float:
        with self.metrics.timed("time/kl"):
            ours = [values[0] for values in self.sums(self.model_wrapped, mine, OTHER)]
        parts = gather_json([sum(ours) - sum(ref_logps), len(ours)], self.args.device)
        kl = estimated_kl(sum(part[0] for part in parts), sum(part[1] for part in parts))
        self.metrics.note("kl", kl)
        return kl

    def loss(self, model: nn.Module, batch: KTOBatch) -> torch.Tensor:
        args, update = self.args, batch.update
        answer = self.logprobs(model, batch.stream, want_argmax=True)  # (n, T)
        logps = self.row_sums(answer.logps, batch.stream)  # (n,)
        ratios = logps - update.ref_logps[batch.places].to(logps)
        is_good = update.is_good[batch.places]
        losses = LOSSES[args.loss_type](ratios, is_good, ratios.new_tensor(update.kl), args.beta)
        weights = torch.where(is_good, ratios.new_tensor(args.desirable_weight), ratios.new_tensor(args.undesirable_weight))
        self.note_tokens(answer, batch.stream)
        self._note(batch, args.beta * ratios.detach(), logps.detach(), is_good)
        return (weights * losses).sum() * update.weight

    def _note(self, batch: KTOBatch, rewards: torch.Tensor, logps: torch.Tensor, is_good: torch.Tensor) -> None:
        for name, kind in (("chosen", is_good), ("rejected", ~is_good)):
            if count := int(kind.sum()):
                self.metrics.note(f"rewards/{name}", rewards[kind].sum(), count)
                self.metrics.note(f"logps/{name}", logps[kind].sum(), count)
        margin_weights = batch.update.margin_weights[batch.places]
        if margin_weights.any():
            self.metrics.note("rewards/margins", (rewards * margin_weights).sum(), margin_weights.abs().sum() / 2)


def following_of_another(prompts: list[list[int]]) -> list[int]:
    """For each row the number of the next one (after the last comes the first) with another prompt; the next one where
    all prompts are equal."""
    last = len(prompts) - 1
    first_other = next((row for row, prompt in enumerate(prompts) if prompt != prompts[last]), None)
    if first_other is None:
        return [(row + 1) % len(prompts) for row in range(len(prompts))]
    following = [first_other] * len(prompts)
    for row in range(last - 1, -1, -1):
        following[row] = row + 1 if prompts[row + 1] != prompts[row] else following[row + 1]
    return following
