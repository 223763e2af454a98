"""1,000 small programs at once: how many a second, and that none is lost. `python benchmarks/sandbox.py [--programs 1000] [--workers 2]`.

Every program gets its own number and must print its square; one in ten is wrong on purpose. Each kind of test is measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import hardware

from posttrain.sandbox import Asserts, Call, InputOutput, Job, Pool, Sandbox
from posttrain.sandbox.pool import usable_cores

KINDS = {
    "input_output": (lambda n: f"print(int(input()) ** 2 + {int(n % 10 == 0)})", lambda n: InputOutput(f"{n}\n", f"{n * n}\n")),
    "call": (lambda n: f"def square(n):\n    return n ** 2 + {int(n % 10 == 0)}", lambda n: Call("square", [n], n * n)),
    "asserts": (lambda n: f"def square(n):\n    return n ** 2 + {int(n % 10 == 0)}", lambda n: Asserts(f"assert square({n}) == {n * n}")),
}


def measure(sandbox: Sandbox, kind: str, programs: int, workers: int) -> dict[str, float | int]:
    program, test = KINDS[kind]
    jobs = [Job(program(n), [test(n)]) for n in range(programs)]
    start = time.perf_counter()
    with Pool(sandbox, workers) as pool:
        verdicts = pool.judge_all(jobs)
    seconds = time.perf_counter() - start
    right = [verdict.passed for verdict in verdicts]
    return {
        "programs": programs,
        "seconds": round(seconds, 1),
        "programs_per_second": round(programs / seconds, 1),
        "median_ms_of_one": round(1000 * sorted(verdict.seconds for verdict in verdicts)[programs // 2], 1),
        "errors": sum(verdict.error is not None for verdict in verdicts),
        "misjudged": sum(passed != (n % 10 != 0) for n, passed in enumerate(right)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=usable_cores())
    options = parser.parse_args()
    sandbox = Sandbox("namespaces")
    results = {
        "hardware": hardware.describe(),
        "load_before": os.getloadavg()[0],
        "workers": options.workers,
        "backend": sandbox.isolation.backend.name,
        "kinds": {},
    }
    for kind in KINDS:
        results["kinds"][kind] = measure(sandbox, kind, options.programs, options.workers)
        print(kind, results["kinds"][kind], flush=True)
    print(hardware.save("sandbox", results))


if __name__ == "__main__":
    main()
