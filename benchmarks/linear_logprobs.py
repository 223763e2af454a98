"""`ops.linear_logprobs` against log_softmax over the whole (tokens, vocabulary) matrix: forward and backward, time and memory.

Tiled twice: logits are made again in backward, as where the entropy is differentiated too. Tiled: log-probs alone are; a frozen head is then
passed once, and a trained one too if the gradient of the log-probs was foreseen, in float32. Each line is measured in a process of its own,
so that its peak memory is its own; the memory counts what forward and backward added to the inputs (gradients included, which both sides
need). Prints a table and writes results/linear_logprobs.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import hardware
import torch

CASES = {  # name -> (autocast to bf16, head is trained)
    "float32, trained head": (False, True),
    "float32, frozen head": (False, False),
    "bf16 autocast, trained head": (True, True),
    "bf16 autocast, frozen head": (True, False),
}


def whole_matrix(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight)  # (N, V)
    return logits.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def tiled_twice(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    from posttrain.ops import linear_logprobs

    return linear_logprobs(hidden, weight, targets).logps


def tiled(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    from posttrain.ops import linear_logprobs

    return linear_logprobs(hidden, weight, targets, entropy_grad=False, known_grad=gradient).logps


SIDES = {"whole matrix": whole_matrix, "tiled twice": tiled_twice, "tiled": tiled}


def measure(side: str, case: str, sizes: tuple[int, int, int], threads: int, repeats: int) -> dict[str, float]:
    """Best of `repeats`, after a small warm-up."""
    n, d, v = sizes
    autocast, trained = CASES[case]
    logprobs = SIDES[side]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(n, d, requires_grad=True)
    weight = (torch.randn(v, d) * 0.05).requires_grad_(trained)
    targets = torch.randint(v, (n,))
    gradient = torch.randn(n) / n

    def step(rows: int) -> tuple[float, float]:
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logps = logprobs(hidden[:rows], weight, targets[:rows], gradient[:rows])
        middle = time.perf_counter()
        logps.backward(gradient[:rows])
        return middle - start, time.perf_counter() - start

    step(8)
    hidden.grad = weight.grad = None
    base = hardware.resident_bytes()
    timings = [step(n) for _ in range(repeats)]
    forward, total = min(timings, key=lambda timing: timing[1])
    return {"forward_s": forward, "total_s": total, "peak_bytes": hardware.peak_resident_bytes() - base}


def table(lines: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table("case", "side", "forward s", "forward + backward s", "memory MiB", "time ratio", "memory ratio")
    for row in lines:
        whole = next(x for x in lines if x["case"] == row["case"] and x["side"] == "whole matrix")
        ratios = [f"{row[key] / whole[key]:.2f}" for key in ("total_s", "peak_bytes")]
        out.add_row(row["case"], row["side"], f"{row['forward_s']:.2f}", f"{row['total_s']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}", *ratios)
    Console(width=150).print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=3, default=(4096, 512, 32000), metavar=("N", "D", "V"), help="tokens, hidden size, vocabulary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small case, to see that it runs; writes nothing")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = (512, 128, 8000) if args.quick else tuple(args.sizes)
    if args.one:
        print(json.dumps(measure(*args.one, sizes, args.threads, args.repeats)))
        return
    lines = []
    for case in CASES:
        for side in SIDES:
            command = [sys.executable, __file__, "--one", side, case, "--threads", args.threads, "--repeats", args.repeats, "--sizes", *sizes]
            done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
            lines.append({"case": case, "side": side, **json.loads(done.stdout)})
    torch.set_num_threads(args.threads)
    machine = hardware.describe()
    print(f"{sizes[0]} tokens, hidden {sizes[1]}, vocabulary {sizes[2]}; {hardware.line(machine)}")
    table(lines)
    if not args.quick:
        print("written to", hardware.save("linear_logprobs", {"hardware": machine, "sizes": sizes, "repeats": args.repeats, "lines": lines}))


if __name__ == "__main__":
    main()
