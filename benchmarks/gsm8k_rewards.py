"""The `gsm8k` rubric on real solutions: does it judge as the data's authors did?

Two questions, asked of the files of the repository openai/grade-school-math (Cobbe et al. 2021, MIT licence):
test.jsonl: does every human solution, put into the rubric's format, earn the maximum?
example_model_solutions.jsonl: does `correctness` agree with the flag `is_correct` of every solution that four models wrote? The popular rule, which
compares text, is judged beside it. Every disagreement is listed in the JSON with its reason.

usage: gsm8k_rewards.py DATA_DIRECTORY
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import hardware

from posttrain import Rubric
from posttrain.rewards.library.arithmetic import gold_number
from posttrain.rewards.library.numbers import last_number, whole_number_text
from posttrain.types import Completion, Group, StopReason, Task

FORM = "<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def scored(rubric: Rubric, rows: list[tuple[str, str]]) -> list[Completion]:
    """rows: (completion, gold answer)."""
    groups = [
        Group(Task(number, "?", {"answer": gold}), [Completion([0], [1], [True], [0.0], [0.0], StopReason.STOP, text)])
        for number, (text, gold) in enumerate(rows)
    ]
    rubric.score(groups)
    return [group.completions[0] for group in groups]


def in_form(solution: str, mark: str) -> str:
    """The solution as reasoning, what follows the last mark as the answer; without a mark the answer is empty."""
    reasoning, found, answer = solution.rpartition(mark)
    return FORM.replace("{reasoning}", (reasoning if found else solution).strip()).replace("{answer}", answer.strip() if found else "")


def why(solution: str, gold: str, judged_right: bool) -> str:
    """Why a rubric and the flag differ."""
    _, found, answer = solution.rpartition("A:")
    same_number = whole_number_text(answer.strip()) == gold_number(gold)
    if judged_right:
        return "the rubric accepts it, the flag does not"
    if not found:
        return "no 'A:' line, so no answer in the form"
    if same_number:
        return "the same number in another writing"
    return "the answer is not a number alone" if last_number(answer) == gold_number(gold) else "the answer is another number"


def judge_models(rubric: Rubric, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many solutions are judged as flagged, and every one that is not, with the reason."""
    asked = [(number, model, row["ground_truth"].rpartition("A:")[2].strip(), row[model]) for number, row in enumerate(rows) for model in MODELS]
    completions = scored(rubric, [(in_form(written["solution"], "A:"), gold) for _, _, gold, written in asked])
    disagreements = []
    for (number, model, gold, written), completion in zip(asked, completions, strict=True):
        right = completion.scores["correctness"] == 2.0
        if right != written["is_correct"]:
            reason = why(written["solution"], gold, right)
            end = written["solution"][-60:]
            disagreements.append({"row": number, "model": model, "gold": gold, "end": end, "rubric": right, "is_correct": not right, "why": reason})
    reasons = dict(Counter(found["why"] for found in disagreements).most_common())
    flagged_right = sum(written["is_correct"] for *_, written in asked)
    return {
        "judged": len(asked),
        "flagged_right": flagged_right,
        "as_flagged": len(asked) - len(disagreements),
        "reasons": reasons,
        "disagreements": disagreements,
    }


def main(data: Path) -> None:
    started = time.perf_counter()
    rubric = Rubric("gsm8k")
    humans = [(in_form(row["answer"], "####"), row["answer"].rpartition("####")[2].strip()) for row in read(data / "test.jsonl")]
    full = sum(completion.reward == rubric.range[1] for completion in scored(rubric, humans))
    print(f"human solutions at the maximum of {rubric.range[1]:g}: {full} of {len(humans)}")
    rows = read(data / "example_model_solutions.jsonl")
    found = {"repaired": judge_models(rubric, rows), "legacy": judge_models(Rubric.from_config([{"reward": "gsm8k", "legacy": True}]), rows)}
    for name, result in found.items():
        print(
            f"model solutions judged as flagged, {name}: {result['as_flagged']} of {result['judged']} ({result['flagged_right']} of them flagged right)"
        )
        for reason, count in result["reasons"].items():
            print(f"  {count:4}  {reason}")
        for one in result["disagreements"][:20]:
            print(f"        row {one['row']:4} {one['model']:17} gold {one['gold']:8} ends {one['end'][-30:]!r}")
    results = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "human_solutions": {"rows": len(humans), "at_the_maximum": full, "maximum": rubric.range[1]},
        "model_solutions": found,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(f"written to {hardware.save('gsm8k_rewards', results)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
