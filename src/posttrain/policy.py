"""A model, its tokenizer and the engine that samples from it, in one object: load, generate, train, generate again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from posttrain.data.chat import encode_prompt
from posttrain.errors import UserError
from posttrain.models.adapter_files import base_of, is_adapter
from posttrain.models.adapters import add_lora
from posttrain.models.head import base_model
from posttrain.models.load import is_quantised, load_tokenizer, stop_token_ids
from posttrain.models.merge import load_trainable
from posttrain.models.precision import HALVES, beside_adapters, default_autocast
from posttrain.models.quantise import in_4bit
from posttrain.models.vocabulary import check_ids
from posttrain.rollout.local.engine import LocalEngine
from posttrain.rollout.play import play
from posttrain.types import Group, Prompt, Sampling, Task


class Policy:
    """`model, tokenizer = policy` takes it apart; trainers take the two, and `generate` then samples from what they
    trained."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._calls = 0  # so that two calls without a seed differ

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def generate(self, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 256, temperature: float = 1.0, **sampling: Any) -> list[str]:
        """One completion of each prompt, as text without special tokens. Prompts are text, taken as it is, or
        conversations (lists of messages).

        temperature=0 is greedy. Further keywords: those of `sample`, and top_k, top_p, min_p, stop_strings.
        """
        groups = self.sample(prompts, max_new_tokens=max_new_tokens, temperature=temperature, **sampling)
        return [group.completions[0].text for group in groups]

    def sample(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> list[Group]:
        """n completions of each prompt with their tokens, log-probs and why they ended. The same `seed` gives the same
        completions."""
        if seed is None:
            seed, self._calls = self._calls, self._calls + 1
        tasks = [Task(number, prompt) for number, prompt in enumerate(_listed(prompts))]
        ids = [encode_prompt(self.tokenizer, task.prompt, **({} if isinstance(task.prompt, str) else chat_template_kwargs or {})) for task in tasks]
        stops = (*stop_token_ids(self.model, self.tokenizer), *sampling.pop("stop_token_ids", ()))
        check_ids(self.model, self.tokenizer, ids)
        settings = Sampling(**{"max_new_tokens": 256, "stop_token_ids": stops, **sampling})
        held = base_model(self.model).dtype
        mixed = held in HALVES and any(parameter.dtype is torch.float32 for parameter in self.model.parameters())  # adapters
        engine = LocalEngine(self.tokenizer, autocast_dtype=held if mixed else None)
        with engine.serving(self.model, version=0):
            return play(tasks, ids, engine, settings, num_generations=n, seed=seed, step=0, decode=self._decoded)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def load_policy(
    name: str,
    *,
    lora: Any = None,
    dtype: torch.dtype | str | None = None,
    load_in_4bit: bool = False,
    keep_in_16bit: int | Sequence[str] | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """The model and tokenizer of a directory or hub name; adapters with the model they belong to, ready to be trained
    on.

    lora: a peft.LoraConfig for new adapters, in adapter_dtype, drawn from `seed`. load_in_4bit (QLoRA): the weights
    beside the adapters in 4 bits; needs bitsandbytes, and adapters. keep_in_16bit: of those, linears that stay in
    `dtype`, by name; or bytes to spend on the ones that lose most. dtype: of the weights. Default: float32, which can
    be trained; beside adapters the checkpoint's bfloat16 on a GPU that computes in it. device: default the GPU where
    there is one. Raises UserError for what cannot be loaded.
    """
    base = base_of(name) if is_adapter(name) else name
    quantised = in_4bit(base, has_adapters=lora is not None or base != name, keep_in_16bit=keep_in_16bit) if load_in_4bit else {}
    if dtype is None:
        dtype = torch.float32 if lora is None and base == name else beside_adapters(name, default_autocast(), lora)
    model: Any = load_trainable(name, dtype=dtype, trust_remote_code=trust_remote_code, seed=seed, **quantised)
    if lora is not None:
        model = add_lora(model, lora, dtype=adapter_dtype, seed=seed)
    where = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if not is_quantised(model):  # those are where they were quantised
        model = model.to(where)
    return Policy(model, load_tokenizer(name, trust_remote_code=trust_remote_code))


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a conversation is a list whose items are messages."""
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    if not listed:
        raise UserError("there are no prompts to complete")
    return [listed] if isinstance(listed[0], dict) else listed
