"""The reference of DPO and KTO: a model that answers (adapters off, a frozen copy, or one that is given), or log-probs
computed ahead and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.models.adapters import Reference, reference_for
from posttrain.models.head import base_model
from posttrain.models.load import prepare_model
from posttrain.models.merge import load_merged
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.offline import reference_file
from posttrain.trainers.offline.config import ReferenceConfig
from posttrain.trainers.offline.rows import EncodedRow

Sums = Callable[[nn.Module, list[EncodedRow]], list[list[float]]]  # a model's summed log-probs of each example's completions
SYNCED = "reference.safetensors"  # within a checkpoint


class ReferenceLogps:
    """`of(examples)` is the summed log-prob of each example's completions under the reference.

    model: the policy as training begins, unwrapped. ref_model: another reference. settings: whatever else the log-probs
    depend on.
    """

    def __init__(
        self, model: nn.Module, ref_model: str | PreTrainedModel | None, args: ReferenceConfig, sums: Sums, *, vocabulary: int, settings: str
    ) -> None:
        self.policy, self.args, self.sums, self.settings = model, args, sums, settings
        is_adapted = type(model).__module__.startswith("peft.")
        if args.sync_ref_model and is_adapted and ref_model is None:
            raise UserError("sync_ref_model: with LoRA the reference is the model without its adapter, which cannot move; leave it out")
        self.model: Reference | None  # None: its log-probs are computed ahead, from the policy before it is trained
        if ref_model is None:
            self.model = reference_for(model, is_adapted or not args.precompute_ref_log_probs)
        else:
            self.model = Reference(None, self._loaded(ref_model, vocabulary))

    def _loaded(self, ref_model: str | PreTrainedModel, vocabulary: int) -> PreTrainedModel:
        if ref_model is self.policy:
            raise UserError("ref_model is the very model that is trained, so it would move along; leave it out, and a frozen copy is made")
        if isinstance(ref_model, str):
            ref_model = load_merged(ref_model, **self._loading(ref_model))
        else:
            prepare_model(ref_model)
        held = ref_model.config.get_text_config().vocab_size
        if held < vocabulary:
            raise UserError(f"ref_model knows {held} tokens, the tokenizer has {vocabulary}; policy and reference must share one tokenizer")
        ref_model.to(self.args.device).eval().requires_grad_(False)  # type: ignore[arg-type]
        return ref_model

    def _loading(self, name: str) -> dict[str, Any]:
        """As the policy beside which it stands was loaded, so that rounding alone makes no difference between the
        two."""
        given = self.args.loading(name)
        if "dtype" not in (self.args.model_init_kwargs or {}):
            given["dtype"] = base_model(self.policy).dtype
        return given

    def of(self, examples: list[EncodedRow]) -> list[list[float]]:
        known = [example.ref_logps for example in examples if example.ref_logps is not None]
        if len(known) == len(examples):
            return known
        if self.model is None:
            raise UserError(
                "precompute_ref_log_probs keeps no reference: train first, and evaluate only the eval_dataset that was given to the trainer"
            )
        with self.model.active() as module:
            return self.sums(module, examples)

    def compute_ahead(self, examples: list[EncodedRow]) -> None:
        """Give every example its log-probs, from the file if there is one, else from one pass over the data. Only
        before the first update."""
        if all(example.ref_logps is not None for example in examples):
            return
        path = Path(str(self.args.output_dir)) / reference_file.FILE
        with (self.model or Reference(None, self.policy)).active() as module:
            key = {
                "data": reference_file.digest_of_data([example.prompt_ids, example.completions] for example in examples),
                "weights": reference_file.digest_of_weights(module),
                "settings": self.settings,
            }
            if path.is_file():
                logps = reference_file.load(path, key)
            else:
                rank, world = self.args.process_index, self.args.world_size
                parts = gather_json(self.sums(module, examples[rank::world]), self.args.device)
                logps = [parts[index % world][index // world] for index in range(len(examples))]
                if rank == 0:
                    reference_file.save(path, key, logps)
        for example, values in zip(examples, logps, strict=True):
            example.ref_logps = values

    def follow(self, policy: nn.Module, step: int) -> None:
        """Called before each update: a synced reference moves when it is due."""
        if self._moves is not None and step and step % self.args.ref_model_sync_steps == 0:
            self._moves.sync(policy, self.args.ref_model_mixup_alpha)

    def save(self, directory: Path) -> None:
        """Only a reference that moved has anything worth keeping."""
        if self._moves is not None:
            self._moves.save(directory / SYNCED)

    def load(self, directory: Path) -> None:
        if self._moves is not None:
            self._moves.load(directory / SYNCED)

    @property
    def _moves(self) -> Reference | None:
        return self.model if self.args.sync_ref_model else None
