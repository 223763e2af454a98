"""A rubric for base models that think in their own tags: the form, the answer, and how near a wrong number is. From -10
to +13.

After the rewards of the popular Qwen3 notebook, with the same top of +13 and four differences. A wrong number earns
less the farther off it is, alike above and below, at gold 0 too (there: steps at 10 % and 20 %, an exception at 0). No
answer never earns more than a wrong one. A number is read as a number ("The answer, is 20" has one). Nothing raises.

The template writes the opening tag of the reasoning, so completions begin inside it; `prefilled=False` expects it from
the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.rewards.library.arithmetic import gold_number
from posttrain.rewards.library.numbers import last_number, relative_error
from posttrain.rewards.library.tags import Pair, checked_pair, inside
from posttrain.rewards.reward import RewardFunction, reward

WORKING_OUT: Pair = ("<start_working_out>", "<end_working_out>")
SOLUTION: Pair = ("<SOLUTION>", "</SOLUTION>")
OUTLIER = 1.0  # relative error from which a number earns no more than no number


def form_exact(tags: Pair, solution: Pair, prefilled: bool) -> RewardFunction:
    """+3 if the reasoning closes once and is followed by one solution in tags at the very end, else 0. Reasoning and
    solution may have lines."""

    def score(completion: str) -> float:
        text = tags[0] + completion if prefilled else completion.lstrip()
        is_once = all(text.count(tag) == 1 for tag in (*tags, *solution))
        _, _, rest = text.partition(tags[1])
        said = (inside(rest, solution) or "").strip()
        return 3.0 if is_once and said and text.startswith(tags[0]) and text.rstrip().endswith(solution[1]) else 0.0

    return reward(name="form_exact", range=(0.0, 3.0))(score)


def form_approximate(counted: Sequence[str]) -> RewardFunction:
    """+0.5 for each tag that stands exactly once, -1 for each other."""

    def score(completion: str) -> float:
        return sum(0.5 if completion.count(tag) == 1 else -1.0 for tag in counted)

    return reward(name="form_approximate", range=(-1.0 * len(counted), 0.5 * len(counted)))(score)


def answer_near(solution: Pair) -> RewardFunction:
    """+5 if the solution is the gold text; +3.5 if it is another writing of the gold number; a wrong number from +2
    (near) to -4.5 (an error of 100 % and more); no number -4.5. Without a gold number: +5 for the gold text, else
    -4.5."""

    def score(completion: str, answer: Any) -> float | None:
        if answer is None or not str(answer).strip():
            return None
        said = inside(completion, solution)
        if said is not None and said.strip() == str(answer).strip():
            return 5.0
        gold, number = gold_number(answer), None if said is None else last_number(said)
        if gold is None or number is None:
            return -4.5
        return 3.5 if number == gold else 2.0 - 6.5 * min(relative_error(number, gold) / OUTLIER, 1.0)

    return reward(name="answer_near", range=(-4.5, 5.0))(score)


def number_right(solution: Pair) -> RewardFunction:
    """+3.5 if the last number of the solution is the gold number, another number -1.5, none -2.5. None without a gold
    number."""

    def score(completion: str, answer: Any) -> float | None:
        gold = gold_number(answer)
        if gold is None:
            return None
        said = inside(completion, solution)
        number = None if said is None else last_number(said)
        return -2.5 if number is None else 3.5 if number == gold else -1.5

    return reward(name="number_right", range=(-2.5, 3.5), decides=True)(score)


def qwen3_proximity(tags: Sequence[str] = WORKING_OUT, solution: Sequence[str] = SOLUTION, prefilled: bool = True) -> list[RewardFunction]:
    pair, answer = checked_pair(tags, "qwen3-proximity: tags"), checked_pair(solution, "qwen3-proximity: solution")
    counted = (pair[1], *answer) if prefilled else (*pair, *answer)
    return [form_exact(pair, answer, prefilled), form_approximate(counted), answer_near(answer), number_right(answer)]
