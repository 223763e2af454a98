"""Direct Preference Optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its relatives.

Of two completions of a prompt one is preferred. The policy is trained to raise its log-probability, measured against a
reference, above the other's:

    loss = -log sigmoid(beta * (log pi(chosen)/ref(chosen) - log pi(rejected)/ref(rejected))),   mean over the pairs of the update

The minimiser is ref * exp(r / beta) / Z for the reward r that the preferences express: what PPO would find with that
reward, without sampling. Chosen and rejected are a group of two: their prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.data.stream import PackItem, Stream
from posttrain.errors import UserError
from posttrain.losses.preference import (
    DIVERGENCES,
    DIVERGENT,
    LOSSES,
    SMOOTHED,
    TRANSPORTED,
    Pairs,
    PreferenceOptions,
    discounted_tails,
    on_policy_weights,
    preference_loss,
)
from posttrain.losses.transport import Transport
from posttrain.trainers.core.config import as_config, setting, settings
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.offline.config import ReferenceConfig, check_choice
from posttrain.trainers.offline.pairs import FORMATS, PairBatch, encode_pairs, note_pairs, pair_parts
from posttrain.trainers.offline.reference import ReferenceLogps
from posttrain.trainers.offline.rows import EncodedRow
from posttrain.trainers.offline.trainer import OfflineTrainer

__all__ = ["DPOConfig", "DPOTrainer"]

_READERS = {"label_smoothing": SMOOTHED, "f_divergence_type": DIVERGENT, "discopop_tau": ("discopop",)}


@settings
@dataclass
class DPOConfig(ReferenceConfig):
    """Names and defaults are TRL's."""

    learns_from_pairs: ClassVar[bool] = True

    loss_type: list[str] | str = setting("sigmoid", f"One loss or a list of them, added with loss_weights: {', '.join(LOSSES)}.")
    loss_weights: list[float] | None = setting(None, "A weight for each loss of loss_type. Default: 1.0 each.")
    label_smoothing: float = setting(
        0.0, "The fraction of labels that are thought to be wrong: for sigmoid (conservative DPO), robust, exo_pair (above 0), aot and aot_unpaired."
    )
    f_divergence_type: str = setting("reverse_kl", f"What distance to the reference is kept small: {', '.join(DIVERGENCES)}.")
    f_alpha_divergence_coef: float = setting(0.5, "The alpha of alpha_divergence; 1 is reverse_kl.")
    discopop_tau: float = setting(0.05, "How sharply discopop turns exponential.")
    use_weighting: bool = setting(False, "Weigh every pair by how likely the policy would have written it itself (WPO).")
    ld_alpha: float | None = setting(
        None, "Weight of the tokens that a completion has beyond the other's length (LD-DPO), from 0 to 1. Default: 1, plain DPO."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        for name in self.loss_type:
            check_choice("loss_type", name, LOSSES)
        if not self.loss_type or len(set(self.loss_type)) < len(self.loss_type):
            raise UserError(f"loss_type={self.loss_type}: name one loss or several different ones")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise UserError(f"loss_weights has {len(self.loss_weights)} entries, loss_type {len(self.loss_type)}; give one weight a loss")
        check_choice("f_divergence_type", self.f_divergence_type, DIVERGENCES)
        self.check_read(self.loss_type, _READERS)
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise UserError("f_alpha_divergence_coef is read by f_divergence_type='alpha_divergence' only; leave it out")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing}: a fraction of wrong labels, from 0 to less than 0.5")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise UserError("loss_type='exo_pair' needs label_smoothing above 0 (0.001, say): it is infinite for labels that are certain")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UserError(f"ld_alpha={self.ld_alpha}: a weight from 0 to 1")

    @property
    def weights_of_losses(self) -> dict[str, float]:
        return dict(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))


@dataclass(frozen=True)
class DPOUpdate:
    """What the pairs of one update have in common, over all processes. Tensors are of this process's pairs, (N,
    ...)."""

    ref_logps: torch.Tensor  # (N, 2) of chosen and rejected, under the reference
    transport: Transport | None  # None: no loss needs it
    mean_chosen_length: float
    weight: float  # 1 / pairs of the update, times the number of processes, which average their gradients


class DPOBatch(PairBatch):
    def __init__(self, items: list[PackItem], device: torch.device, update: DPOUpdate) -> None:
        super().__init__(items, device)
        self.update = update

    def of(self, items: list[PackItem]) -> DPOBatch:
        return DPOBatch(items, self.stream.device, self.update)


class DPOTrainer(OfflineTrainer):
    """`DPOTrainer(model, args=DPOConfig(...), train_dataset=rows).train()`. Rows have chosen and rejected, with or
    without prompt.

    model: a name, a directory or a transformers model. ref_model: the reference; None: the model as it is now (with a
    new adapter: without it). Raises UserError for what cannot work, before anything is spent.
    """

    title: ClassVar[str] = "DPO"
    formats = FORMATS
    args: DPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: str | PreTrainedModel | None = None,
        args: DPOConfig | None = None,
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
            as_config(args, DPOConfig),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            quantization_config=quantization_config,
            refused={"data_collator": data_collator, "compute_metrics": compute_metrics},
        )
        args = self.args
        self.references = ReferenceLogps(
            self.model, ref_model, args, self.sums, vocabulary=len(self.tokenizer), settings=f"DPO, ld_alpha={args.ld_alpha}"
        )
        self.options = PreferenceOptions(
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            f_divergence_type=args.f_divergence_type,
            f_alpha_divergence_coef=args.f_alpha_divergence_coef,
            discopop_tau=args.discopop_tau,
        )

    @property
    def learns_from_chosen(self) -> bool:
        return "sft" in self.args.loss_type

    def encode(self, rows: list[Any]) -> list[EncodedRow]:
        return encode_pairs(self, rows)

    def row_sums(self, logps: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(2n,) a completion's log-prob; with ld_alpha, what it is longer than the other counts less."""
        if self.args.ld_alpha is None:
            return logps.sum(dim=1)
        lengths = [segment.length for segment in stream.segments if segment.prompt is not None]
        pairs = list(zip(lengths[::2], lengths[1::2], strict=True))
        return (logps * discounted_tails(pairs, logps.shape[1], self.args.ld_alpha, logps)).sum(dim=1)

    # An update

    def batches(self, mine: list[EncodedRow], everyone: list[EncodedRow]) -> Iterator[DPOBatch]:
        assert self.references is not None
        with self.metrics.timed("time/reference"):
            ref_logps = torch.tensor(self.references.of(mine), dtype=torch.float64).reshape(-1, 2)
        update = DPOUpdate(
            ref_logps=ref_logps.to(self.args.device),
            transport=self._transport(mine, ref_logps) if set(self.args.loss_type) & set(TRANSPORTED) else None,
            mean_chosen_length=sum(len(example.completions[0]) for example in everyone) / len(everyone),
            weight=self.args.world_size / len(everyone),
        )
        for items in pair_parts(mine, self.token_budget):
            yield DPOBatch(items, self.args.device, update)

    def _transport(self, mine: list[EncodedRow], ref_logps: torch.Tensor) -> Transport:
        """Ranks are taken over the pairs of all processes."""
        rows = [[*ours, *refs] for ours, refs in zip(self.sums(self.model_wrapped, mine), ref_logps.tolist(), strict=True)]
        parts = gather_json(rows, self.args.device)
        table = torch.tensor([row for part in parts for row in part], dtype=torch.float64)  # (N of all, 4)
        first = sum(len(part) for part in parts[: self.args.process_index])
        places = torch.arange(first, first + len(mine))
        return Transport.between(*table.unbind(dim=1)).of(places).to(self.args.device)

    def loss(self, model: nn.Module, batch: DPOBatch) -> torch.Tensor:
        args, update = self.args, batch.update
        answer = self.logprobs(model, batch.stream, want_argmax=True, want_sum_p2=args.use_weighting)  # (2n, T); never (2n, T, V)
        pairs = self._pairs(answer.logps, batch)
        per_pair = preference_loss(pairs, self.options, args.weights_of_losses)  # (n,)
        if args.use_weighting:
            assert answer.sum_p2 is not None
            per_pair = per_pair * on_policy_weights(answer.logps, answer.sum_p2, batch.mask)
        self.note_tokens(answer, batch.stream)
        rewards = torch.stack([pairs.chosen_ratio, pairs.rejected_ratio], dim=1) * args.beta
        note_pairs(self.metrics, rewards, torch.stack([pairs.chosen, pairs.rejected], dim=1))
        return per_pair.sum() * update.weight

    def _pairs(self, logps: torch.Tensor, batch: DPOBatch) -> Pairs:
        sums = self.row_sums(logps, batch.stream).view(-1, 2)  # (n, 2)
        refs = batch.update.ref_logps[batch.places].to(sums)
        lengths = batch.lengths.to(sums)
        transport = batch.update.transport
        return Pairs(
            chosen=sums[:, 0],
            rejected=sums[:, 1],
            ref_chosen=refs[:, 0],
            ref_rejected=refs[:, 1],
            chosen_length=lengths[:, 0],
            rejected_length=lengths[:, 1],
            chosen_nll=-logps[::2].sum(dim=1),
            mean_chosen_length=batch.update.mean_chosen_length,
            transport=None if transport is None else transport.of(batch.places).to(sums),
        )
