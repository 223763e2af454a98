"""The scorers of reasoning-gym, guarded against reward hacking. Rows come from `reasoning-gym:` sources.

The library's scorers are lenient: many give part of the credit to any text that contains the answer ("14" for "4"), one
takes "nan" for right, one takes anything but "True" for "False", some reward nonsense, and a few run `eval` on the
text. Guarded, an answer gets the scorer's value only if nonsense gets less, it is finite, it is not just a text around
the right answer, nothing in it could be executed, and it does not get full marks for other questions too (one scorer,
puzzle24, looks at an answer's form only). In a rubric all of it runs in processes that can be killed, since SymPy may
compute for ever; what is not scored in time is dropped and counted.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from posttrain.errors import UserError
from posttrain.reasoning_gym_tasks import library, open_task, question
from posttrain.rewards.reward import RewardFunction, RewardSource, reward

SECONDS = 10.0  # for one answer; almost all take milliseconds
MEMORY_MB = 2048
NONSENSE = ("?", "nonsense")
FEE = 0.05  # what several scorers give for any answer at all
LONGEST = 2000  # characters of an answer, unless the right one is longer
OTHERS = 4  # further questions for which an answer must not be right too, unless it is their gold answer
TERMS = 2000  # that an answer may have once it is multiplied out
_RUNS_TEXT = re.compile(r"\b(eval|exec|sympify|(sympy|sp)\.parse_expr)\(")
_FRAME = re.compile(r"[\s+.0,;:$%()'\"]*")  # what may stand around the right answer: 42.0, +42, (42)
_NAMES = {"sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "exp", "log", "ln", "sqrt", "Abs", "pi", "True", "False"}
_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load, ast.Call, ast.Dict, ast.List, ast.Tuple, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.FloorDiv, ast.Mod, ast.Pow, ast.BitXor, ast.USub, ast.UAdd,
)  # fmt: skip


def reasoning_gym(tag: str | None = "answer", guarded: bool = True) -> RewardFunction:
    """0 to 1 by the task's own scorer. tag: the answer stands in the last <tag>...</tag>; None: it is the whole
    completion.

    guarded: see the top of this file. False is the library's score as it is, exceptions and all; it executes text for
    some tasks.
    """

    @reward(name="reasoning_gym", range=(0.0, 1.0), decides=True, prepare=library, timeout=SECONDS, on_error="drop", workers=2, memory_mb=MEMORY_MB)
    def score(completion: str, reasoning_gym_task: str, reasoning_gym_index: int, answer: Any = None) -> float:
        dataset, entry = open_task(reasoning_gym_task), question(reasoning_gym_task, reasoning_gym_index)
        if answer is not None and answer != entry["answer"]:
            raise UserError(
                f"the row says that the answer to question {reasoning_gym_index} of {reasoning_gym_task} is {str(answer)[:100]!r}, here it is "
                f"{str(entry['answer'])[:100]!r}. Make the rows anew with this version of reasoning-gym; a column `answer` that was changed on purpose "
                "needs another name"
            )
        said = _answer(completion, tag)
        if not guarded:
            return float(dataset.score_answer(said, entry))
        return 0.0 if said is None else guarded_score(dataset, entry, said)

    return replace(score, source=RewardSource("reasoning_gym", {"tag": tag, "guarded": guarded}, None))


def guarded_score(dataset: Any, entry: dict[str, Any], answer: str) -> float:
    """The scorer's value, or 0 where it rewards a text that is no answer. An answer on which the scorer raises is
    wrong."""
    gold = entry["answer"]
    if answer == gold:
        return 1.0
    if len(answer) > max(LONGEST, 2 * len(gold or "")) or not _is_finite(answer) or (_runs_text(dataset.__class__) and not _is_harmless(answer)):
        return 0.0
    score = _asked(dataset, entry, answer)
    if gold and gold in answer and (score < 1.0 or not _FRAME.fullmatch(answer.replace(gold, "", 1))):
        return 0.0  # rewarded for containing the right answer
    if score == 1.0 and (_is_rounded_away(answer, gold) or not _is_of_this_question(dataset, entry, answer)):
        return 0.0
    return score if score > max(FEE, *(_asked(dataset, entry, text) for text in NONSENSE)) else 0.0


def _is_of_this_question(dataset: Any, entry: dict[str, Any], answer: str) -> bool:
    """By the task's own check, or because the answer is wrong for some other question."""
    metadata = entry.get("metadata") or {}
    if (check := CHECKS.get(str(metadata.get("source_dataset")))) is not None:
        return check(answer, metadata)
    index = metadata.get("source_index")
    if not isinstance(index, int):
        return True
    nearby = [dataset[(index + step) % len(dataset)] for step in range(1, 1 + min(OTHERS, len(dataset) - 1))]
    others = [other for other in nearby if other["answer"] != entry["answer"] and other["question"] != entry["question"]]
    return len(others) < 2 or any(_asked(dataset, other, answer) < 1.0 for other in others)


def _makes_24(answer: str, metadata: dict[str, Any]) -> bool:
    """The four operators on exactly the numbers that were given. The library takes any four numbers, and truncates
    their value to a whole number."""
    numbers: list[int] = []

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    try:
        return value(ast.parse(answer.strip(), mode="eval").body) == 24 and sorted(numbers) == sorted(metadata["numbers"])
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


CHECKS: dict[str, Callable[[str, dict[str, Any]], bool]] = {"puzzle24": _makes_24}  # of tasks whose scorer ignores the question
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _is_rounded_away(answer: str, gold: str | None) -> bool:
    """Whether both are numbers, more than 1 % apart: one scorer rounds the right answer to the digits that were given,
    so that 0 is near anything."""
    try:
        given, right = float(answer.replace(",", "")), float((gold or "").replace(",", ""))
    except ValueError:
        return False
    return abs(given - right) > 0.01 * abs(right)


def _asked(dataset: Any, entry: dict[str, Any], answer: str) -> float:
    try:
        score = float(dataset.score_answer(answer, entry))
    except Exception:  # hostile text: one on which the scorer raises is not the answer
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


def _answer(completion: str, tag: str | None) -> str | None:
    if tag is None:
        return completion.strip()
    _, found, tail = completion.rpartition(f"<{tag}>")
    answer, closed, _ = tail.partition(f"</{tag}>")
    return answer.strip() if found and closed else None


def _is_finite(answer: str) -> bool:
    """Whether no number in it is infinite or none at all."""
    for word in re.findall(r"[\w.+-]+", answer[: 2 * LONGEST]):
        try:
            if not math.isfinite(float(word)):
                return False
        except ValueError:
            if re.fullmatch(r"[+-]?\d*(inf|infinity|nan|oo|zoo)[ji]?", word, re.IGNORECASE):
                return False
    return True


@functools.cache
def _runs_text(kind: type) -> bool:
    """Whether the source of a dataset's class calls something that executes text (sympy's parser does)."""
    for part in kind.__mro__:
        if part.__module__.startswith("reasoning_gym."):
            source, module = inspect.getsource(part), inspect.getsource(sys.modules[part.__module__])
            if _RUNS_TEXT.search(source) or ("parse_expr(" in source and "import parse_expr" in module):
                return True
    return False


def _is_harmless(answer: str) -> bool:
    """Whether it is arithmetic or a list of plain values: no attributes, no calls but of known functions, no towers of
    powers.

    Text in quotes must be plain too: SymPy parses, and so executes, text that it is handed by an expression
    (`sin("...")`).
    """
    try:
        tree = ast.parse(answer.strip(), mode="eval")
        return answer.isascii() and all(_allowed(node) for node in ast.walk(tree)) and _terms(tree.body) <= TERMS
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _is_plain(answer)


def _is_plain(answer: str) -> bool:
    """Letters, digits and separators without brackets: scorers read such text without executing it, or fail at its
    syntax."""
    return re.fullmatch(r"[\w\s.,;:+*/^|-]*", answer, re.ASCII) is not None and "__" not in answer and "**" not in answer


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return _is_plain(node.value) if isinstance(node.value, str) else isinstance(node.value, (float, bool)) or _is_below(node.value, 10**15)
    if isinstance(node, ast.Name):
        return node.id in _NAMES or len(node.id) <= 2
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _NAMES and not node.keywords
    if isinstance(node, ast.BinOp) and any(_is_many(side) for side in (node.left, node.right)):
        return False  # a list or a text a billion times
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        small = isinstance(node.right, ast.Name) or (isinstance(node.right, ast.Constant) and _is_below(node.right.value, 51))
        return small and not any(isinstance(inner, ast.Pow) for inner in ast.walk(node.left))
    return isinstance(node, _NODES)


def _terms(node: ast.AST) -> int:
    """How many terms a formula has at most once it is multiplied out: (a + b)**50 has 51, six letters to the 50th three
    million."""
    if isinstance(node, ast.BinOp):
        left, right = _terms(node.left), _terms(node.right)
        if isinstance(node.op, (ast.Add, ast.Sub)):
            return left + right
        if isinstance(node.op, ast.Pow):
            power = node.right.value if isinstance(node.right, ast.Constant) and isinstance(node.right.value, int) else 1
            return math.comb(left + power - 1, power)
        return left * right
    parts = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    return max(1, sum(map(_terms, parts)))


def _is_many(node: ast.AST) -> bool:
    return isinstance(node, (ast.List, ast.Tuple, ast.Dict)) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_below(value: Any, limit: int) -> bool:
    return isinstance(value, (int, float)) and abs(value) < limit
