"""Tensors on a CPU lie in huge pages where the system grants them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GRANTED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import posttrain, torch
weights = torch.ones(2**26)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


def huge_kib(**environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=inherited | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not GRANTED.is_file() or "[madvise]" not in GRANTED.read_text(), reason="this system does not give huge pages to those who ask")
def test_weights_lie_in_huge_pages_unless_the_user_says_otherwise():
    assert huge_kib() > 2**17  # half of the 256 MiB, at least
    assert huge_kib(THP_MEM_ALLOC_ENABLE="0") < 2**12
