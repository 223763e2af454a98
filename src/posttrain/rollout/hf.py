"""The slow oracle: transformers' own `generate` behind the engine's protocol, for models that cannot take a layout, and
for comparing.

It pads a batch on the left, computes each prompt once per completion, keeps the logits of every step, and its random
numbers depend on the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from posttrain.rollout.stopping import check_sampling, stop_reason
from posttrain.types import Request, RequestOutput, Sampling, StopReason


class HFEngine:
    """Draws completions with `model.generate`, one batch of requests with equal sampling settings per step."""

    def __init__(self, tokenizer: Any = None, *, max_batch: int = 64, autocast_dtype: torch.dtype | None = None):
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.autocast_dtype = autocast_dtype
        self._model: Any = None
        self._version = 0
        self._waiting: list[Request] = []

    @contextmanager
    def serving(self, model: torch.nn.Module, version: int) -> Iterator[None]:
        """Rollout mode for the unwrapped `model`; its modes and its generation defaults are restored on exit."""
        if self._model is not None:
            raise RuntimeError("the engine is already serving a model: leave that block first")
        training = [module for module in model.modules() if module.training]
        served: Any = model
        defaults = served.generation_config
        self._model, self._version = served, version
        try:
            model.eval()
            served.generation_config = GenerationConfig()  # else the model's own top_p, EOS, ... would fill what a request leaves off
            yield
        finally:
            served.generation_config = defaults
            for module in training:
                module.training = True
            self._model = None
            self._waiting.clear()

    def submit(self, request: Request) -> None:
        check_sampling(request.sampling, self.tokenizer)
        self._waiting.append(request)

    @torch.no_grad()
    def step(self) -> list[RequestOutput]:
        """Draw a whole batch to its end."""
        if not self._waiting:
            return []
        sampling = self._waiting[0].sampling
        batch = [request for request in self._waiting if request.sampling == sampling][: self.max_batch]
        taken = {request.id for request in batch}
        self._waiting = [request for request in self._waiting if request.id not in taken]
        device = next(self._model.parameters()).device
        precision = nullcontext() if self.autocast_dtype is None else torch.autocast(device.type, dtype=self.autocast_dtype)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), precision:
            torch.manual_seed(_seed(batch))
            completions = self._generate(batch, sampling, device)
        return sorted(completions, key=lambda completion: completion.request_id)

    def _generate(self, batch: list[Request], sampling: Sampling, device: torch.device) -> list[RequestOutput]:
        longest = max(len(request.prompt_ids) for request in batch)
        pads = [longest - len(request.prompt_ids) for request in batch]
        input_ids = torch.tensor([[0] * pad + list(request.prompt_ids) for pad, request in zip(pads, batch, strict=True)], device=device)  # (B, P)
        attention_mask = (torch.arange(longest, device=device) >= torch.tensor(pads, device=device)[:, None]).long()
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=_generation_config(sampling),
            tokenizer=self.tokenizer if sampling.stop_strings else None,
        )
        token_ids = output.sequences[:, longest:]  # (B, R)
        full = torch.stack(output.logits, dim=1).float() / (sampling.temperature or 1.0)  # (B, R, V)
        logps = _of(full, token_ids).tolist()
        greedy = sampling.temperature == 0
        sampled = torch.zeros_like(token_ids).tolist() if greedy else _of(torch.stack(output.scores, dim=1).float(), token_ids).tolist()
        return [self._completion(request, *row) for request, *row in zip(batch, token_ids.tolist(), logps, sampled, strict=True)]

    def _completion(self, request: Request, token_ids: list[int], logps: list[float], sampled_logps: list[float]) -> RequestOutput:
        """Cut a padded row where its own stop condition was met."""
        for length in range(1, len(token_ids) + 1):
            stop = stop_reason(token_ids[:length], request.sampling, self.tokenizer)
            if stop is not None:
                return RequestOutput(request.id, token_ids[:length], logps[:length], [float(x) for x in sampled_logps[:length]], stop, self._version)
        # generate's reading of a stop string may end a batch where the tokens' text, read from the start, does not hold
        # it
        return RequestOutput(request.id, token_ids, logps, [float(x) for x in sampled_logps], StopReason.STOP, self._version)


def _of(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]  # (B, R)


def _seed(batch: list[Request]) -> int:
    keys = repr([request.key for request in batch]).encode()
    return int.from_bytes(hashlib.blake2b(keys, digest_size=7).digest(), "little")


def _generation_config(sampling: Sampling) -> GenerationConfig:
    drawing: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawing = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_token_ids) or None,
        pad_token_id=0,
        stop_strings=list(sampling.stop_strings) or None,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **drawing,
    )
