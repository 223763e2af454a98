"""OpenMP hears how to wait before torch is loaded, and what the user has set is left alone."""

import json
import os
import subprocess
import sys

import pytest

from posttrain.cli import threads

ASKED = """
import json, os
from posttrain.cli import threads
threads.prepare()
import torch
print(json.dumps([os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"], torch.get_num_threads()]))
"""


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)


def test_threads_of_a_fresh_process_sleep_while_they_wait_and_are_as_many_as_was_asked_for():
    inherited = {name: value for name, value in os.environ.items() if name not in (*threads.WAITING, *threads.COUNTS)}
    done = subprocess.run([sys.executable, "-c", ASKED], env={**inherited, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["passive", str(threads.SPINS), 1]


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}, {"KMP_BLOCKTIME": "200"}])
def test_what_the_user_says_about_waiting_is_left_alone(without_torch, given):
    environ = dict(given)
    threads.prepare(environ)
    assert environ == given


def test_nothing_is_set_once_torch_is_loaded():
    import torch  # noqa: F401

    environ: dict[str, str] = {}
    threads.prepare(environ)
    assert environ == {}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_is_read(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cpu_quota(tmp_path) == cores


@pytest.mark.parametrize(("given", "count"), [({}, "2"), ({"OMP_NUM_THREADS": "8"}, "8"), ({"MKL_NUM_THREADS": "8"}, None)])
def test_a_container_gets_as_many_threads_as_it_may_use_cores_unless_told_otherwise(without_torch, monkeypatch, given, count):
    monkeypatch.setattr(threads, "cpu_quota", lambda: 2)
    monkeypatch.setattr(threads, "_cores", lambda: 64)
    environ = dict(given)
    threads.prepare(environ)
    assert environ.get("OMP_NUM_THREADS") == count
