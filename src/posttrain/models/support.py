"""Can this model take a shared-prefix stream? Asked once, at load, in milliseconds: by its config, then by comparing a
tiny stream with plain rows that go through the model's own head and a plain log-softmax. So the arithmetic behind the
head is checked here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.models.head import HeadRequest, answering, base_model, read, replaced
from posttrain.models.layout import TrainLayout
from posttrain.ops.attention import NAME, layout_kwargs

# Log-probs of the same tokens in other shapes may differ by rounding alone; seen: 1e-6 in float32, 0.03 in bfloat16.
# float64 models round to float32 inside (norms, rotary embeddings), so they get no more.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}

_LAYERS = ("full_attention", "sliding_attention")
_MIXING_ROPES = ("longrope", "dynamic")  # they choose frequencies by the longest position in a call: one long row would change its neighbours

# Two groups: prompts of 3 and 2 tokens, three completions of 2, 3 and 2. Siblings differ in their first token, so a
# leak shows.
_SEGMENTS: list[tuple[int, int, int | None]] = [(0, 3, None), (3, 2, 0), (5, 3, 0), (8, 2, None), (10, 2, 3)]
_POSITIONS = [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]
_PREDICTED_BY = [2, 3, 2, 5, 6, 9, 10]
_TARGETS = [3, 4, 5, 6, 7, 10, 11]  # places in the stream, in the order of the rows below
_ROWS = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7], [8, 9, 10, 11]]  # places in the stream
_PROMPT_LENGTHS = [3, 3, 2]


def stream_support(model: nn.Module) -> str | None:
    """Why `model` must go in padded rows, or None if it takes streams. Raises UserError if neither gives its own
    log-probs."""
    base = base_model(model)
    with _untouched(model, base.device), torch.no_grad():
        model.eval()
        ids = (torch.arange(1, 13, device=base.device) * 7) % base.config.get_text_config().vocab_size
        plain = [_plain_row(model, ids[row], prompt) for row, prompt in zip(_ROWS, _PROMPT_LENGTHS, strict=True)]
        answered = [_answered_row(model, ids[row], prompt) for row, prompt in zip(_ROWS, _PROMPT_LENGTHS, strict=True)]
        tolerance = TOLERANCES[base.dtype]
        if _distance(answered, plain) > tolerance:
            raise UserError(
                f"{type(base).__name__} changes its logits after the head in a way that is not built in yet (log-probs differ by "
                f"{_distance(answered, plain):.2g}); use another model"
            )
        return _by_config(base) or _by_trial(model, base, lambda: _streamed(model, ids), torch.cat(plain), tolerance)


ScoresOfRows = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]  # input_ids and attention_mask (rows, L) -> (rows, L)
ScoresOfStream = Callable[[nn.Module, torch.Tensor, torch.Tensor, TrainLayout], torch.Tensor]  # input_ids and position_ids (S,) -> (S,)


def score_support(model: nn.Module, of_rows: ScoresOfRows, of_stream: ScoresOfStream) -> str | None:
    """As `stream_support`, for a classifier and the two ways to its score at every position."""
    base = base_model(model)
    with _untouched(model, base.device), torch.no_grad():
        model.eval()
        ids = (torch.arange(1, 13, device=base.device) * 7) % base.config.get_text_config().vocab_size
        plain = [of_rows(model, ids[row][None], torch.ones(1, len(row), dtype=torch.long, device=base.device))[0].float() for row in _ROWS]
        with replaced(base.config.get_text_config(), "pad_token_id", None):
            own = [model(input_ids=ids[row][None], use_cache=False).logits[0].float() for row in _ROWS]
        tolerance = TOLERANCES[base.dtype]
        if _distance([scores[-1:] for scores in plain], own) > tolerance:
            raise UserError(f"{type(base).__name__} changes its scores after the head in a way that is not built in yet; use another model")

        def streamed() -> torch.Tensor:
            positions = torch.tensor(_POSITIONS, device=base.device)
            scores = of_stream(model, ids, positions, TrainLayout(_SEGMENTS, base.device)).float()  # (12,)
            return torch.cat([scores[row] for row in _ROWS])

        return _by_config(base) or _by_trial(model, base, streamed, torch.cat(plain), tolerance)


def _by_config(base: PreTrainedModel) -> str | None:
    config = base.config.get_text_config()
    if base.config._attn_implementation != NAME:
        return f"the attention of {type(base).__name__} is not routed through posttrain (it is '{base.config._attn_implementation}')"
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYERS))
    if strange:
        return f"{type(base).__name__} has layers that carry state along the whole stream ({', '.join(strange)})"
    ropes = str(getattr(config, "rope_parameters", None))
    mixing = [name for name in _MIXING_ROPES if f"'{name}'" in ropes]
    return f"{mixing[0]} RoPE depends on the longest row of a call" if mixing else None


def _by_trial(model: nn.Module, base: PreTrainedModel, streamed: Callable[[], torch.Tensor], plain: torch.Tensor, tolerance: float) -> str | None:
    try:
        distance = _distance([streamed()], [plain])
        model.train()
        streamed()  # attention dropout shows in training only
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(base).__name__} does not take a stream: {error}"
    return None if distance <= tolerance else f"the outputs of {type(base).__name__} in a stream differ from those in rows by {distance:.2g}"


def _distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return float((torch.cat(ours) - torch.cat(theirs)).abs().nan_to_num(nan=float("inf")).max())


def _plain_row(model: nn.Module, row: torch.Tensor, prompt: int) -> torch.Tensor:
    logits = model(input_ids=row[None], use_cache=False).logits[0].float()  # (L, V)
    return logits.log_softmax(-1)[prompt - 1 : -1].gather(1, row[prompt:, None])[:, 0]


def _answered_row(model: nn.Module, row: torch.Tensor, prompt: int) -> torch.Tensor:
    request = HeadRequest(torch.arange(prompt - 1, len(row) - 1, device=row.device), row[prompt:])
    with answering(model, request):
        return read(model(input_ids=row[None], use_cache=False).logits, request).logps.float()


def _streamed(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    request = HeadRequest(torch.tensor(_PREDICTED_BY, device=ids.device), ids[_TARGETS])
    layout = TrainLayout(_SEGMENTS, ids.device)
    with answering(model, request):
        positions = torch.tensor([_POSITIONS], device=ids.device)
        output = model(input_ids=ids[None], position_ids=positions, **layout_kwargs(layout, ids.device))
    return read(output.logits, request).logps.float()


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Modes and random numbers stay as they were: a trial must not change a run."""
    modes = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
