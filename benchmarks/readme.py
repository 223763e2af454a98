"""The measured block of README.md, made from results/*.json: `python benchmarks/readme.py` after `make bench` or benchmarks/demo.py.

Nothing is typed by hand: without a result its table is absent, and without any result the block says that nothing is claimed.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import hardware

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- measured:start -->", "<!-- measured:end -->"
NOTHING = "Nothing is claimed yet: no benchmark has written its results on this machine. `make bench` does."


def block(results: dict[str, Any]) -> str:
    """What stands between the markers. `results`: name of a results file -> its content; absent ones are left out."""
    parts = [table(results[name]) for name, table in TABLES.items() if name in results]
    return "\n\n".join(parts) or NOTHING


def step_table(result: dict[str, Any]) -> str:
    """One line per case: TRL beside posttrain, and how many times faster or smaller."""
    by_case: dict[tuple[int, int], dict[str, Any]] = {}
    for run in result["runs"]:
        by_case.setdefault((run["case"]["prompt"], run["case"]["completion"]), {})[run["side"]] = run
    lines = []
    for (prompt, completion), sides in by_case.items():
        if len(sides) == 2:
            ours, trl = sides["posttrain"], sides["trl"]
            cells = [_against(ours[key], trl[key], unit) for key, unit in (("step_s", 1.0), ("generation_s", 1.0), ("peak_bytes", 2.0**20))]
            lines.append(f"| {prompt} / {completion} | {' | '.join(cells)} |")
    run = result["runs"][0]
    versions = next((run["versions"] for run in result["runs"] if run["side"] == "trl"), {})
    asked = "bf16" if run["case"]["precision"] == "bf16" else "float32"
    ours = next((run["computed_in"] for run in result["runs"] if run["side"] == "posttrain"), "")
    return "\n".join(
        [
            f"One GRPO step of a 40M-parameter Qwen3 on CPU, {run['case']['generations']} completions of one prompt, TRL {versions.get('trl', '')} against posttrain:",
            "",
            "| prompt / completion tokens | seconds per step | of that, generation | peak MiB above imports |",
            "|---|---|---|---|",
            *lines,
            "",
            f"Median of {run['case']['steps']} steps; {asked} asked of both, posttrain computed in {ours}. {_machine(result)}. Script: `make bench` (benchmarks/grpo_vs_trl.py).",
        ]
    )


def demo_table(result: dict[str, Any]) -> str:
    """One line per seed of the demo."""
    lines = [
        f"| {run['seed']} | {_exam(run['before'])} | {_exam(run['after'])} | {run['seconds']:.0f} |"
        for run in sorted(result["runs"], key=lambda run: run["seed"])
    ]
    questions = result["runs"][0]["after"]["questions"]
    middle = statistics.median(run["after"]["accuracy"] for run in result["runs"])
    return "\n".join(
        [
            f"The demo: greedy accuracy on {questions} sums that training never shows, with 95 % intervals (median after: {middle:.1%}):",
            "",
            "| seed | after SFT | after GRPO | seconds in all |",
            "|---|---|---|---|",
            *lines,
            "",
            f"{_machine(result)}. Script: benchmarks/demo.py.",
        ]
    )


TABLES = {"demo": demo_table, "grpo_vs_trl": step_table}


def _against(ours: float, trl: float, unit: float) -> str:
    digits = 0 if unit > 1 else 2
    return f"{trl / unit:.{digits}f} → {ours / unit:.{digits}f} ({trl / ours:.1f}x)"


def _exam(scores: dict[str, Any]) -> str:
    low, high = scores["interval"]
    return f"{100 * scores['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _machine(result: dict[str, Any]) -> str:
    return hardware.line(result["hardware"])


def filled(text: str, results: dict[str, Any]) -> str:
    before, found, rest = text.partition(START)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        sys.exit(f"{README.name} has no {START} ... {END}")
    return f"{before}{START}\n{block(results)}\n{END}{after}"


def read_results(directory: Path = hardware.RESULTS) -> dict[str, Any]:
    return {name: json.loads(path.read_text()) for name in TABLES if (path := directory / f"{name}.json").is_file()}


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8"), read_results()), encoding="utf-8")
