"""The policy objectives of GRPO and its relatives. Pure tensors: (B, T) in, per-token terms and metrics out.

An objective is a surrogate (how a ratio is bounded), a level (token or completion) and a reduction (what a token
weighs): one row of a table. Normalising is the caller's job: loss = (terms.per_token * objective.row_weights(...)[:,
None]).sum(), added over micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal

from torch import Tensor

from posttrain.errors import UserError, did_you_mean
from posttrain.losses.kl import LOSS_CORRECTIONS, kl_term
from posttrain.losses.options import PolicyOptions
from posttrain.losses.ratio import Ratio, masked_mean
from posttrain.losses.reductions import Count, RowWeights, StepCounts, constant_length, sequence_mean, sequence_sum, token_mean
from posttrain.losses.surrogates import Surrogate, capped, clipped, soft_gated, variational
from posttrain.losses.tally import Tally

__all__ = ["OBJECTIVES", "PPO", "RLOO", "Objective", "PolicyOptions", "Tally", "Terms", "find_objective", "policy_terms"]

GROUP = "posttrain.objectives"  # entry points with which other packages add to OBJECTIVES


@dataclass(frozen=True)
class Objective:
    """One row of the table."""

    surrogate: Callable[[Ratio, Tensor, PolicyOptions], Surrogate]
    reduction: RowWeights
    per_sequence: bool = False  # one ratio per completion whatever the options say; otherwise the options choose
    whole_ratio: bool = False  # per sequence: the product of its tokens' ratios, not their geometric mean
    tokens_of: Literal["step", "generation"] = "step"  # whose tokens `num_tokens` counts: this optimizer step's own, or
    # the whole generation batch's times (accumulation steps / steps per generation), which is the same for every step
    # it is used for

    def row_weights(self, lengths: Tensor, *, num_rows: Count, num_tokens: Count, max_completion_length: int) -> Tensor:
        """What each row's summed terms are multiplied by, (B,), from its count of trained tokens (B,) and the counts of
        the whole step."""
        return self.reduction(lengths, StepCounts(num_rows, num_tokens, max_completion_length))


# bnpo's mean is over the step's tokens, all micro-batches and ranks together; elsewhere it may be found as a mean of
# micro-batch means.
OBJECTIVES = {
    "grpo": Objective(clipped, sequence_mean),
    "bnpo": Objective(clipped, token_mean),
    "dr_grpo": Objective(clipped, constant_length),
    "dapo": Objective(clipped, token_mean, tokens_of="generation"),
    "cispo": Objective(capped, token_mean, tokens_of="generation"),
    "gspo": Objective(clipped, sequence_mean, per_sequence=True),
    "sapo": Objective(soft_gated, sequence_mean),
    "luspo": Objective(clipped, sequence_sum),
    "vespo": Objective(variational, token_mean, tokens_of="generation"),
}
# The objectives of trainers of their own, which no loss_type names.
PPO = Objective(clipped, token_mean)
RLOO = Objective(clipped, sequence_mean, per_sequence=True, whole_ratio=True)  # one term a completion: its mean over tokens is the term itself


@dataclass(frozen=True)
class Terms:
    """A micro-batch's share of the loss, before weights, and its metrics as sums that can be added."""

    per_token: Tensor  # (B, T) surrogate + beta * KL; exactly 0, without gradient, where masked out
    metrics: dict[str, Tally]  # ratio, kl (if there is a reference), and the objective's own clip ratios or phi


def policy_terms(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    options: PolicyOptions,
    ref_logps: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    policy_mask: Tensor | None = None,
) -> Terms:
    """The loss of each token under `objective`. Only `logps` gets a gradient.

    logps, old_logps, ref_logps, rollout_logps (B, T); advantages (B,) of completions or (B, T) of tokens; mask (B, T),
    true where a token is trained. old_logps None: the rollouts are from this very policy (ratio 1). rollout_logps, as
    the engine computed them while sampling, only decide the off-policy mask (None: old_logps do). policy_mask (B, T): tokens whose policy
    term counts (None: all); KL, ratios and denominators do not see it.
    """
    advantages = advantages.detach().reshape(len(logps), -1).to(logps.dtype)  # (B, 1) or (B, T)
    per_sequence = objective.per_sequence or options.importance_sampling_level == "sequence"
    ratio = Ratio.between(logps, old_logps, mask, per_sequence=per_sequence, whole=objective.whole_ratio)
    surrogate = objective.surrogate(ratio, advantages, options)
    metrics = {"ratio": Tally.of(ratio.weight, ratio.mask)}
    metrics |= {name: Tally.of(values, ratio.mask) for name, values in surrogate.notes.items()}

    loss = surrogate.loss * ratio.mask  # (B, T)
    if options.off_policy_mask_threshold is not None:
        kept = near_policy(ratio, rollout_logps, advantages, options.off_policy_mask_threshold)  # (B, 1)
        loss = loss * kept
        metrics["off_policy_kept"] = Tally.of(kept, ratio.mask)
    if policy_mask is not None:
        loss = loss * policy_mask

    if ref_logps is not None:
        kl = kl_term(ratio, ref_logps, options.kl_estimator, corrected=options.use_bias_correction_kl)  # (B, T)
        metrics["kl"] = Tally.of(kl, ratio.mask)
        if options.kl_estimator in LOSS_CORRECTIONS and options.beta != 0:
            loss = loss + options.beta * kl
    elif options.beta != 0 and options.kl_estimator in LOSS_CORRECTIONS:
        raise ValueError(f"beta is {options.beta} but no ref_logps were given: a KL term needs the reference's log-probs")
    return Terms(per_token=loss, metrics=metrics)


def near_policy(ratio: Ratio, rollout_logps: Tensor | None, advantages: Tensor, threshold: float) -> Tensor:
    """(B, 1) bool: keep good completions, and bad ones that the policy has not left behind (DeepSeek-V3.2's off-policy
    mask)."""
    drift = -ratio.log_tokens if rollout_logps is None else (rollout_logps - ratio.logps).where(ratio.mask, ratio.logps.new_zeros(()))  # (B, T)
    return (advantages >= 0) | (masked_mean(drift.detach(), ratio.mask) <= threshold)


def find_objective(loss_type: str) -> Objective:
    """The table's row for a name, or the Objective of a package's entry point. Raises UserError for an unknown one."""
    if loss_type in OBJECTIVES:
        return OBJECTIVES[loss_type]
    outside = entry_points(group=GROUP)
    if loss_type in outside.names:
        found: Objective = outside[loss_type].load()
        return found
    known = [*OBJECTIVES, *outside.names]
    raise UserError(f"loss_type {loss_type!r} is unknown; there are: {', '.join(known)}.{did_you_mean(loss_type, known)}")
