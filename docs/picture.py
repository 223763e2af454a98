"""Draws docs/demo.svg from the record of a run: `posttrain demo`, then `python docs/picture.py [RUN_DIRECTORY]`.

Every number in the picture is read from run.sqlite and summary.json; rich turns the terminal view into SVG.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from posttrain.tracking.reader import GroupRow, RunReader

TARGET = Path(__file__).parent / "demo.svg"
WIDTH, POINTS = 104, 60
BARS = "▁▂▃▄▅▆▇█"
CURVES = {  # scalar -> (what to call it, how to write a value)
    "reward": ("reward", "{:+.2f}"),
    "rewards/number_detected/mean": ("  a number ±1", "{:+.2f}"),
    "rewards/right_number/mean": ("  the right one ±3", "{:+.2f}"),
    "frac_reward_zero_std": ("groups without signal", "{:.0%}"),
    "entropy": ("entropy", "{:.2f}"),
    "completions/mean_length": ("length", "{:.1f}"),
}


def curves(reader: RunReader) -> Table:
    table = Table.grid(padding=(0, 2))
    known = reader.scalar_names()
    for name, (title, form) in CURVES.items():
        if name in known:
            values = [point.mean for point in reader.series(name, POINTS) if point.mean is not None]
            table.add_row(title, Text(bars(values), style="cyan"), f"{form.format(values[0])} → {form.format(values[-1])}")
    return table


def bars(values: list[float]) -> str:
    low, high = min(values), max(values)
    return "".join(BARS[round((value - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for value in values)


def group_view(reader: RunReader) -> Group:
    """A group of the first third of the run whose completions differ as evenly as possible, sorted by advantage."""
    steps = reader.steps()
    candidates = [group for step in steps[: max(1, len(steps) // 3)] for group in reader.groups(step)]
    chosen = max(candidates, key=spread)
    table = Table.grid(padding=(0, 2))
    for completion in sorted(reader.completions(chosen.step, chosen.group), key=lambda completion: -completion.advantage):
        style = "green" if completion.advantage > 0 else "red" if completion.advantage < 0 else "dim"
        parts = "  ".join(f"{name} {'–' if score is None else f'{score:+.0f}'}" for name, score in completion.scores.items())
        table.add_row(Text(completion.text, style=style), Text(f"advantage {completion.advantage:+.2f}", style=style), Text(parts, style="dim"))
    return Group(Text.assemble(f"step {chosen.step}: the {chosen.size} attempts at  ", (chosen.prompt, "bold")), table)


def spread(group: GroupRow) -> float:
    return group.std or 0.0


def exam_line(run: Path) -> Text:
    summary = json.loads((run / "summary.json").read_text())
    before, after = (summary[when] for when in ("before", "after"))
    parts = [f"{100 * scores['accuracy']:.1f} % [{100 * scores['interval'][0]:.1f}, {100 * scores['interval'][1]:.1f}]" for scores in (before, after)]
    return Text(
        f"{after['questions']} unseen sums, greedy: {parts[0]} before, {parts[1]} after GRPO, {summary['seconds']:.0f} s in all", style="bold"
    )


def draw(run: Path, target: Path) -> None:
    reader = RunReader(run)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for part in (curves(reader), "", group_view(reader), "", exam_line(run)):
        console.print(part, highlight=False)
    console.save_svg(str(target), title=f"posttrain demo: {len(reader.steps())} steps of GRPO")
    reader.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"), TARGET)
