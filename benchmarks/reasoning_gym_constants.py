"""Which tasks of reasoning-gym give full marks to texts that do not depend on the question? Asked of every task, as the library scores and guarded.

Texts: constants, what other rows answer, the question itself and its parts, numbers that stand in it. A text falls a task when it earns full marks
in at least a third of the rows without being one of their right answers in another writing. What is right by chance (two rows with the
same answer, "0" where the answer is "0") is no fall: such rows are not counted.

usage: reasoning_gym_constants.py [--rows N] [TASK ...]
"""

from __future__ import annotations

import argparse
import functools
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import hardware
from reasoning_gym.factory import DATASETS

from posttrain.reasoning_gym_tasks import open_task, question
from posttrain.rewards.library.reasoning_gym import guarded_score

CONSTANTS = [
    "", " ", "?", "0", "1", "2", "3", "5", "7", "10", "24", "100", "-1", "0.5", "1/2", "0.0", "True", "False", "Yes", "No", "yes", "no", "None", "null", "A", "B", "C", "D",
    "a", "x", "y", "x + 1", "x**2", "C", "[]", "{}", "()", "[[]]", "[0]", "[1]", "[0, 0]", "0 0", "0 0\n0 0", "{'a': 1}", '{"a": 1}', "6*4", "6*4*1*1", "3*8*1*1", "8*3", "12*2", "4*6", "24.0",
    "(1+1)*12", "1*2*3*4", "answer", "impossible", "no solution", "-", "*", "#", "up", "up down", "UP", "LEFT", "forward", "0 1", "1 2 3", "1 2 3 4", "a b c", "abc", "1,2", "1, 2, 3",
    "Monday", "2024-01-01", "12:00", "Knight", "knight", "Alice", "Alice is a knight", "red", "blue", "lambda x: x", "def f(x): return x", "0 <= x <= 0", "1 + 1", "1 = 1", "...", "\n",
]  # fmt: skip


class TooSlow(BaseException):
    pass


def texts_of(rows: list[dict[str, Any]], row: int) -> dict[str, str]:
    """Kind of text -> the text, for one row."""
    asked = rows[row]["question"]
    others = {f"answer of row +{step}": str(rows[(row + step) % len(rows)]["answer"] or "") for step in (1, 2, 3)}
    numbers = re.findall(r"-?\d+(?:\.\d+)?", asked)
    lines = [line for line in asked.splitlines() if line.strip()]
    parts = {
        "the question": asked,
        "its last line": lines[-1],
        "its first line": lines[0],
        "its last word": asked.split()[-1],
        "its last number": numbers[-1] if numbers else "",
        "its first number": numbers[0] if numbers else "",
        "all its numbers": " ".join(numbers),
        "its numbers, as a list": f"[{', '.join(numbers)}]",
        "the sum of its numbers": str(sum(float(number) for number in numbers)),
        "its numbers in a product": "*".join(numbers),
        "what it quotes last": (re.findall(r"[\"'`]([^\"'`\n]+)[\"'`]", asked) or [""])[-1],
        "its last lines": "\n".join(lines[-4:]),
    }
    return {repr(text): text for text in CONSTANTS} | others | parts


def same(text: str, gold: str | None) -> bool:
    plain = [re.sub(r"[\W_]+", "", each or "").casefold() for each in (text, gold)]
    return plain[0] == plain[1] != ""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """None: it took longer."""

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    except TooSlow:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def tried(score: Callable[[], float]) -> float:
    """0 where the scorer raises: that is not asked here."""
    try:
        return float(score())
    except Exception:
        return 0.0


def asked(name: str, size: int) -> dict[str, Any]:
    """kind of text -> rows that it earned full marks in, unguarded and guarded."""
    task = f"{name}?size={size}&seed=11"
    dataset, rows = open_task(task), [within(20.0, functools.partial(question, task, index)) for index in range(size)]
    if None in rows:
        raise RuntimeError("a question takes longer than 20 s to make")
    paid: dict[str, list[int]] = {}
    slow = 0
    for row, entry in enumerate(rows):
        for kind, text in texts_of(rows, row).items():
            if same(text, entry["answer"]):
                continue
            for which, score in enumerate((lambda: dataset.score_answer(text, entry), lambda: guarded_score(dataset, entry, text))):  # noqa: B023
                got = within(2.0, lambda: tried(score))  # noqa: B023
                slow += got is None
                if got is not None and got >= 1.0:
                    paid.setdefault(kind, [0, 0])[which] += 1
    return {"rows": size, "too_slow": slow, "paid": paid}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("tasks", nargs="*")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    found: dict[str, Any] = {}
    for name in given.tasks or sorted(set(DATASETS) - {"composite"}):
        try:
            result = asked(name, given.rows)
        except Exception as error:
            print(f"{name:28} cannot be asked: {type(error).__name__}: {error}", flush=True)
            continue
        found[name] = result
        worst = sorted(result["paid"].items(), key=lambda item: (-item[1][1], -item[1][0]))[:4]
        if worst:
            print(f"{name:28} " + "; ".join(f"{kind[:40]} {before} -> {after}" for kind, (before, after) in worst), flush=True)
    fallen = [sum(any(3 * counts[which] >= each["rows"] for counts in each["paid"].values()) for each in found.values()) for which in (0, 1)]
    print(f"{len(found)} tasks; a text without the question earns full marks in a third of the rows: {fallen[0]} unguarded, {fallen[1]} guarded")
    if not given.tasks:
        results = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "tasks": len(found),
            "fallen_unguarded": fallen[0],
            "fallen_guarded": fallen[1],
            "found": {name: each["paid"] for name, each in found.items() if each["paid"]},
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(f"written to {hardware.save('reasoning_gym_constants', results)}")


if __name__ == "__main__":
    sys.exit(main())
