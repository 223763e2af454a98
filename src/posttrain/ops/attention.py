"""The attention hook: how a layout enters a Hugging Face model without patching it.

transformers 5 hands unknown keywords of `model(...)` down to the attention function of every layer, also through PEFT
and gradient checkpointing. So one registered function is enough: with a `layout` it lets the layout attend, without one
it is plain sdpa.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "posttrain"

# Keywords that models pass to attention and that change nothing here: caching is the layout's own, output flags are for
# eager.
_HARMLESS = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "is_causal",
}


class Layout(Protocol):
    """Who attends to whom. Must be a plain class: wrappers that rebuild dataclasses among inputs would lose its
    state."""

    def attend(self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float, window: int | None) -> torch.Tensor:
        """q (B, H, S, d), k and v (B, Hkv, S, d), RoPE applied -> (B, S, H, d). Each query sees at most `window` latest
        positions, itself included."""
        ...


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Registered with transformers as "posttrain". Raises ValueError on a keyword that changes attention and no layout
    implements."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window, **kwargs
        )
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
    if unknown or dropout:
        raise ValueError(
            f"shared-prefix attention does not implement {', '.join(unknown) or 'attention dropout'}, which {type(module).__name__} asks for"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    return layout.attend(layer_idx, query, key, value, scaling=scaling, window=sliding_window), None


def install(model: PreTrainedModel) -> None:
    """Route `model`'s attention through the hook. Ordinary calls (padding, `generate`) stay sdpa's."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def layout_kwargs(layout: Layout, device: torch.device) -> dict[str, Any]:
    """Keywords for `model(...)`. The 4-D mask is a placeholder: transformers passes ready-made masks through, so it
    builds no (S, S) one."""
    return {"layout": layout, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "use_cache": False}
