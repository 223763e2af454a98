"""Runs a script as an ordinary user. Tests that root runs become nobody for it, in a Python that nobody may read."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import posttrain

SOURCE = str(Path(posttrain.__file__).parents[1])
NOBODY = 65534


def start_as_ordinary_user(script: str, *arguments: str, **settings: object) -> subprocess.Popen:
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    return subprocess.Popen(
        [interpreter(), "-c", script, *arguments],
        env=environment,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **user,
        **settings,
    )


def run_as_ordinary_user(script: str, *arguments: str) -> str:
    """Its standard output; fails with what it said on standard error."""
    process = start_as_ordinary_user(script, *arguments)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return output


@functools.cache
def interpreter() -> str | None:
    """A Python that an ordinary user may run this package in; None where there is none."""
    if os.geteuid() != 0:
        return sys.executable
    for path in (os.path.realpath(sys.executable), *(shutil.which(name, path="/usr/local/bin:/usr/bin:/bin") for name in ("python3", "python3.12"))):
        if path is None:
            continue
        try:
            done = subprocess.run(
                [path, "-c", "import posttrain.sandbox, sys; sys.exit(sys.version_info < (3, 10))"],
                env={"PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}, cwd="/", user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False,
            )  # fmt: skip
        except OSError:
            continue
        if done.returncode == 0:
            return path
    return None
