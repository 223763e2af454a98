"""Losses of a preference pair against a reference: DPO (Rafailov et al. 2023, arXiv:2305.18290) and its relatives.

Pure tensors: a loss is `(pairs, options) -> (n,)`, one row of LOSSES. Taking the mean over the update's pairs is the
caller's job.

n pairs, T tokens of the longest completion. A log-ratio is log pi(y|x) - log ref(y|x), a margin the chosen's minus the
rejected's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.losses.transport import Transport

HIGHEST_EXPONENT = 80.0  # of a divergence: exp of more is no float32, and its gradient would be 0 times infinity


@dataclass(frozen=True)
class PreferenceOptions:
    """Settings of the losses below; each reads what its formula has."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05


@dataclass(frozen=True)
class Pairs:
    """Log-probs of n pairs, (n,) each: sums over a completion's tokens. Only the policy's carry a gradient."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor  # trained tokens
    rejected_length: Tensor
    chosen_nll: Tensor  # -log pi(chosen), every token counted in full
    mean_chosen_length: float  # over the whole update
    transport: Transport | None = None  # who is compared with whom in aot and aot_unpaired. None: other losses

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected


def _reverse_kl(ratio: Tensor, options: PreferenceOptions) -> Tensor:
    return ratio


def _forward_kl(ratio: Tensor, options: PreferenceOptions) -> Tensor:
    return -torch.expm1((-ratio).clamp(max=HIGHEST_EXPONENT))


def _js_divergence(ratio: Tensor, options: PreferenceOptions) -> Tensor:
    return math.log(2) + F.logsigmoid(ratio)


def _alpha_divergence(ratio: Tensor, options: PreferenceOptions) -> Tensor:
    power = options.f_alpha_divergence_coef - 1
    if abs(power) < 1e-6:  # the limit
        return ratio
    return torch.expm1((power * ratio).clamp(max=HIGHEST_EXPONENT)) / power


# f'(pi / ref) as a function of the log-ratio, for the f-divergence that holds the policy near its reference (Wang et
# al. 2023, arXiv:2309.16240).
DIVERGENCES: dict[str, Callable[[Tensor, PreferenceOptions], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}


def _scores(pairs: Pairs, options: PreferenceOptions) -> tuple[Tensor, Tensor]:
    score = DIVERGENCES[options.f_divergence_type]
    return score(pairs.chosen_ratio, options), score(pairs.rejected_ratio, options)


def _margin(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """beta * (score of the chosen - score of the rejected)."""
    chosen, rejected = _scores(pairs, options)
    return options.beta * (chosen - rejected)


def _mean_margin(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """The difference of scores per token; without beta."""
    chosen, rejected = _scores(pairs, options)
    return chosen / pairs.chosen_length - rejected / pairs.rejected_length


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid, with labels that are wrong in a share `smoothing` of all pairs."""
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def sigmoid(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """-log sigmoid(margin). Rafailov et al. 2023, eq. 7; with label smoothing conservative DPO (Mitchell 2023)."""
    return _smoothed(_margin(pairs, options), options.label_smoothing)


def hinge(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """max(0, 1 - margin). SLiC (arXiv:2305.10425) and RSO (arXiv:2309.06657)."""
    return torch.relu(1 - _margin(pairs, options))


def ipo(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """(mean margin - 1 / (2 beta))^2: the margin has a goal instead of growing for ever. Azar et al. 2023, eq. 17, per
    token."""
    return (_mean_margin(pairs, options) - 1 / (2 * options.beta)).square()


def exo_pair(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """KL(policy's preference || smoothed label). EXO, Ji et al. 2024, eq. 16 with two completions; needs
    label_smoothing > 0."""
    margin, wrong = _margin(pairs, options), options.label_smoothing
    right = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-wrong))
    return right + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(wrong))


def nca_pair(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """The chosen is pushed up in itself, not only above the rejected. NCA, Chen et al. 2024, arXiv:2402.05369."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """DPO's loss made unbiased when a share label_smoothing of the labels is flipped. Chowdhury et al. 2024, eq. 5."""
    margin, wrong = _margin(pairs, options), options.label_smoothing
    return (-(1 - wrong) * F.logsigmoid(margin) + wrong * F.logsigmoid(-margin)) / (1 - 2 * wrong)


def bco_pair(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """A binary classifier of each completion alone. BCO, Jung et al. 2024, arXiv:2404.04656, without its running
    baseline."""
    return -F.logsigmoid(options.beta * pairs.chosen_ratio) - F.logsigmoid(-options.beta * pairs.rejected_ratio)


def sppo_hard(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Both log-ratios have a goal, +-1 / (2 beta). SPPO, Wu et al. 2024, eq. 4.7 with hard labels."""
    goal = 0.5 / options.beta
    return (pairs.chosen_ratio - goal).square() + (pairs.rejected_ratio + goal).square()


def aot(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Margins of the policy against the reference's margins of the same rank in the update. AOT, Melnyk et al. 2024,
    arXiv:2406.05882."""
    assert pairs.transport is not None
    return _smoothed(options.beta * (pairs.chosen - pairs.rejected - pairs.transport.ref_margin), options.label_smoothing)


def aot_unpaired(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Chosen log-ratios against rejected ones of the same rank in the update. AOT for data whose pairs mean nothing."""
    assert pairs.transport is not None
    up = _smoothed(options.beta * (pairs.chosen_ratio - pairs.transport.rejected_ratio), options.label_smoothing)
    down = _smoothed(options.beta * (pairs.transport.chosen_ratio - pairs.rejected_ratio), options.label_smoothing)
    return up + (down - down.detach())  # a comparison is counted once, with its chosen; its rejected, perhaps elsewhere, brings its gradient


def apo_zero(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Chosen up, rejected down. APO, D'Oosterlinck et al. 2024, eq. 7."""
    return 1 - torch.sigmoid(options.beta * pairs.chosen_ratio) + torch.sigmoid(options.beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Both down, the rejected further: for a model that is better than its data. APO, eq. 8."""
    margin = options.beta * (pairs.chosen_ratio - pairs.rejected_ratio)
    return torch.sigmoid(options.beta * pairs.chosen_ratio) + 1 - torch.sigmoid(margin)


def discopop(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """A logistic loss that turns exponential as the margin grows. DiscoPOP, Lu et al. 2024, eq. 5."""
    margin = _margin(pairs, options)
    sharp = margin / options.discopop_tau
    return -F.logsigmoid(margin) * torch.sigmoid(-sharp) + torch.exp(F.logsigmoid(sharp) - margin)  # exp(-margin) alone may be no float32


def sft(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """Negative log-likelihood of the chosen completions; the mean over pairs is the mean over all their tokens in the
    update."""
    return pairs.chosen_nll / pairs.mean_chosen_length


def sigmoid_norm(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """-log sigmoid(beta * mean margin): log-ratios per token, so that length earns nothing (Tulu 3, arXiv:2411.15124)."""
    return -F.logsigmoid(options.beta * _mean_margin(pairs, options))


_ALL = [
    sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm,
]  # fmt: skip
LOSSES: dict[str, Callable[[Pairs, PreferenceOptions], Tensor]] = {loss.__name__: loss for loss in _ALL}
SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")  # these read label_smoothing,
DIVERGENT = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")  # these the f-divergence,
TRANSPORTED = ("aot", "aot_unpaired")  # and these a transport


def preference_loss(pairs: Pairs, options: PreferenceOptions, weights: dict[str, float]) -> Tensor:
    """(n,): the weighted sum of the named losses."""
    return torch.stack([weight * LOSSES[name](pairs, options) for name, weight in weights.items()]).sum(dim=0)


def discounted_tails(lengths: Sequence[tuple[int, int]], T: int, alpha: float, like: Tensor) -> Tensor:
    """(2n, T) weights of the tokens of n pairs, chosen and rejected in turn: 1 up to the shorter one's length, `alpha`
    beyond.

    LD-DPO, Liu et al. 2024, arXiv:2409.06411: what a completion has only for being longer counts less.
    """
    shorter = torch.tensor([min(pair) for pair in lengths for _ in pair], device=like.device)  # (2n,)
    return torch.where(torch.arange(T, device=like.device) < shorter[:, None], like.new_ones(()), like.new_full((), alpha))


def on_policy_weights(logps: Tensor, sum_p2: Tensor, mask: Tensor) -> Tensor:
    """(n,) how likely the policy itself would have written a pair, rows being chosen and rejected in turn. WPO, Zhou et
    al. 2024, eq. 2.

    A completion's weight is exp(mean over its tokens of log p - log sum p^2): 1 for text drawn from the policy, on
    average. logps, sum_p2 and mask (2n, T). Detached: a weight is not trained.
    """
    aligned = torch.where(mask, logps - sum_p2.clamp(min=torch.finfo(sum_p2.dtype).tiny).log(), 0.0).detach()
    return (aligned.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).exp().view(-1, 2).prod(dim=1)
