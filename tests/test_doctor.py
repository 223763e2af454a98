"""The doctor finds what is wrong, and this environment sound."""

import json
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from posttrain import doctor
from posttrain.cli.main import app

ROOT = Path(__file__).parents[1]


def test_this_environment_is_sound_and_every_path_was_tried():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert (result.exit_code, found["sound"]) == (0, True), result.output
    states = {(one["topic"], one["name"]): one["state"] for one in found["findings"]}
    for name in (("versions", "torch"), ("versions", "transformers"), ("device", "cpu"), ("kernels", "attention"), ("kernels", "sampling")):
        assert states[name] == "ok"
    assert ("sandbox", "level") in states
    assert {name for topic, name in states if topic == "extras"} >= {"math", "judge", "envs"}


@pytest.mark.parametrize(
    ("here", "state", "said"),
    [
        (None, "broken", "is not installed"),
        ("2.10", "broken", "outside of >=2.11"),
        ("2.12.1+cpu", "ok", "tested up to"),
        ("2.99", "note", "newer than"),
    ],
)
def test_a_version_is_judged_by_its_range(here, state, said):
    found = doctor.version_of(Requirement("torch>=2.11"), here)
    assert (found.state, said in found.says) == (state, True)
    assert (found.fix is not None) == (state == "broken")


def test_a_version_with_a_known_fault_is_broken_and_named(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: {"torch": "2.5.1", "ray": "2.40"}.get(name) or real(name))
    faults = [finding for finding in doctor.versions() if "CVE" in finding.says]
    assert {finding.name for finding in faults} == {"torch", "ray"}
    assert not doctor.is_sound(faults)
    assert "pip install 'torch>=2.6'" in [finding.fix for finding in faults]


def test_what_is_missing_comes_with_the_command_that_brings_it(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in ("math-verify", "accelerate") else real(name))
    extra = next(finding for finding in doctor.extras() if finding.name == "math")
    assert (extra.state, extra.fix) == ("note", "pip install 'math-verify>=0.9'")
    core = next(finding for finding in doctor.versions() if finding.name == "accelerate")
    assert (core.state, core.fix) == ("broken", "pip install 'accelerate>=1.1'")
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, "not ready" in result.output) == (1, True)


def test_a_path_that_does_not_work_is_broken_with_its_reason():
    def breaks(where):
        raise RuntimeError("no kernel\nfor this")

    found = doctor._tried("attention", breaks, "cpu", "fine")
    assert (found.state, found.says) == ("broken", "RuntimeError: no kernel for this")


def test_the_tested_versions_are_those_of_the_constraints_and_of_this_environment():
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {name: version for name, version in pins if name in doctor.TESTED}
    for name, newest in doctor.TESTED.items():
        here = pinned.get(name) or doctor.installed(name)
        assert Version(here).release[:2] <= Version(newest).release
    lowest = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    for name in lowest.keys() & doctor.KNOWN_BAD.keys():  # the range must not allow what is known to be bad
        assert Version(lowest[name]) >= Version(doctor.KNOWN_BAD[name][0])
    assert {"torch", "transformers", "nicegui"} <= lowest.keys()


@pytest.mark.parametrize(
    ("environ", "state", "said"),
    [({}, "note", "spin"), ({"OMP_WAIT_POLICY": "passive"}, "ok", "OMP_WAIT_POLICY=passive"), ({"KMP_BLOCKTIME": "0"}, "ok", "KMP_BLOCKTIME=0")],
)
def test_how_threads_wait_is_said(environ, state, said):
    found = doctor.waiting(environ)
    assert (found.state, said in found.says) == (state, True)
