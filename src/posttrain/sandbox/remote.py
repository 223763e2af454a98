"""Programs on another machine, or in a container: any command that reads and writes one line of JSON, such as `ssh box
python -m posttrain.sandbox`.

The other side is trusted with the verdict. Its reply is read as data.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence

from posttrain.sandbox.job import Job, Verdict

OVERHEAD_S = 30.0  # for the connection and the start of the interpreter


class CommandRunner:
    """Starts `command` for each job, writes the job to it as one line, and reads the verdict as one line."""

    def __init__(self, command: Sequence[str], *, overhead_s: float = OVERHEAD_S) -> None:
        self.command, self.overhead_s = list(command), overhead_s

    def judge(self, job: Job) -> Verdict:
        """A failure of the connection is the verdict's `error`, not the program's fault."""
        patience = 2 * len(job.tests) * job.limits.wall_s + self.overhead_s  # every test may use its limit, and be tried twice
        try:
            done = subprocess.run(self.command, input=json.dumps(job.to_json()).encode() + b"\n", capture_output=True, timeout=patience, check=False)
            return _checked(Verdict.from_json(json.loads(done.stdout)), job)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Verdict(error=f"the runner {self.command[0]} failed: {error}")
        except (ValueError, KeyError, TypeError):
            said = done.stderr.decode("utf-8", "replace").strip()[-300:]
            return Verdict(error=f"the runner {self.command[0]} gave no verdict (exit code {done.returncode}): {said}")


def _checked(verdict: Verdict, job: Job) -> Verdict:
    """Raises ValueError for a verdict without a result for every test."""
    if verdict.error is None and len(verdict.results) != len(job.tests):
        raise ValueError(f"{len(verdict.results)} results for {len(job.tests)} tests")
    return verdict
