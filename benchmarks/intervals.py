"""How often do the intervals of `posttrain eval` hold the truth? 10,000 simulated examinations for each design, p drawn from 0.05 to 0.95.

Greedy accuracy (Wilson), drawn answers (pass@1 and pass@k from several answers a question, questions of different difficulty), the difference of two
models on the same questions, and, for comparison, the exact interval. Mean coverage should lie between 94 and 96.5 %, except for the exact one, which must
not lie below 95 %. Prints a table and writes results/intervals.json.

usage: intervals.py [--repetitions 10000] [--only DESIGN]
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import hardware
import numpy as np

from posttrain.evaluation import bootstrap, clopper_pearson, paired_difference, pass_at_k, rate, wilson

LOW, HIGH = 0.05, 0.95
Simulation = Callable[[np.random.Generator, float, int], tuple[float, float, float]]  # (truth, low, high) of one examination

cached_wilson = functools.lru_cache(maxsize=None)(wilson)
cached_exact = functools.lru_cache(maxsize=None)(clopper_pearson)
cached_pass = functools.lru_cache(maxsize=None)(pass_at_k)


def greedy(interval: Callable[[int, int], Any]) -> Simulation:
    """One answer a question: k of n are right."""

    def simulate(rng: np.random.Generator, p: float, n: int) -> tuple[float, float, float]:
        found = interval(int(rng.binomial(n, p)), n)
        return p, found.low, found.high

    return simulate


def difficulties(rng: np.random.Generator, p: float, n: int, alike: float) -> np.ndarray:
    """(n,) chances of a right answer, p on average: Beta distributed, the more alike the larger `alike` is."""
    return rng.beta(alike * p, alike * (1 - p), n)


def drawn(k: int, answers: int, alike: float) -> Simulation:
    """`answers` answers a question: pass@k."""
    truths: dict[float, float] = {}

    def simulate(rng: np.random.Generator, p: float, n: int) -> tuple[float, float, float]:
        right = rng.binomial(answers, difficulties(rng, p, n, alike))
        found = rate([cached_pass(answers, int(count), k) for count in right], answers // k)
        if p not in truths:  # of 1 - (1 - q)^k, q Beta distributed: the product of what k misses in a row have for chances
            a, b = alike * p, alike * (1 - p)
            truths[p] = 1 - float(np.prod([(b + i) / (a + b + i) for i in range(k)]))
        return truths[p], found.low, found.high

    return simulate


def difference(answers: int) -> Simulation:
    """Two models, as good on average as p and p + 0.05 (p - 0.05 in the upper half), on the same questions; one of 1 answer is greedy."""

    def simulate(rng: np.random.Generator, p: float, n: int) -> tuple[float, float, float]:
        shift = 0.05 if p < 0.5 else -0.05
        before = difficulties(rng, p, n, 1.0)
        after = np.where(rng.random(n) < 0.5, before, difficulties(rng, p + 2 * shift, n, 1.0))  # half of the questions are as they were
        old, new = rng.binomial(answers, before), rng.binomial(answers, after)
        if answers == 1:
            found = paired_difference((old == 1).tolist(), (new == 1).tolist())
        else:
            found = bootstrap(((new - old) / answers).tolist(), bounds=(-1.0, 1.0), rounds=1000)
        return shift, found.low, found.high

    return simulate


DESIGNS: dict[str, tuple[Simulation, list[int]]] = {
    "greedy accuracy, Wilson": (greedy(cached_wilson), [50, 200, 500]),
    "greedy accuracy, exact (the probe's)": (greedy(cached_exact), [32, 200]),
    "pass@1 of 4 answers": (drawn(1, 4, 1.0), [50, 200, 500]),
    "pass@1 of 8 answers, easy and hard questions": (drawn(1, 8, 0.3), [50, 200]),
    "pass@1 of 8 answers, questions alike": (drawn(1, 8, 8.0), [50, 200]),
    "pass@4 of 8 answers": (drawn(4, 8, 1.0), [50, 200]),
    "greedy difference of two models": (difference(1), [200]),
    "difference of two models, 4 answers": (difference(4), [200]),
}


def coverage(simulate: Simulation, n: int, repetitions: int, seed: int = 0) -> dict[str, float]:
    """Share of intervals that hold the truth: over all p, and over the p within 0.15 of 0 and 1. p runs evenly from LOW to HIGH."""
    rng = np.random.default_rng(seed)
    ps = np.linspace(LOW, HIGH, repetitions)
    truth, low, high = np.array([simulate(rng, float(p), n) for p in ps]).T
    held = (low <= truth) & (truth <= high)
    edge = (ps < 0.15) | (ps > 0.85)
    return {"questions": n, "coverage": float(held.mean()), "at_the_edges": float(held[edge].mean()), "mean_width": float((high - low).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10_000)
    parser.add_argument("--only", choices=DESIGNS, help="measure one design; the others stay in the results as they are")
    arguments = parser.parse_args()
    path = hardware.RESULTS / "intervals.json"
    known = json.loads(path.read_text())["results"] if path.is_file() else []
    for name in [arguments.only] if arguments.only else DESIGNS:
        simulate, sizes = DESIGNS[name]
        found = [{"design": name, **coverage(simulate, n, arguments.repetitions)} for n in sizes]
        for one in found:
            print(
                f"{name:45}  {one['questions']:4} questions  {one['coverage']:.2%}  edges {one['at_the_edges']:.2%}  width {one['mean_width']:.3f}",
                flush=True,
            )
        known = [one for one in known if one["design"] != name] + found
        known.sort(key=lambda one: list(DESIGNS).index(one["design"]))
        hardware.save("intervals", {"hardware": hardware.describe(), "repetitions": arguments.repetitions, "results": known})
    print("written to", path)


if __name__ == "__main__":
    main()
