"""Supervised fine-tuning: imitate given completions. A group of one; the loss is on the completion's tokens only.

loss = -sum log p(token | prompt, tokens before) / trained tokens of the whole update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from posttrain.data.chat import encode_example
from posttrain.data.stream import PackItem, pack, split
from posttrain.errors import UserError
from posttrain.losses.sft import nll
from posttrain.models.load import context_length
from posttrain.trainers.base import BaseTrainer, MicroBatch
from posttrain.trainers.config import BaseConfig, setting, settings
from posttrain.trainers.loader import PromptSampler, prompt_loader
from posttrain.trainers.ranks import gather_json


@settings
@dataclass
class SFTConfig(BaseConfig):
    """per_device_train_batch_size counts examples."""

    learning_rate: float = setting(2e-5, "AdamW's learning rate.")
    max_length: int | None = setting(1024, "Longer examples are cut at the end of their completion; None keeps them whole.")
    shuffle_dataset: bool = setting(True, "A new order each epoch, drawn from (seed, epoch).")


@dataclass(frozen=True)
class Example:
    """Token ids of one row. The completion ends with the end-of-sequence token unless it was cut."""

    prompt_ids: list[int]
    completion_ids: list[int]


class SFTBatch(MicroBatch):
    """A stream of examples; `share` is 1 / trained tokens of the update, times the number of processes."""

    def __init__(self, items: list[PackItem], share: float, device: torch.device) -> None:
        super().__init__(pack(items).to(device))
        self.share = share


class SFTTrainer(BaseTrainer):
    """`train_dataset` has the columns prompt and completion, as text or as messages."""

    args: SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = args or SFTConfig()
        rows = _checked(train_dataset)
        super().__init__(
            model,
            args,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self.train_dataset = [self._encode(row) for row in rows]
        self.eval_examples = [self._encode(row) for row in _checked(eval_dataset)] if eval_dataset is not None else []

    def _encode(self, row: Any) -> Example:
        prompt_ids, completion_ids = encode_example(self.tokenizer, row["prompt"], row["completion"])
        limits = [limit for limit in (self.args.max_length, context_length(self.model)) if limit is not None]
        room = min(limits) - len(prompt_ids) if limits else len(completion_ids)
        if room < 1:
            raise UserError(f"a prompt has {len(prompt_ids)} tokens, which leaves no room for its completion within max_length={min(limits)}")
        return Example(prompt_ids, completion_ids[:room])

    def get_train_dataloader(self) -> DataLoader:
        sampler = PromptSampler(
            len(self.train_dataset),
            prompts=self.args.per_device_train_batch_size * self.args.world_size,
            every=1,
            epoch=lambda: self.state.global_step // max(-(-len(sampler) // self.args.gradient_accumulation_steps), 1),
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            shuffle=self.args.shuffle_dataset,
            keep_rest=True,
        )
        return prompt_loader(self.train_dataset, sampler)

    def window(self, micro_steps: list[list[Example]]) -> list[MicroBatch]:
        mine = [example for examples in micro_steps for example in examples[self.args.process_index :: self.args.world_size]]
        tokens = sum(gather_json(sum(len(example.completion_ids) for example in mine), self.args.device))
        self.metrics.note("num_tokens", tokens / self.args.world_size, 0.0)
        share = self.args.world_size / max(tokens, 1)  # processes average their gradients
        return [SFTBatch(part, share, self.args.device) for part in self._parts(mine)]

    def _parts(self, examples: list[Example]) -> list[list[PackItem]]:
        items = [PackItem(example.prompt_ids, [example.completion_ids]) for example in examples]
        return split(items, self.args.token_budget)

    def loss(self, model: nn.Module, batch: SFTBatch) -> torch.Tensor:
        logps, entropy = self.logprobs(model, batch.stream)[:2]  # (B, T)
        self.metrics.note("entropy", float(entropy.detach().sum()), batch.stream.targets.numel())
        return nll(logps, torch.ones_like(logps)) * batch.share  # (B, T) holds 0 where there is no target

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean negative log-likelihood per completion token."""
        examples = self.eval_examples if eval_dataset is None else [self._encode(row) for row in _checked(eval_dataset)]
        total, tokens = 0.0, 0
        with self.frozen(self.model_wrapped) as module:
            for part in self._parts(examples[self.args.process_index :: self.args.world_size]):
                stream = pack(part).to(self.args.device)
                total -= float(self.logprobs(module, stream).logps.sum())
                tokens += stream.targets.numel()
        sums = gather_json([total, tokens], self.args.device)
        logs = {f"{metric_key_prefix}_loss": sum(s[0] for s in sums) / max(sum(s[1] for s in sums), 1)}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs


def _checked(dataset: Any) -> list[Any]:
    rows = list(dataset) if dataset is not None else []
    if not rows:
        raise UserError("the training data is empty: SFT needs rows with the columns prompt and completion")
    for index, row in enumerate(rows):
        missing = [name for name in ("prompt", "completion") if name not in row]
        if missing:
            raise UserError(f"row {index} has no column '{missing[0]}'; SFT needs prompt and completion, the data has: {', '.join(row)}")
    return rows
