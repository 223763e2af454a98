"""What trainers on given completions share: rows become token ids once, a window becomes streams, and a reference
answers without a gradient.

It knows no loss: a subclass says which columns it reads (`formats`, `encode`), what a micro-batch holds (`batches`) and
its `loss`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from posttrain.data.convert import maybe_extract_prompt
from posttrain.data.formats import Format, template_keywords, validate_rows
from posttrain.data.given import named, rows_of
from posttrain.data.replies import check_spoken_by_the_assistant, without_repetition
from posttrain.data.stream import PackItem, Stream, pack, split
from posttrain.errors import UserError
from posttrain.models.forward import StreamLogprobs
from posttrain.models.load import context_length, stop_token_ids
from posttrain.models.vocabulary import check_ids
from posttrain.trainers.core.base import BaseTrainer, MicroBatch
from posttrain.trainers.core.config import refuse
from posttrain.trainers.core.loader import example_loader
from posttrain.trainers.core.metrics import Metrics
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.offline.config import OfflineConfig
from posttrain.trainers.offline.reference import ReferenceLogps
from posttrain.trainers.offline.rows import EncodedRow

logger = logging.getLogger(__name__)

REFUSED_ARGUMENTS = {
    "data_collator": "rows become streams without padding; leave it out",
    "compute_metrics": "metrics are sums over streams; read the log, or override `loss`",
}


class OfflineTrainer(BaseTrainer):
    """`train_dataset` holds completions. Raises UserError for rows that cannot work, with the row, before anything is
    spent."""

    title: ClassVar[str]
    formats: ClassVar[tuple[Format, ...]]
    trained: ClassVar[slice] = slice(None)  # which of an example's completions
    args: OfflineConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: OfflineConfig,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        refused: Mapping[str, Any],
        **shared: Any,
    ) -> None:
        """shared: further keywords of BaseTrainer."""
        refuse(REFUSED_ARGUMENTS, {name: refused.get(name) for name in REFUSED_ARGUMENTS})
        rows = self._checked(train_dataset)
        eval_rows = {name: self._checked(part) for name, part in named(eval_dataset).items()}
        super().__init__(
            model,
            args,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            **shared,
        )
        self.references: ReferenceLogps | None = None  # whoever needs one sets it
        self.train_dataset: list[EncodedRow] = self._encoded(rows)
        self.eval_examples = {name: self._encoded(part) for name, part in eval_rows.items()}

    def _encoded(self, rows: list[Any]) -> list[EncodedRow]:
        examples = self.encode(rows)
        check_ids(self.model, self.tokenizer, ([*e.prompt_ids, *chain(*e.completions)] for e in examples))
        return examples

    # What subclasses say

    def encode(self, rows: list[Any]) -> list[EncodedRow]:
        raise AssertionError(f"{type(self).__name__} does not say how a row becomes token ids")

    def batches(self, mine: list[EncodedRow], everyone: list[EncodedRow]) -> Iterable[MicroBatch]:
        """Micro-batches of this process's examples; a mean is taken over `everyone`, the update's examples of all
        processes."""
        raise AssertionError(f"{type(self).__name__} does not say what it learns from")

    def row_sums(self, logps: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(B,) a completion's log-prob from those of its tokens (B, T)."""
        return logps.sum(dim=1)

    # Rows

    def _checked(self, dataset: Any) -> list[Any]:
        given = rows_of(dataset)
        if given is not None and not hasattr(given, "__len__"):
            raise UserError(
                f"{self.title} takes no stream of rows, since its rows are encoded before training; give a list: list(dataset.take(10_000))"
            )
        rows = list(given or [])
        rows = [without_repetition(row) if isinstance(row, Mapping) else row for row in rows]
        validate_rows(rows, self.formats, self.title)
        extracted = [maybe_extract_prompt(row) for row in rows]
        for number, row in enumerate(extracted):
            check_spoken_by_the_assistant(row, f"row {number}")
        return extracted

    def to_compare(self, pairs: list[EncodedRow]) -> list[EncodedRow]:
        """The pairs whose completions differ, within max_length. The others have a gradient of 0, of which Adam would
        make steps out of rounding.

        They are left out and counted, or only counted where the chosen one teaches by itself (`learns_from_chosen`).
        Raises UserError where all are.
        """
        equal = [number for number, pair in enumerate(pairs) if pair.completions[0] == pair.completions[1]]
        if not equal:
            return pairs
        limit = f" within max_length={self.args.max_length}" if self.args.max_length is not None else ""
        if len(equal) == len(pairs):
            raise UserError(
                f"in every pair `chosen` and `rejected` are the same{limit}, so there is nothing to prefer; give others, or raise max_length"
            )
        rest = "they teach by `chosen` alone" if self.learns_from_chosen else "they can teach nothing and are left out"
        logger.warning(
            "in %d of %d pairs `chosen` and `rejected` are the same%s: %s (the first is row %d)", len(equal), len(pairs), limit, rest, equal[0]
        )
        return pairs if self.learns_from_chosen else [pair for pair in pairs if pair.completions[0] != pair.completions[1]]

    @property
    def learns_from_chosen(self) -> bool:
        """Whether the loss imitates the chosen completion besides comparing it."""
        return False

    def template_options(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of the chat template that come with a row, and the tokens that may end its completions."""
        return {"stop_ids": stop_token_ids(self.model, self.tokenizer), **template_keywords(row)}

    def room(self, prompt_ids: Sequence[int], number: int) -> int | None:
        """Tokens that a completion of this prompt may have; None: any number. Raises UserError where there is no room
        for one."""
        limits = [limit for limit in (self.args.max_length, context_length(self.model)) if limit is not None]
        if not limits:
            return None
        room = min(limits) - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"row {number}: its prompt has {len(prompt_ids)} tokens, which leaves no room for a completion within max_length={min(limits)}; "
                "raise max_length, or leave the row out"
            )
        return room

    def get_train_dataloader(self) -> DataLoader:
        return example_loader(self.train_dataset, self.args, lambda: self.state.global_step, shuffle=self.args.shuffle_dataset)

    def window(self, micro_steps: list[list[EncodedRow]]) -> list[MicroBatch]:
        if self.references is not None:
            self.references.follow(self.accelerator.unwrap_model(self.model_wrapped), self.state.global_step)
        everyone = [example for examples in micro_steps for example in examples]
        mine = [example for examples in micro_steps for example in examples[self.args.process_index :: self.args.world_size]]
        tokens = sum(len(completion) for example in everyone for completion in example.completions[self.trained])
        self.metrics.note("num_tokens", tokens, 0.0)
        return list(self.batches(mine, everyone))

    # Log-probs without a gradient

    def sums(self, model: nn.Module, examples: list[EncodedRow], which: slice = slice(None)) -> list[list[float]]:
        """The log-probs of each example's completions (of those in `which`) under `model`, in eval mode."""
        items = [PackItem(example.prompt_ids, example.completions[which]) for example in examples]
        found: dict[int, float] = {}
        with self.evaluating(model) as module:
            for part in split(items, self.token_budget, whole=True):
                stream = pack(part).to(self.args.device)
                sums = self.row_sums(self.logprobs(module, stream).logps, stream)
                found.update(zip(stream.row_ids.tolist(), sums.tolist(), strict=True))
        flat = iter(found[row] for row in range(len(found)))
        return [[next(flat) for _ in item.completions] for item in items]

    # The reference

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.references is not None and self.references.args.precompute_ref_log_probs:
            self.references.compute_ahead([*self.train_dataset, *(example for part in self.eval_examples.values() for example in part)])
        return super().train(resume_from_checkpoint, **kwargs)

    def save_tensors(self, directory: Path) -> None:
        if self.references is not None:
            self.references.save(directory)

    def load_tensors(self, directory: Path) -> None:
        if self.references is not None:
            self.references.load(directory)

    # Metrics and evaluation

    def note_tokens(self, answer: StreamLogprobs, stream: Stream) -> None:
        """Entropy, and how often the token of the data is the most likely one."""
        assert answer.argmax is not None
        count = stream.targets.numel()
        right = stream.gather(answer.argmax) == stream.targets
        self.metrics.note("entropy", answer.entropy.detach().sum(), count)
        self.metrics.note("mean_token_accuracy", right.sum(), count)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The loss and the metrics of training over a whole dataset, or over each of several named ones."""
        given = (
            self.eval_examples if eval_dataset is None else {name: self._encoded(self._checked(part)) for name, part in named(eval_dataset).items()}
        )
        if not given:
            raise UserError("there is no eval_dataset; give one to the trainer or to evaluate()")
        logs: dict[str, float] = {}
        for name, examples in given.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            logs |= {f"{prefix}_{metric}": value for metric, value in self._evaluated(examples).items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _evaluated(self, examples: list[EncodedRow]) -> dict[str, float]:
        training, self.metrics = self.metrics, Metrics()
        try:
            with self.evaluating(self.model_wrapped) as module:
                mine = examples[self.args.process_index :: self.args.world_size]
                local = sum(float(self.loss(module, batch)) for batch in self.batches(mine, examples))
            losses = gather_json(local, self.args.device)
            metrics = self.metrics.drain(self.args.device, 1)
        finally:
            self.metrics = training
        return {"loss": sum(losses) / len(losses)} | {name: value for name, value in metrics.items() if not name.startswith("time/")}
