"""The measured tables in the pages of this folder, made from benchmarks/results: no figure is typed by hand.

`python docs/measured.py` rewrites what stands between the markers; tests/test_docs.py fails while a page is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import marked

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks" / "results"


def probe_table(result: dict[str, Any]) -> str:
    """One line a task and seed, and what the command said where nothing is right."""
    rows = [
        f"| {run['task']} | {run['seed']} | {run['group']} | {_percent(run['pass_at_1']['value'])} | {_interval(run['predicted'])} | "
        f"{_interval(run['of_400_groups'])} | {_percent(run['first_steps'])} | {_percent(run['interval_of_so_many'][0], '')} to "
        f"{_percent(run['interval_of_so_many'][1])} | {'yes' if run['within'] else '**no**'} |"
        for run in result["runs"]
    ]
    held = sum(run["within"] for run in result["runs"])
    never = result["never_taught"]
    return "\n".join(
        [
            "| task | seed | G | pass@1 | predicted signal | of 400 groups | first 4 steps | forecast for them | within |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"Within the forecast: {held} of {len(result['runs'])}. On sums with a model that was never taught anything, the command says "
            f'"{never["verdict"]}" and exits with {never["exit_code"]}. {_machine(result)}.',
        ]
    )


def interval_table(result: dict[str, Any]) -> str:
    """One line a design and number of questions."""
    rows = [
        f"| {run['design']} | {run['questions']} | {run['coverage']:.2%} | {run['at_the_edges']:.2%} | {run['mean_width']:.3f} |"
        for run in result["results"]
    ]
    return "\n".join(["| figure | questions | coverage | where p < 0.15 or p > 0.85 | mean width |", "|---|---|---|---|---|", *rows])


def preference_table(result: dict[str, Any]) -> str:
    """One line a judge of held-out pairs, and the number of questions it was asked about."""
    rows = [
        f"| {method} | {judge} | {100 * found['value']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}] | {found['questions']} |"
        for method, judges in result["results"].items()
        for judge, found in judges.items()
        if judge != "seconds"
    ]
    settings = result["settings"]
    dealt = settings["folds"] if settings["only_folds"] is None else f"{len(settings['only_folds'])} of {settings['folds']}"
    epochs = f"{settings['epochs']:g} {'epoch' if settings['epochs'] == 1 else 'epochs'}"
    return "\n".join(
        [
            "| method | what prefers | right, 95 % interval | questions |",
            "|---|---|---|---|",
            *rows,
            "",
            f"{epochs}, folds: {dealt}. {_machine(result)}. Script: benchmarks/preferences_gsm8k.py.",
        ]
    )


def plan_table(result: dict[str, Any]) -> str:
    """What was planned and what was measured, in GiB: a line a model and method, and a line for each of the others."""
    simulated: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for name, line in result["simulated"].items():
        model, method, context = name.split()
        simulated.setdefault((model, method), {})[int(context)] = line
    contexts = sorted({context for lines in simulated.values() for context in lines})
    rows = [
        f"| {model} | {method} | " + " | ".join(_planned(lines[context]) if context in lines else "" for context in contexts) + " |"
        for (model, method), lines in simulated.items()
    ]
    others = [
        f"| {title} | {name} | {_planned(line)} | {_error(line.get('error_above'))} |"
        for part, title in _PLAN_PARTS.items()
        for name, line in result.get(part, {}).items()
    ]
    worst = max(abs(line["error"]) for line in result["simulated"].values())
    above = max(abs(line["error_above"]) for line in result["simulated"].values())
    return "\n".join(
        [
            "Planned / measured, in GiB, four layers of each model. Full: float32 weights under autocast, 8-bit AdamW; LoRA: rank 32, weights in bf16, float32 adapters;",
            "QLoRA: bf16 adapters, tiles, offloading, 8-bit AdamW. All with gradient checkpointing.",
            "",
            "| model | method | " + " | ".join(f"{context:,} tokens" for context in contexts) + " |",
            "|---|---|" + "---|" * len(contexts),
            *rows,
            "",
            f"The largest difference is {worst:.1%} of the whole, and {above:.1%} of what is above weights, adapters, gradients and optimizer.",
            "",
            "| measured by | case | planned / measured | above |",
            "|---|---|---|---|",
            *others,
            "",
            "(1) Started with MALLOC_MMAP_THRESHOLD_=131072, planned without holes.",
            f"{_machine(result)}.",
        ]
    )


_PLAN_PARTS = {
    "whole": "fake tensors, all 32 layers",
    "chunked": "fake tensors, attention in chunks",
    "switches": "fake tensors",
    "quantised": "bitsandbytes' layers, above only",
    "real": "a process that gives freed memory back (1)",
    "by_default": "a process with glibc's defaults, holes planned",
}


def _planned(line: dict[str, Any]) -> str:
    return f"{line['planned'] / 2**30:.2f} / {line['measured'] / 2**30:.2f} ({_error(line['error'])})"


def _error(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f} %"


def published_table(result: dict[str, Any]) -> str:
    """Unsloth's table, term by term."""
    from posttrain.cli.plan import seeds_lines
    from posttrain.memory.published import PublishedTerm

    return "\n".join(seeds_lines([PublishedTerm(**row) for row in result["rows"]]))


def _percent(share: float, unit: str = " %") -> str:
    return f"{100 * share:.0f}{unit}"


def _interval(found: dict[str, float]) -> str:
    return f"{_percent(found['value'])} [{_percent(found['low'], '')}, {_percent(found['high'], '')}]"


def _machine(result: dict[str, Any]) -> str:
    machine = result["hardware"]
    return f"{machine['processor']}, {machine['threads']} threads, torch {machine['versions']['torch']}, {machine['date']}"


TABLES: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "plan.md": {"plan": plan_table, "plan_published": published_table},
    "dpo.md": {"preferences_gsm8k": preference_table},
    "eval.md": {"intervals": interval_table},
    "probe.md": {"probe": probe_table},
}


def filled(page: str, text: str) -> str:
    """The page's text with every table brought up to date. A table is called as its file of results."""
    for name, table in TABLES[page].items():
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        text = marked.filled(page, text, name, table(result))
    return text


if __name__ == "__main__":
    for page in TABLES:
        path = FOLDER / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")
