"""The measured blocks of README.md (the demo, and GRPO beside TRL) and of docs/benchmarks.md (everything), made from results/*.json:
`python benchmarks/readme.py` after `make bench` or benchmarks/demo.py.

Nothing is typed by hand: without a result its table is absent, and without any result the block says that nothing is claimed.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hardware

README = Path(__file__).parents[1] / "README.md"
PAGE = README.parent / "docs" / "benchmarks.md"
IN_README = ("demo", "grpo_vs_trl")
sys.path.append(str(README.parent / "docs"))
NOTHING = "Nothing is claimed yet: no benchmark has written its results on this machine. `make bench` does."


def block(results: dict[str, Any]) -> str:
    """What stands between the markers. `results`: name of a results file -> its content; absent ones are left out."""
    parts = [table(results[name]) for name, table in TABLES.items() if name in results]
    return "\n\n".join(parts) or NOTHING


def step_table(result: dict[str, Any]) -> str:
    """One line per case: TRL beside posttrain, and how many times faster or smaller."""
    lines = []
    for ours, trl in _beside(result, "prompt", "completion"):
        cells = [_against(ours[key], trl[key], unit) for key, unit in (("step_s", 1.0), ("generation_s", 1.0), ("peak_bytes", 2.0**20))]
        lines.append(f"| {_lengths(ours['case'])} | {' | '.join(cells)} | {ours['date']} |")
    run = result["runs"][0]
    return "\n".join(
        [
            f"One GRPO step of a 40M-parameter Qwen3 on CPU, {run['case']['generations']} completions of one prompt, {_trl(result)} against posttrain:",
            "",
            "| prompt / completion tokens | seconds per step | of that, generation | peak MiB above imports | measured |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"Median of {_steps(result)} steps; {_precisions(result)}. {_machine(result)}. Script: `make bench` (benchmarks/grpo_vs_trl.py).",
            *_in_float32(result, _lengths, "prompt", "completion"),
        ]
    )


def preference_table(result: dict[str, Any]) -> str:
    """One line per kind of weights: TRL beside posttrain."""
    lines = []
    for ours, trl in _beside(result, "lora"):
        cells = [_against(ours[key], trl[key], unit) for key, unit in (("step_s", 1.0), ("peak_bytes", 2.0**20))]
        lines.append(f"| {_weights(ours['case'])} | {' | '.join(cells)} |")
    case = result["runs"][0]["case"]
    return "\n".join(
        [
            f"One DPO step of the same model, {case['pairs']} pairs, prompts of {case['prompt']} tokens, completions of {case['shortest']} to "
            f"{case['longest']}, {_trl(result)} against posttrain:",
            "",
            "| weights trained | seconds per step | peak MiB above imports |",
            "|---|---|---|",
            *lines,
            "",
            f"Median of {_steps(result)} steps; {_precisions(result)}. {_machine(result)}. Script: `make bench` (benchmarks/dpo_vs_trl.py).",
            *_in_float32(result, _weights, "lora"),
        ]
    )


def text_table(result: dict[str, Any]) -> str:
    """One line per setting of either side."""
    lines = [
        f"| {run['side']} | {run['case']['variant']} | {run['tokens_per_second']:,.0f} | {against:.2f} | {run['peak_bytes'] / 2**20:.0f} |"
        for run, against in _against_best(result["runs"])
    ]
    exact = [
        f"{run['case']['variant']} {against:.2f}"
        for run, against in _against_best(result.get(FLOAT32, {}).get("runs", []))
        if run["side"] == "posttrain"
    ]
    run = result["runs"][0]
    return "\n".join(
        [
            f"SFT of the same model on ragged text ({result['text']}), {run['case']['rows']} rows a step, {_trl(result)} with each of its settings:",
            "",
            "| library | setting | tokens per second | against TRL's best | peak MiB above imports |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"{_steps(result)} steps; {_precisions(result)}. {_machine(result)}. Script: `make bench` (benchmarks/sft_vs_trl.py).",
            *(["", f"With float32 asked of both, against TRL's best: {', '.join(exact)}."] if exact else []),
        ]
    )


def _against_best(runs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Each run with its speed as a multiple of TRL's best."""
    best = max((run["tokens_per_second"] for run in runs if run["side"] == "trl"), default=1.0)
    return [(run, run["tokens_per_second"] / best) for run in runs]


def online_table(result: dict[str, Any]) -> str:
    """One line per algorithm and seed."""
    lines = [
        f"| {run['algorithm'].upper()} | {run['seed']} | {run['before']:.1%} | {run['right'] / run['questions']:.1%} | {run['processor_seconds']:.0f} | {run['peak_mb_above_start']:.0f} |"
        for run in result["runs"]
    ]
    return "\n".join(
        [
            f"The demo's task by three algorithms, from one taught model each seed, {result['steps']} steps of the same number of completions:",
            "",
            "| algorithm | seed | greedy before | after | seconds of the processor | peak MB above the taught model |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
            f"{_machine(result)}. Script: benchmarks/online_compare.py.",
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


FLOAT32 = "float32"
TABLES = {"demo": demo_table, "grpo_vs_trl": step_table, "dpo_vs_trl": preference_table, "sft_vs_trl": text_table, "online_compare": online_table}


def _beside(result: dict[str, Any], *case_keys: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(ours, TRL's) for every case that both sides ran, in order."""
    by_case: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for run in result["runs"]:
        by_case.setdefault(tuple(run["case"][key] for key in case_keys), {})[run["side"]] = run
    return [(sides["posttrain"], sides["trl"]) for sides in by_case.values() if len(sides) == 2]


def _steps(result: dict[str, Any]) -> int:
    return min(len(run["steps_s"]) for run in result["runs"])


def _in_float32(result: dict[str, Any], title: Callable[[dict[str, Any]], str], *case_keys: str) -> list[str]:
    """What is left where TRL is spared the emulation of bf16, if that was measured."""
    if FLOAT32 not in result:
        return []
    pairs = _beside(result[FLOAT32], *case_keys)
    said = [
        f"{title(ours['case'])} {trl['step_s'] / ours['step_s']:.1f}x faster, peak {trl['peak_bytes'] / ours['peak_bytes']:.1f}x smaller"
        for ours, trl in pairs
    ]
    return ["", f"With float32 asked of both ({_steps(result[FLOAT32])} steps): {'; '.join(said)}."]


def _lengths(case: dict[str, Any]) -> str:
    return f"{case['prompt']} / {case['completion']}"


def _weights(case: dict[str, Any]) -> str:
    return "LoRA" if case["lora"] else "all"


def _trl(result: dict[str, Any]) -> str:
    return f"TRL {next(run['versions']['trl'] for run in result['runs'] if run['side'] == 'trl')}"


def _precisions(result: dict[str, Any]) -> str:
    asked = "bf16" if result["runs"][0]["case"]["precision"] == "bf16" else "float32"
    return f"{asked} asked of both, posttrain computed in {next(run['computed_in'] for run in result['runs'] if run['side'] == 'posttrain')}"


def _against(ours: float, trl: float, unit: float) -> str:
    digits = 0 if unit > 1 else 2
    return f"{trl / unit:.{digits}f} → {ours / unit:.{digits}f} ({trl / ours:.1f}x)"


def _exam(scores: dict[str, Any]) -> str:
    low, high = scores["interval"]
    return f"{100 * scores['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _machine(result: dict[str, Any]) -> str:
    return hardware.line(result["hardware"])


def filled(text: str, results: dict[str, Any], names: Iterable[str] = IN_README) -> str:
    """A page's text with the tables of `names`."""
    import marked

    return marked.filled("the page", text, "measured", block({name: results[name] for name in names if name in results}))


def read_results(directory: Path = hardware.RESULTS) -> dict[str, Any]:
    """{name: result}; what the same script measured in float32 stands within, under `FLOAT32`."""
    found = {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json")}
    return {name: found[name] | ({FLOAT32: exact} if (exact := found.get(f"{name}_{FLOAT32}")) else {}) for name in TABLES if name in found}


if __name__ == "__main__":
    for page, names in ((README, IN_README), (PAGE, tuple(TABLES))):
        page.write_text(filled(page.read_text(encoding="utf-8"), read_results(), names), encoding="utf-8")
