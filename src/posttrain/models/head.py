"""The LM head answers with log-probs: for the length of a `with` block, the head module is one that never builds (N, V)
logits.

The *wrapped* model (DDP, PEFT) can then be called as usual and its hooks run; what it returns as `logits` are N rows of
a few numbers. Models that reshape the head's output have that arithmetic folded in by a table, or are refused by name.

N targets, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.ops.linear_logprobs import linear_logprobs


class HeadRequest(NamedTuple):
    """What a forward asks of the head."""

    predicted_by: torch.Tensor  # (N,) places in the flattened hidden states
    targets: torch.Tensor  # (N,)
    temperature: float = 1.0
    want_argmax: bool = False
    want_sum_p2: bool = False
    scored_at: torch.Tensor | None = None  # (M,) places whose hidden states `scorer` reads, in the same forward. None: no scores
    scorer: Callable[[torch.Tensor], torch.Tensor] | None = None  # (M, D) -> (M,)
    entropy_grad: bool = True  # False: the entropy is a constant
    known_grad: torch.Tensor | None = None  # (N,) the gradient that the log-probs will get, where it is known; as `linear_logprobs` takes it


class HeadOutput(NamedTuple):
    """What the model returns as logits, taken apart: (N,) each, the scores (M,)."""

    logps: torch.Tensor
    entropy: torch.Tensor
    argmax: torch.Tensor | None  # None: not asked for
    sum_p2: torch.Tensor | None  # None: not asked for
    scores: torch.Tensor | None = None  # None: there was no scorer


class Rescaling(NamedTuple):
    """How a model reshapes its logits: `attribute`, on the model's config or on the model itself, and the value that
    makes it do nothing."""

    attribute: str
    neutral: float | None
    folded: Callable[[float], dict[str, float]]  # its value -> keywords of linear_logprobs
    on_config: bool = True


_SOFTCAP = Rescaling("final_logit_softcapping", None, lambda cap: {"softcap": cap})
_TIMES_ON_MODEL = Rescaling("logit_scale", 1.0, lambda scale: {"scale": scale}, on_config=False)
_TIMES = Rescaling("logits_scaling", 1.0, lambda scale: {"scale": scale})
_DIVIDED = Rescaling("logits_scaling", 1.0, lambda scale: {"scale": 1.0 / scale})

RESCALINGS: dict[str, Rescaling] = {  # model_type -> what it does after its head
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma", "nanochat"), _SOFTCAP),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), _TIMES_ON_MODEL),
    **dict.fromkeys(("granite", "granitemoe", "granitemoeshared", "granitemoehybrid"), _DIVIDED),
    "hyperclovax": _TIMES,
}
# A config that sets one of these reshapes its logits somehow. Only the table above knows how.
_TELLTALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap", "output_multiplier_scale")


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, torch.compile and PEFT wrappers."""
    while True:
        if isinstance(model, PreTrainedModel):
            return model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__module__.startswith("peft."):
            model = model.get_base_model()  # type: ignore[operator]
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            raise UserError(f"cannot find the transformers model inside a {type(model).__name__}; give a transformers or PEFT model, alone or in DDP")


@contextmanager
def answering(model: nn.Module, request: HeadRequest) -> Iterator[None]:
    """Inside, `model(...).logits` is the output for `request` (read it with `read`). Everything is put back, also after
    an exception."""
    base = base_model(model)
    rescaling = _rescaling(base)
    folded: dict[str, float] = {}
    with ExitStack() as stack:
        if rescaling is not None:
            owner = base.config if rescaling.on_config else base
            folded = rescaling.folded(getattr(owner, rescaling.attribute))
            stack.enter_context(replaced(owner, rescaling.attribute, rescaling.neutral))
        if getattr(base.config, "output_router_logits", False):  # MoE: the auxiliary loss would count rows, not tokens
            stack.enter_context(replaced(base.config, "output_router_logits", False))
        parent, name = _place_of_head(base)
        stack.enter_context(replaced(parent, name, _AnsweringHead(linear_in_use(getattr(parent, name)), request, folded)))
        yield


def gains_by_known_grad(model: nn.Module) -> bool:
    """Whether `known_grad` spares work outside of autocast: the head is trained, in the dtype of sums."""
    weight = linear_in_use(base_model(model).get_output_embeddings()).weight
    return weight.requires_grad and weight.dtype in (torch.float32, torch.float64)


def read(logits: torch.Tensor, request: HeadRequest) -> HeadOutput:
    """What `_AnsweringHead` laid end to end: N rows of 2 to 4 numbers, then the M scores."""
    width = 2 + request.want_argmax + request.want_sum_p2
    rows, scores = logits.flatten().tensor_split([len(request.targets) * width])
    logps, entropy, *rest = rows.view(-1, width).unbind(-1)
    argmax = rest.pop(0).detach().long() if request.want_argmax else None
    sum_p2 = rest.pop(0).detach() if request.want_sum_p2 else None
    return HeadOutput(logps, entropy, argmax, sum_p2, None if request.scorer is None else scores)


class _AnsweringHead(nn.Module):
    def __init__(self, head: nn.Linear, request: HeadRequest, folded: dict[str, float]) -> None:
        super().__init__()
        self.head, self.request, self.folded = head, request, folded

    @property
    def weight(self) -> torch.Tensor:
        """Some models look at the dtype of their head."""
        return self.head.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, L, D) -> (1, 1, N * (2 to 4) + M) float32"""
        predicted_by, targets, temperature, want_argmax, want_sum_p2, scored_at, scorer, entropy_grad, known_grad = self.request
        flat = hidden.flatten(0, 1)
        picked = flat.index_select(0, predicted_by)  # (N, D)
        if not torch.is_autocast_enabled(picked.device.type):
            picked = picked.to(self.head.weight.dtype)  # of a head that is trained in float32 on top of frozen 16-bit weights
        columns = linear_logprobs(
            picked,
            self.head.weight,
            targets,
            bias=self.head.bias,
            temperature=temperature,
            want_argmax=want_argmax,
            want_sum_p2=want_sum_p2,
            entropy_grad=entropy_grad,
            known_grad=known_grad,
            **self.folded,
        )
        # Token ids are exact in float32 up to 2^24, which no vocabulary reaches.
        output = torch.stack([column.to(columns.logps.dtype) for column in columns if column is not None], dim=-1).flatten()
        if scorer is not None and scored_at is not None:
            output = torch.cat([output, scorer(flat.index_select(0, scored_at)).to(output.dtype)])
        return output[None, None]


def rescaling_keywords(base: PreTrainedModel) -> dict[str, float]:
    """How the model reshapes its logits, as keywords of `linear_logprobs`. Raises UserError for a way that is not built
    in."""
    rescaling = _rescaling(base)
    return {} if rescaling is None else rescaling.folded(getattr(base.config if rescaling.on_config else base, rescaling.attribute))


def _rescaling(base: PreTrainedModel) -> Rescaling | None:
    config = base.config
    known = RESCALINGS.get(config.model_type)
    if known is not None:
        return None if getattr(config, known.attribute) is None else known
    for name in _TELLTALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(
                f"{config.model_type} models reshape their logits ({name}={getattr(config, name)}) in a way that is not built in yet; use another model"
            )
    return None


def _place_of_head(base: PreTrainedModel) -> tuple[nn.Module, str]:
    head = base.get_output_embeddings()
    for path, module in base.named_modules():
        if module is head and head is not None:
            parent, _, name = path.rpartition(".")
            return base.get_submodule(parent), name
    raise UserError(f"{type(base).__name__} has no language-model head; load it as a causal language model")


def linear_in_use(head: nn.Module) -> nn.Linear:
    """The weights in use: of a head that PEFT trains as a whole, the active copy."""
    if type(head).__module__.startswith("peft."):
        from peft.utils import ModulesToSaveWrapper

        if not isinstance(head, ModulesToSaveWrapper):
            raise UserError(
                f"the LM head carries an adapter ({type(head).__name__}), which is not supported: leave it out of target_modules, or name it in modules_to_save"
            )
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise UserError(
            f"the LM head is a {type(head).__name__} of {next(head.parameters()).dtype}; only a plain linear head works: keep it out of quantisation"
        )
    return head


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
