"""The settings of a policy objective, as one value. Names and defaults are those users know from GRPO configs.

What conflicts with what is the trainer configuration's business; the arithmetic here takes any combination literally.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PolicyOptions:
    """How far a policy may move per update, and what pulls it back to its reference."""

    epsilon: float = 0.2  # ratios below 1 - epsilon give no gradient to a bad completion (A < 0)
    epsilon_high: float | None = None  # ratios above 1 + this give none to a good one; for cispo the absolute cap (5 is usual). None: epsilon
    delta: float | None = None  # upper bound of the ratio where A < 0, which PPO's clip leaves open. None: no bound
    importance_sampling_level: Literal["token", "sequence"] = "token"  # sequence: one length-normalised ratio per completion; gspo always is
    sapo_temperature_pos: float = 1.0  # sharpness of sapo's soft gate where A > 0
    sapo_temperature_neg: float = 1.05  # and elsewhere
    vespo_k_pos: float = 2.0  # vespo's weight is w^k exp(lambda (1 - w)): k and lambda where A >= 0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0  # and where A < 0
    vespo_lambda_neg: float = 2.0
    beta: float = 0.0  # strength of the pull to the reference; 0: none
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # see losses/kl.py for the objective that each solves; k1 acts in the reward, never in the loss
    use_bias_correction_kl: bool = True  # multiply the KL term by the ratio: it then follows the reverse KL of the current policy
    off_policy_mask_threshold: float | None = None  # bad completions whose mean log(sampler / policy) is above this leave the policy term. None: none

    @property
    def cap(self) -> float:
        """The upper epsilon, whether given or taken over from the lower one."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high
