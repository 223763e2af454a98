"""Label smoothing without logits: the mean logit over the vocabulary is the hidden state times the mean row of the
head.

Exact for heads that are linear; those with a soft cap are refused.
"""

from __future__ import annotations

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.models.forward import Scorer
from posttrain.models.head import base_model, linear_in_use, rescaling_keywords


def mean_minus_target(model: nn.Module, targets: torch.Tensor) -> Scorer:
    """A scorer of the states before N `targets` (N,): the mean log-prob over the vocabulary minus the target's, (N,).

    Read by `logprobs(..., scorer=...)`, whose `values` are this; states behind the first N get 0. Raises UserError for
    a head with a soft cap.
    """
    base = base_model(model)
    folded = rescaling_keywords(base)
    if "softcap" in folded:
        raise UserError(f"label_smoothing_factor needs a linear head, and {base.config.model_type} models cap their logits; leave it out")
    scale = folded.get("scale", 1.0)
    head = linear_in_use(base.get_output_embeddings())

    def score(hidden: torch.Tensor) -> torch.Tensor:
        n = len(targets)
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden[:n].float() if hidden.dtype != torch.float64 else hidden[:n]  # (N, D)
            weight = head.weight.to(states.dtype)
            difference = (states * (weight.mean(0) - weight[targets])).sum(-1)  # (N,)
            if head.bias is not None:
                bias = head.bias.to(states.dtype)
                difference = difference + bias.mean() - bias[targets]
        return torch.cat([difference * scale, hidden.new_zeros(len(hidden) - n, dtype=difference.dtype)])

    return score
