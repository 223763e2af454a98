"""The local engine: the very module that trains also samples. Continuous batching over a KV cache that stores each
prompt once.

It is called unwrapped (no DDP), in eval mode and without gradients, with adapters live. One `step` is: admit, prefill,
decode one token for every active row, sample, retire. What a completion says depends on its request alone, not on the
rows beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.errors import TrainingError, first_sentence
from posttrain.ops.attention import Layout, layout_kwargs
from posttrain.rollout.local.cache import Cache
from posttrain.rollout.local.layout import DecodeLayout, PrefillLayout, PromptPiece
from posttrain.rollout.local.sampler import Uniforms, draw
from posttrain.rollout.local.scheduler import DecodingRow, Prompt, Scheduler
from posttrain.rollout.local.support import check_context, check_layers, prepare
from posttrain.rollout.local.weights import compute, lent, rollout_dtype
from posttrain.rollout.stopping import check_sampling, stop_reason
from posttrain.sizes import PREFILL_TOKENS
from posttrain.types import Request, RequestOutput, StopReason

logger = logging.getLogger(__name__)

_FEWEST_PREFILL_TOKENS = 256  # of a call, even where memory is short


class LocalEngine:
    """Draws completions with the module that trains. `tokenizer` is needed for stop strings only."""

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        max_slots: int = 256,
        max_kv_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        autocast_dtype: torch.dtype | None = None,
    ):
        """max_slots: rows decoded together. max_kv_tokens: cached tokens at most, prompts counted once (None: no
        limit).

        prefill_tokens: prompt tokens computed in one call; bounds activations, however long or many the prompts.
        autocast_dtype: compute in it, as training does, except that bfloat16 becomes float32 on a CPU that would only
        emulate it.
        """
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        self.max_kv_tokens = max_kv_tokens
        self.prefill_tokens = prefill_tokens
        self.autocast_dtype = autocast_dtype
        self._rollout: _Rollout | None = None

    @contextmanager
    def serving(self, model: torch.nn.Module, version: int) -> Iterator[None]:
        """Rollout mode for the unwrapped `model`. On exit, also by an exception, its modes are restored and all KV
        memory is freed."""
        if self._rollout is not None:
            raise RuntimeError("the engine is already serving a model: leave that block first")
        config = prepare(model)
        device = next(model.parameters()).device
        dtype = rollout_dtype(self.autocast_dtype, device)
        training = [module for module in model.modules() if module.training]
        rollout = _Rollout(model, config, version, Scheduler(self.max_slots, self.max_kv_tokens), device, dtype, self.tokenizer, self.prefill_tokens)
        try:
            model.eval()
            with lent(model, dtype, device):
                self._rollout = rollout
                yield
        finally:
            self._rollout = None
            rollout.cache.free()
            for module in training:
                module.training = True

    def submit(self, request: Request) -> None:
        """Queue a request. Raises UserError if it can never be served."""
        self._active().submit(request)

    def step(self) -> list[RequestOutput]:
        """One token for every active row, first tokens of newly admitted rows included.

        Out of memory, all unfinished completions are restarted, half as many at a time from here on; they say the same,
        since what they draw does not depend on their company. Raises TrainingError where that is not enough.
        """
        rollout = self._active()
        with compute(rollout.dtype, rollout.device):
            while True:
                try:
                    return rollout.step()
                except torch.OutOfMemoryError as error:
                    reason = first_sentence(error)
                self._make_smaller(rollout, reason)  # out here, where the failed step's tensors are gone

    def _make_smaller(self, rollout: _Rollout, reason: str) -> None:
        rows = min(rollout.most_rows, self.max_slots)
        if rows <= 1 and self.prefill_tokens <= _FEWEST_PREFILL_TOKENS:
            raise TrainingError(
                f"out of memory while sampling a single completion ({reason}): shorten prompts or completions, load the weights in 4 bits "
                "beside adapters (load_in_4bit), or take a smaller model"
            )
        self.max_slots = max(rows // 2, 1)
        self.prefill_tokens = min(self.prefill_tokens, max(self.prefill_tokens // 2, _FEWEST_PREFILL_TOKENS))
        logger.warning("out of memory while sampling %d completions at once (%s); %d at once from here on", rows, reason, self.max_slots)
        rollout.begin_anew(self.max_slots, self.prefill_tokens)
        if rollout.device.type == "cuda":
            torch.cuda.empty_cache()

    def _active(self) -> _Rollout:
        if self._rollout is None:
            raise RuntimeError("submit and step work inside `with engine.serving(model, version):` only")
        return self._rollout


class _Rollout:
    """All that lives between entering and leaving `serving`."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: Any,
        version: int,
        scheduler: Scheduler,
        device: torch.device,
        dtype: torch.dtype | None,
        tokenizer: Any,
        prefill_tokens: int,
    ):
        self.model = model
        self.config = config
        self.version = version
        self.scheduler = scheduler
        self.device = device
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.cache = Cache()
        self.uniforms: dict[int, Uniforms] = {}  # by request id
        self.prefill_tokens = prefill_tokens
        self.most_rows = 0  # decoded together so far

    def begin_anew(self, max_slots: int, prefill_tokens: int) -> None:
        """Every unfinished request waits again, in order of its id, and nothing is cached."""
        unfinished = sorted([row.request for row in self.scheduler.rows] + list(self.scheduler.waiting), key=lambda request: request.id)
        self.cache.free()
        self.scheduler = Scheduler(max_slots, self.scheduler.max_kv_tokens)
        self.prefill_tokens, self.most_rows = prefill_tokens, 0
        for request in unfinished:
            self.scheduler.submit(request)

    def submit(self, request: Request) -> None:
        check_sampling(request.sampling, self.tokenizer)
        check_context(request, self.config)
        if request.id in self.uniforms:
            raise ValueError(f"request id {request.id} is already in use; ids are unique within a serving block")
        self.scheduler.submit(request)
        self.uniforms[request.id] = Uniforms(request.key)

    def step(self) -> list[RequestOutput]:
        decoding = list(self.scheduler.rows)
        started, prompts = self.scheduler.admit()
        self.most_rows = max(self.most_rows, len(self.scheduler.rows))
        self._reserve(decoding)
        if prompts:
            self._prefill(prompts)
        logits = [self._decode(decoding)] if decoding else []
        logits += [torch.stack([row.prompt.next_logits for row in started])] if started else []
        if not logits:
            return []
        self._sample(decoding + started, torch.cat(logits) if len(logits) > 1 else logits[0])
        return self._retire()

    def _reserve(self, decoding: list[DecodingRow]) -> None:
        prompts = self.scheduler.prompts
        self.cache.prompts.reserve(len(prompts), max((prompt.cached for prompt in prompts), default=0))
        self.cache.suffixes.reserve(len(decoding), max((row.cached + 1 for row in decoding), default=0))

    def _forward(self, token_ids: Sequence[int], position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor) -> torch.Tensor:
        """Logits (kept, V) at the kept positions of a stream; the head sees no others."""
        input_ids = torch.tensor([token_ids], device=self.device)  # (1, S)
        output = self.model(input_ids=input_ids, position_ids=position_ids, logits_to_keep=keep, **layout_kwargs(layout, self.device))
        logits: torch.Tensor = output.logits[0]
        return logits.contiguous()

    def _prefill(self, prompts: list[Prompt]) -> None:
        """Compute the prompts' keys, values and next-token logits, `prefill_tokens` at a time: short ones together,
        long ones piece by piece."""
        scheduled = self.scheduler.prompts
        for pieces in _prefill_calls(prompts, self.prefill_tokens):
            layout = PrefillLayout(self.cache, pieces, self.dtype)
            token_ids = [token for piece in pieces for token in scheduled[piece.slot].token_ids[piece.start : piece.end]]
            position_ids = torch.cat([torch.arange(piece.start, piece.end, device=self.device) for piece in pieces])[None]
            ends = torch.tensor([piece.end - piece.start for piece in pieces], device=self.device).cumsum(0) - 1
            logits = self._forward(token_ids, position_ids, layout, ends)  # (pieces, V)
            check_layers(self.model, self.config, layout.layers)
            for piece, row in zip(pieces, logits, strict=True):
                if piece.end == scheduled[piece.slot].cached:
                    scheduled[piece.slot].next_logits = row.clone()  # a view would keep the whole call's logits

    def _decode(self, rows: list[DecodingRow]) -> torch.Tensor:
        """Feed each row's newest token: logits (A, V) for its next one."""
        cached = [row.cached for row in rows]
        prompts = self.scheduler.prompts[: 1 + max(row.prompt.slot for row in rows)]
        layout = DecodeLayout(self.cache, [row.prompt.slot for row in rows], [prompt.cached for prompt in prompts], cached, self.dtype, self.device)
        keep = torch.arange(len(rows), device=self.device)
        return self._forward([row.token_ids[-1] for row in rows], layout.position_ids, layout, keep)

    def _sample(self, rows: list[DecodingRow], logits: torch.Tensor) -> None:
        uniforms = [self.uniforms[row.request.id][len(row.token_ids)] for row in rows]
        drawn = draw(logits, [row.request.sampling for row in rows], uniforms)
        token_ids = drawn.token_ids.tolist()
        logps, sampled_logps = torch.stack([drawn.logps, drawn.sampled_logps]).tolist()
        for row, token_id, logprob, sampled_logprob in zip(rows, token_ids, logps, sampled_logps, strict=True):
            row.token_ids.append(token_id)
            row.logps.append(logprob)
            row.sampled_logps.append(sampled_logprob)

    def _retire(self) -> list[RequestOutput]:
        """Finished rows, in order of request id; the last active row and prompt move into the slots they leave."""
        finished = []
        for row in list(self.scheduler.rows):
            stop = stop_reason(row.token_ids, row.request.sampling, self.tokenizer)
            if stop is None:
                continue
            row_moves, prompt_moves = self.scheduler.finish(row)
            self.cache.suffixes.move(row_moves)
            self.cache.prompts.move(prompt_moves)
            del self.uniforms[row.request.id]
            finished.append(self._completion(row, stop))
        if not self.scheduler.rows:
            self.cache.free()
        return sorted(finished, key=lambda completion: completion.request_id)

    def _completion(self, row: DecodingRow, stop: StopReason) -> RequestOutput:
        return RequestOutput(row.request.id, row.token_ids, row.logps, row.sampled_logps, stop, self.version)


def _prefill_calls(prompts: list[Prompt], most: int) -> Iterator[list[PromptPiece]]:
    """Cut and pack prompts into calls of at most `most` tokens, in order."""
    pieces: list[PromptPiece] = []
    room = most
    for prompt in prompts:
        start = 0
        while start < len(prompt.token_ids):
            end = min(len(prompt.token_ids), start + room)
            pieces.append(PromptPiece(prompt.slot, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces
