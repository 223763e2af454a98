"""Supervised fine-tuning: imitate what the data show. A group of one; the loss is on the trained tokens only.

loss = -sum log p(token | tokens before) / trained tokens of the whole update. Examples never see each other, whatever
stream they are in.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.data.examples import Example, ExampleMaker, ExampleOptions, bins, pieces
from posttrain.data.given import named, rows_of
from posttrain.data.stream import PackItem, pack, split
from posttrain.errors import NothingToLearn, UserError, did_you_mean
from posttrain.losses.sft import LOSSES, nll, smoothed_nll
from posttrain.models.adapter_files import is_adapter
from posttrain.models.embedding_noise import embedding_noise
from posttrain.models.forward import StreamLogprobs, logprobs
from posttrain.models.load import context_length, load_model, load_tokenizer, stop_token_ids
from posttrain.models.smoothing import mean_minus_target
from posttrain.models.templates import grow_embeddings, set_chat_template, set_eos_token
from posttrain.models.vocabulary import check_ids
from posttrain.trainers.core.base import BaseTrainer, MicroBatch
from posttrain.trainers.core.config import BaseConfig, as_config, refuse, setting, settings
from posttrain.trainers.core.loader import EndlessBatches, example_loader, stream_loader
from posttrain.trainers.core.ranks import gather_json
from posttrain.trainers.core.unused import EVERYWHERE, Table

__all__ = ["SFTConfig", "SFTTrainer"]

logger = logging.getLogger(__name__)

PACKING_STRATEGIES = ("bfd", "bfd_split")
Bin = list[Example]  # what a batch counts: one example, or with packing several
_REFUSED = {
    "data_collator": "streams are packed without padding, so there is nothing to collate; leave it out",
    "compute_loss_func": "choose loss_type, or subclass SFTTrainer and override `loss`",
    "compute_metrics": "an evaluation gives loss and token accuracy; for answers use `posttrain eval`",
    "preprocess_logits_for_metrics": "logits are never built; leave it out",
    "optimizer_cls_and_kwargs": "choose `optim` in the settings, or give `optimizers`",
}


@settings
@dataclass
class SFTConfig(BaseConfig):
    """per_device_train_batch_size counts examples; with `packing`, bins of examples of at most max_length tokens
    together."""

    refused: ClassVar[dict[str, tuple[Any, str]]] = {
        "dataset_kwargs": (None, "rows are always prepared here; give text or messages, or subclass SFTTrainer"),
        "truncation_mode": ("keep_start", "what is too long loses its end (the setting is deprecated in TRL too); leave it out"),
        "router_aux_loss_coef": (None, "the auxiliary loss of mixture-of-experts routers is not built; leave it out"),
    }

    unused: ClassVar[Table] = EVERYWHERE | {"eval_packing": (None, "an evaluation is a mean over tokens, which packing does not change")}

    no_effect: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        name: why for name, why in BaseConfig.no_effect.items() if name not in ("label_smoothing_factor", "neftune_noise_alpha")
    }

    learning_rate: float = setting(2e-5, "AdamW's learning rate.")
    max_length: int | None = setting(1024, "Longer examples are cut at their end; None keeps them whole. With packing: the size of a bin.")
    shuffle_dataset: bool = setting(True, "A new order each epoch, drawn from (seed, epoch). A stream is shuffled within 1,000 rows.")
    loss_type: str = setting("nll", "nll: negative log-likelihood (chunked_nll is the same here). dft: each token weighted by its own probability.")
    completion_only_loss: bool | None = setting(
        None, "Train on the completion only. Default: where rows have prompt and completion. False trains on the prompt too."
    )
    assistant_only_loss: bool = setting(
        False, "Train only on what the assistant writes in a conversation. Found by rendering, so any chat template will do."
    )
    packing: bool = setting(False, "Fill bins of max_length tokens with whole examples; a batch counts bins. No example attends to another.")
    packing_strategy: str = setting("bfd", "bfd: best fit, the longest first; too long examples are cut. bfd_split: they are split into several.")
    padding_free: bool = setting(True, "Streams never have padding, whatever this says: kept for scripts that set it.")
    dataset_text_field: str = setting("text", "The column of plain text, for data without prompts or messages.")
    eos_token: str | None = setting(None, "The token that ends a reply, e.g. '<|im_end|>'. Default: the tokenizer's.")
    append_eos: bool = setting(False, "Where a chat template ends a reply with no stop token, put the end-of-sequence token behind it.")
    chat_template_path: str | None = setting(
        None, "A chat template: a .jinja file, a tokenizer's directory or hub name, or one of ours for base models: plain, chatml."
    )
    reply_opening: str | None = setting(
        None, "With the template plain or chatml: text that opens every reply, e.g. '<start_working_out>', so that the model need not write it."
    )

    @property
    def knows_gradient(self) -> bool:
        return not self.fp16 and self.loss_type != "dft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing_strategy == "wrapped":
            raise UserError("packing_strategy='wrapped' cuts examples anywhere and joins them, so that they read each other; use bfd or bfd_split")
        for name, value, known in (("loss_type", self.loss_type, LOSSES), ("packing_strategy", self.packing_strategy, PACKING_STRATEGIES)):
            if value not in known:
                raise UserError(f"{name}={value!r} is not known; use one of {', '.join(known)}.{did_you_mean(str(value), known)}")
        if self.packing and self.max_length is None:
            raise UserError("packing fills bins of max_length tokens; give max_length")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length={self.max_length} leaves no token to predict; use 2 or more")
        if not 0 <= self.label_smoothing_factor < 1:
            raise UserError(f"label_smoothing_factor={self.label_smoothing_factor} must be in [0, 1)")
        if self.label_smoothing_factor and self.loss_type == "dft":
            raise UserError("label_smoothing_factor and loss_type='dft' contradict each other: one flattens the targets, the other sharpens them")

    @property
    def examples(self) -> ExampleOptions:
        """What of a row is trained."""
        whole = self.packing and self.packing_strategy == "bfd_split"  # cut afterwards, into pieces
        length = None if whole else self.max_length
        return ExampleOptions(length, self.dataset_text_field, self.completion_only_loss, self.assistant_only_loss, self.append_eos)


class SFTBatch(MicroBatch):
    """A stream of examples; `weight` is 1 / trained tokens of the update, times the number of processes."""

    def __init__(self, items: list[PackItem], weight: float, device: torch.device) -> None:
        super().__init__(items, device)
        self.weight = weight

    def of(self, items: list[PackItem]) -> SFTBatch:
        return SFTBatch(items, self.weight, self.stream.device)


class SFTTrainer(BaseTrainer):
    """`train_dataset`: rows with text, messages, or prompt and completion (text or messages), or token ids
    (docs/sft.md); a list, a dataset, or a stream of them.

    formatting_func: a row -> its text, or another row. Everything is checked and encoded before training; of a stream,
    as it comes.
    """

    args: SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
    ) -> None:
        refuse(_REFUSED, locals())
        args = as_config(args, SFTConfig)
        train_dataset = rows_of(train_dataset)
        self.is_streaming = _is_stream(train_dataset, args)
        model, tokenizer = _with_template(
            model, args, processing_class, has_adapters=peft_config is not None or (isinstance(model, str) and is_adapter(model))
        )
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            quantization_config=quantization_config,
        )
        self.neftune_noise_alpha = None  # transformers' noise would be scaled by the whole stream; `loss` adds it per example
        self._formatting_func = formatting_func
        self._check_model()
        self.maker = self._new_maker()
        self.examples = [] if self.is_streaming else self._encoded(train_dataset, self.maker)
        if not self.is_streaming:
            self.train_dataset = self._binned(self.examples)
        self.eval_examples = {name: self._encoded(rows, self._new_maker()) for name, rows in named(eval_dataset).items()}

    def _check_model(self) -> None:
        limit, given = context_length(self.model), self.args.max_length
        if limit is not None and (given is None or given > limit):
            self.args.max_length = limit
        if self.args.label_smoothing_factor or self.args.neftune_noise_alpha:
            wanted = "label_smoothing_factor" if self.args.label_smoothing_factor else "neftune_noise_alpha"
            if self._logprobs is not logprobs:
                raise UserError(f"{wanted} needs a model that takes streams, and this one goes in padded rows; leave it out")
            if self.args.label_smoothing_factor:
                mean_minus_target(self.model, torch.zeros(0, dtype=torch.long))  # raises for heads that it cannot smooth

    def _new_maker(self) -> ExampleMaker:
        return ExampleMaker(self.tokenizer, self.args.examples, stop_token_ids(self.model, self.tokenizer))

    def _encoded(self, rows: Any, maker: ExampleMaker) -> list[Example]:
        examples, useless = [], []
        for row in rows:
            try:
                examples.append(maker(self._formatted(row)))
            except NothingToLearn as error:
                useless.append(error)
        if not examples:
            raise UserError(f"no row can teach anything; the first: {useless[0]}" if useless else "the data are empty: SFT needs at least one row")
        if useless:
            logger.warning("%d of %d rows can teach nothing and are left out; the first: %s", len(useless), len(useless) + len(examples), useless[0])
        check_ids(self.model, self.tokenizer, (example.ids for example in examples))
        return examples

    def _formatted(self, row: Any) -> Any:
        if self._formatting_func is None:
            return row
        made = self._formatting_func(row)
        if isinstance(made, list):  # as functions for whole batches return
            if len(made) != 1:
                raise UserError(f"formatting_func is asked about one row and returned {len(made)} things; return the row's text, or another row")
            made = made[0]
        return {"text": made} if isinstance(made, str) else made

    def _binned(self, examples: list[Example]) -> list[Bin]:
        size = self.args.max_length
        if not self.args.packing or size is None:
            return [[example] for example in examples]
        parts = [part for example in examples for part in pieces(example, size)] if self.args.packing_strategy == "bfd_split" else examples
        return [[parts[place] for place in members] for members in bins([len(part.ids) for part in parts], size)]

    def plan(self) -> str:
        """What a step consists of, and how much of the data is trained."""
        if self.is_streaming:
            return f"{super().plan()}, from a stream"
        tokens, targets = sum(len(example.ids) for example in self.examples), sum(example.targets for example in self.examples)
        ends = sum(map(self.maker.ends, self.examples)) / len(self.examples)
        what = f"{len(self.train_dataset)} bins of " if self.args.packing else ""
        return (
            f"{super().plan()}; {what}{len(self.examples)} examples, {tokens:,} tokens, {targets / tokens:.0%} of them trained; "
            f"{ends:.0%} of the examples teach where to stop"
        )

    def get_train_dataloader(self) -> DataLoader:
        if not self.is_streaming:
            return example_loader(self.train_dataset, self.args, lambda: self.state.global_step, shuffle=self.args.shuffle_dataset)
        size = self.args.per_device_train_batch_size * self.args.world_size
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return stream_loader(EndlessBatches(self._stream_of_bins, size=size, seed=seed, shuffle=self.args.shuffle_dataset))

    def _stream_of_bins(self) -> Iterator[Bin]:
        maker, taught = self._new_maker(), False
        useless: NothingToLearn | None = None
        for row in self.train_dataset:
            try:
                example = maker(self._formatted(row))
                check_ids(self.model, self.tokenizer, [example.ids])
                yield [example]
                taught = True
            except NothingToLearn as error:
                if useless is None:
                    logger.warning("a row of the stream can teach nothing and is left out, as all such rows will be: %s", error)
                useless = error
        if useless is not None and not taught:
            raise UserError(f"no row of the stream can teach anything; the last: {useless}")

    def window(self, micro_steps: list[list[Bin]]) -> list[MicroBatch]:
        mine = [
            example for batch in micro_steps for one in batch[self.args.process_index :: self.args.world_size] for example in one
        ]  # every process gets the same batches
        counts = gather_json([sum(e.targets for e in mine), sum(len(e.ids) for e in mine)], self.args.device)
        targets, tokens = (sum(values) for values in zip(*counts, strict=True))
        self.metrics.note("num_tokens", tokens, 0.0)
        weight = self.args.world_size / max(targets, 1)  # processes average their gradients
        return [SFTBatch(part, weight, self.args.device) for part in self._parts(mine)]

    def _parts(self, examples: list[Example]) -> list[list[PackItem]]:
        items = []
        for example in examples:
            start = max(example.trained.index(1), 1)  # what is only read is the prompt
            items.append(PackItem(example.ids[:start], [example.ids[start:]], [list(map(bool, example.trained[start:]))], [example.number]))
        return split(items, self.token_budget)

    def loss(self, model: nn.Module, batch: SFTBatch) -> torch.Tensor:
        stream, smoothing = batch.stream, self.args.label_smoothing_factor
        scorer = mean_minus_target(self.model, stream.targets) if smoothing else None
        mask = torch.ones(stream.shape, device=stream.device)  # (B, T) log-probs are 0 where there is no target

        def loss_of(logps: torch.Tensor, values: torch.Tensor | float = 0.0) -> torch.Tensor:
            if smoothing:
                return smoothed_nll(logps, logps + values, mask, smoothing) * batch.weight
            return LOSSES[self.args.loss_type](logps, mask) * batch.weight

        with self._noise(batch):
            out = self.logprobs(model, stream, want_argmax=True, scorer=scorer, known_grad=self.known_grad(stream.shape, loss_of))
        self._note(out, batch)
        return loss_of(out.logps, 0.0 if out.values is None else out.values)

    def _note(self, out: StreamLogprobs, batch: SFTBatch) -> None:
        stream = batch.stream
        assert out.argmax is not None
        count = stream.targets.numel()
        right = stream.gather(out.argmax) == stream.targets
        self.metrics.note("entropy", out.entropy.detach().sum(), count)
        self.metrics.note("mean_token_accuracy", right.sum(), count)

    def _noise(self, batch: SFTBatch) -> contextlib.AbstractContextManager[None]:
        alpha = self.args.neftune_noise_alpha
        if not alpha:
            return contextlib.nullcontext()
        return embedding_noise(self.model, batch.stream, alpha, key=(self.args.seed, self.state.global_step))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean negative log-likelihood and greedy accuracy per trained token, of each named dataset where there are
        several."""
        given = self.eval_examples if eval_dataset is None else {n: self._encoded(rows, self._new_maker()) for n, rows in named(eval_dataset).items()}
        logs: dict[str, float] = {}
        for name, examples in given.items():
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            logs |= {f"{prefix}_{key}": value for key, value in self._evaluated(examples).items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _evaluated(self, examples: list[Example]) -> dict[str, float]:
        total, entropy, right, tokens, seen = 0.0, 0.0, 0, 0, 0
        with self.evaluating(self.model_wrapped) as module:
            for part in self._parts(examples[self.args.process_index :: self.args.world_size]):
                stream = pack(part).to(self.args.device)
                out = self.logprobs(module, stream, want_argmax=True)
                assert out.argmax is not None
                total += float(nll(out.logps, torch.ones_like(out.logps)))
                entropy += float(out.entropy.sum())
                right += int((stream.gather(out.argmax) == stream.targets).sum())
                tokens += stream.targets.numel()
                seen += len(stream)
        sums = [sum(column) for column in zip(*gather_json([total, entropy, right, tokens, seen], self.args.device), strict=True)]
        loss, mean_entropy, accuracy = (value / max(sums[3], 1) for value in sums[:3])
        return {"loss": loss, "mean_token_accuracy": accuracy, "entropy": mean_entropy, "num_tokens": sums[4]}


def _is_stream(dataset: Any, args: SFTConfig) -> bool:
    """Whether its rows come one after another and nobody knows how many. Raises UserError for no data, and for what a
    stream cannot do."""
    if dataset is None:
        raise UserError("SFT needs a train_dataset: rows with text, messages, or prompt and completion")
    if isinstance(dataset, Sized):
        return False
    if isinstance(dataset, Iterator):
        raise UserError("train_dataset can be read only once; give a list, a dataset, or an object whose __iter__ begins anew")
    if args.max_steps <= 0:
        raise UserError("train_dataset is a stream, whose length nobody knows; give max_steps")
    if args.packing:
        raise UserError("packing sorts all examples by length, which a stream of rows does not allow; leave it out (there is no padding anyway)")
    return True


def _with_template(
    model: str | PreTrainedModel, args: SFTConfig, tokenizer: PreTrainedTokenizerBase | None, *, has_adapters: bool
) -> tuple[str | PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer with the chat template and the end token that the settings ask for."""
    name = model if isinstance(model, str) else model.config._name_or_path
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    if args.reply_opening is not None and args.chat_template_path is None:
        raise UserError("reply_opening goes with chat_template_path: plain or chatml; for another template write it into the template")
    if args.chat_template_path is not None and set_chat_template(tokenizer, args.chat_template_path, args.reply_opening):
        if has_adapters:
            raise UserError(
                "the template chatml adds tokens whose embeddings LoRA would not train; use chat_template_path='plain', "
                "or add embed_tokens and lm_head to modules_to_save and the tokens to the tokenizer yourself"
            )
        if isinstance(model, str):
            model = load_model(model, **args.loading(model))
        grow_embeddings(model, tokenizer, seed=args.seed)
    if args.eos_token is not None:
        set_eos_token(tokenizer, args.eos_token)
    return model, tokenizer
