"""How long a completion is: a soft limit, a cosine schedule, brevity. Lengths are in tokens, as the policy sampled
them.

Each is bounded, and none looks at the text. `cosine_length` also needs to know whether the answer is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.library.arithmetic import right_number
from posttrain.rewards.reward import RewardFunction, reward

Verdict = Callable[[str, Any], Any]  # (completion, answer) -> positive: right; 0, negative, False: wrong; None: cannot tell


def soft_overlong(max_tokens: int = 1024, cache: int = 256) -> RewardFunction:
    """0 up to `max_tokens - cache` tokens, falling to -1 at `max_tokens`, -1 beyond. Yu et al. 2025 (DAPO), eq. 13."""
    if not 0 < cache <= max_tokens:
        raise UserError(f"soft_overlong: cache={cache} must lie between 1 and max_tokens={max_tokens}")

    def score(completion_ids: list[int], completion: str) -> float:
        over = len(completion_ids) - (max_tokens - cache)
        return -min(max(over, 0) / cache, 1.0)

    return reward(name="soft_overlong", range=(-1.0, 0.0))(score)


def brevity(target: int = 128, limit: int = 1024) -> RewardFunction:
    """1 up to `target` tokens, falling linearly to 0 at `limit`. An empty completion earns 0: silence is not
    brevity."""
    if not 0 < target < limit:
        raise UserError(f"brevity: target={target} must lie between 1 and limit={limit}")

    def score(completion_ids: list[int], completion: str) -> float:
        if not completion.strip():
            return 0.0
        return 1.0 - min(max(len(completion_ids) - target, 0) / (limit - target), 1.0)

    return reward(name="brevity", range=(0.0, 1.0))(score)


def cosine_length(
    max_tokens: int = 1024, right: tuple[float, float] = (0.5, 1.0), wrong: tuple[float, float] = (-1.0, -0.5), verdict: Verdict = right_number
) -> RewardFunction:
    """A right answer earns more when short, a wrong one more when long: think longer where it is hard. Yeo et al. 2025,
    appendix B.

    `right` and `wrong` are (lowest, highest). A right answer goes from the highest at length 0 to the lowest at
    `max_tokens`, a wrong one the other way, along half a cosine; longer counts as `max_tokens`. `verdict` judges
    (completion, answer); by default the last number counts.
    """
    for name, ends in {"right": right, "wrong": wrong}.items():
        if len(ends) != 2 or ends[0] > ends[1]:
            raise UserError(f"cosine_length: {name} is (lowest, highest), not {ends}")
    if max_tokens < 1:
        raise UserError(f"cosine_length: max_tokens={max_tokens}: use 1 or more")
    if not callable(verdict):
        raise UserError(f"cosine_length: verdict must be a function of (completion, answer), not {verdict!r}")

    def score(completion: str, completion_ids: list[int], answer: Any) -> float | None:
        judged = verdict(completion, answer)
        if judged is None:
            return None
        shortness = 0.5 * (1.0 + math.cos(math.pi * min(len(completion_ids) / max_tokens, 1.0)))  # 1 at length 0, 0 at max_tokens
        low, high = right if judged > 0 else (wrong[1], wrong[0])
        return low + (high - low) * shortness

    return reward(name="cosine_length", range=(min(right[0], wrong[0]), max(right[1], wrong[1])))(score)
