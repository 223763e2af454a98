"""`python -m posttrain.sandbox [LEVEL]`: judges the jobs on standard input, one a line, and writes their verdicts, one
a line. For remote.py.

`python -m posttrain.sandbox --level` says which isolation this system gives, and why not more.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading

from posttrain.errors import UserError
from posttrain.sandbox.job import Job
from posttrain.sandbox.judge import Sandbox
from posttrain.sandbox.levels import strongest


def main(arguments: list[str]) -> int:
    if arguments == ["--level"]:
        print(json.dumps(strongest().to_json(), indent=2))
        return 0
    try:
        sandbox = Sandbox(*arguments[:1])
        if os.name == "posix":
            threading.Thread(target=_end_with_the_reader, daemon=True).start()
        for line in sys.stdin:
            print(json.dumps(sandbox.judge(Job.from_json(json.loads(line))).to_json()), flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _end_with_the_reader() -> None:
    """When the reader of the verdicts has ended, this process and the program that it judges end at once."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)  # an error and a hang-up are reported always
    poller.poll()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
