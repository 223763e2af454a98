"""Text that repeats itself. Counted in tokens, so that it works for every language and script."""

from __future__ import annotations

from posttrain.errors import UserError
from posttrain.rewards.reward import RewardFunction, reward


def repetition(ngram: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """`max_penalty` times the fraction of n-grams of tokens that occurred before in the completion. Too short for one
    n-gram: 0."""
    if ngram < 1:
        raise UserError(f"repetition: ngram={ngram}: use 1 or more")
    if not -float("inf") < max_penalty <= 0:
        raise UserError(f"repetition: max_penalty={max_penalty} must not be positive: it is what the worst text earns")

    def score(completion: str, completion_ids: list[int]) -> float:
        return max_penalty * repeated_fraction(completion_ids, ngram) if max_penalty else 0.0

    return reward(name="repetition", range=(max_penalty, 0.0))(score)


def repeated_fraction(token_ids: list[int], ngram: int) -> float:
    """1 - different n-grams / all n-grams; 0 when there is none."""
    total = len(token_ids) - ngram + 1
    if total < 1:
        return 0.0
    different = {tuple(token_ids[start : start + ngram]) for start in range(total)}
    return 1.0 - len(different) / total
