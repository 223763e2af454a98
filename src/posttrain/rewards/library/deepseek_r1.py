"""The rubric of DeepSeek-R1: accuracy 1, format 1, length from -1 to 0, language from 0 to 1. DeepSeek-AI 2025
(arXiv:2501.12948), section 2.

The paper gives the kinds of reward, not their code; the definitions are this library's. Reasoning stands in `tags`; the
answer is read after it only, so that an answer that occurs in the reasoning earns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.rewards.library.arithmetic import final_answer, gold_number, gold_text
from posttrain.rewards.library.language import language
from posttrain.rewards.library.length import soft_overlong
from posttrain.rewards.library.numbers import whole_number_text
from posttrain.rewards.library.tags import THINK, Pair, after_reasoning, checked_pair, think_format
from posttrain.rewards.reward import RewardFunction, reward, verifier


def accuracy(tags: Sequence[str] = THINK) -> RewardFunction:
    """Right if the final answer after the reasoning is the gold text or the gold number. The answer is what stands in
    the last `<answer>`, else after the last `#`, else everything after the reasoning. A completion without closed
    reasoning has no answer."""
    pair = checked_pair(tags, "accuracy: tags")

    def is_right(completion: str, answer: Any) -> bool | None:
        gold = gold_text(answer)
        if gold is None:
            return None
        if pair[1] not in completion:
            return False
        said = final_answer(after_reasoning(completion, pair)).strip()
        number = whole_number_text(said)
        return said == gold or (number is not None and number == gold_number(answer))

    return verifier(name="accuracy")(is_right)


def deepseek_r1(
    tags: Sequence[str] = THINK, prefilled: bool = False, max_tokens: int = 4096, cache: int | None = None, code: str = "en"
) -> list[RewardFunction]:
    """`max_tokens` should be the run's max_completion_length; the length penalty begins `cache` tokens (a fifth of it)
    before. `code`: language."""
    pair: Pair = checked_pair(tags, "deepseek-r1: tags")
    length = soft_overlong(max_tokens, max(max_tokens // 5, 1) if cache is None else cache)
    return [
        accuracy(pair),
        _renamed("format", think_format(pair, prefilled)),
        _renamed("length", length),
        language(code),
    ]


def _renamed(name: str, made: RewardFunction) -> RewardFunction:
    return reward(name=name, range=made.range)(made.function)
