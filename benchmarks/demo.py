"""The demo with several seeds: held-out greedy accuracy before and after GRPO, and the time. Prints a table and writes results/demo.json.

Each run is a process of its own. Afterwards `posttrain eval` examines each saved model again, in another process; the accuracies must be equal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hardware

COMMAND = [sys.executable, "-m", "posttrain.cli.main"]


def measure(seed: int, output: Path, quick: bool) -> dict[str, Any]:
    """Runs the demo into `output`; its summary, with what the second examination said."""
    subprocess.run([*COMMAND, "demo", "--seed", str(seed), "--output", str(output), *(["--quick"] if quick else [])], check=True)
    summary = json.loads((output / "summary.json").read_text())
    again = json.loads(subprocess.run([*COMMAND, "eval", str(output), "--json"], check=True, capture_output=True, text=True).stdout)
    if again["accuracy"] != summary["after"]["accuracy"]:
        raise SystemExit(f"seed {seed}: the saved model has accuracy {again['accuracy']} when examined again, not {summary['after']['accuracy']}")
    return summary | {"examined_again": again["accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs"), help="seed N is written to OUTPUT/demo-seed-N")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs; writes no results")
    args = parser.parse_args()
    runs = [measure(seed, args.output / f"demo-seed-{seed}", args.quick) for seed in args.seeds]
    machine = hardware.describe("transformers")
    print(hardware.line(machine))
    for run in runs:
        before, after = run["before"]["accuracy"], run["after"]["accuracy"]
        print(f"seed {run['seed']}: {before:.1%} before, {after:.1%} after, {run['seconds']:.0f} s")
    if not args.quick:
        print("written to", hardware.save("demo", {"hardware": machine, "runs": runs}))


if __name__ == "__main__":
    main()
