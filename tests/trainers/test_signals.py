"""A signal ends training after the step in progress, saved, on all processes together; exit codes are 128 and the signal's number."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.trainers.core import checkpoints, manifest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are sent as POSIX systems do")
PATIENCE = 240


def begin(output_dir, log, *, ignored=None, **variables):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        **variables,
    }
    ignore = (lambda: signal.signal(ignored, signal.SIG_IGN)) if ignored else None
    command = [sys.executable, str(HERE / "stopped_run.py"), str(output_dir)]
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment, preexec_fn=ignore)


def wait_until_it_scores(log, times=2):
    until = time.monotonic() + PATIENCE
    while log.read_text().count("scoring") < times:
        assert time.monotonic() < until, log.read_text()[-2000:]
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_step_is_saved_and_the_exit_code_tells_the_signal(tmp_path, number, code):
    log = tmp_path / "log"
    process = begin(tmp_path / "run", log)
    wait_until_it_scores(log)
    process.send_signal(number)
    assert process.wait(PATIENCE) == code, log.read_text()[-2000:]
    saved = checkpoints.last_checkpoint(tmp_path / "run")
    manifest.check_files(saved, manifest.read(saved))
    assert "Traceback" not in log.read_text()


def test_a_second_one_stops_at_once_and_an_echo_of_the_first_does_not(tmp_path):
    from posttrain.trainers.core.interrupt import Interrupt

    interrupt = Interrupt()
    interrupt._on_signal(signal.SIGTERM, None)
    interrupt._on_signal(signal.SIGTERM, None)  # of the launcher, which passes on what its processes got already
    interrupt._asked_at -= 1.5
    with pytest.raises(SystemExit) as ended:
        interrupt._on_signal(signal.SIGTERM, None)
    assert ended.value.code == 143
    with pytest.raises(KeyboardInterrupt):
        interrupt._on_signal(signal.SIGINT, None)


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])  # nohup; a script's `&`
def test_a_signal_that_whoever_started_it_ignores_is_not_listened_to(ignored):
    from types import SimpleNamespace

    from posttrain.trainers.core.interrupt import Interrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(ignored, signal.SIG_IGN)
    try:
        interrupt = Interrupt()
        interrupt.on_train_begin(SimpleNamespace(), None, None)
        assert signal.getsignal(ignored) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == interrupt._on_signal
        interrupt.restore()
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    logs = [tmp_path / f"log{rank}" for rank in (0, 1)]
    return [begin(tmp_path / "run", log, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank, log in enumerate(logs)], logs


@pytest.mark.parametrize(
    ("told", "gap"), [pytest.param((1,), 0.0, id="one-of-them"), pytest.param((0, 1), 0.06, id="both-at-different-times", marks=pytest.mark.slow)]
)
def test_two_processes_agree_on_the_step_after_which_they_stop(tmp_path, told, gap):
    processes, logs = two_processes(tmp_path)
    try:
        for log in logs:
            wait_until_it_scores(log)
        for rank in told:
            processes[rank].send_signal(signal.SIGINT)
            time.sleep(gap)
        assert [process.wait(PATIENCE) for process in processes] == [130, 130], [log.read_text()[-1000:] for log in logs]
    finally:
        for process in processes:
            process.kill()
    saved = checkpoints.last_checkpoint(tmp_path / "run")
    held = manifest.read(saved)
    assert {"state-0.json", "state-1.json"} <= held.files.keys()
    manifest.check_files(saved, held)


@pytest.mark.slow
def test_a_process_whose_other_one_is_killed_ends_in_a_sentence(tmp_path):
    processes, logs = two_processes(tmp_path)
    try:
        for log in logs:
            wait_until_it_scores(log)
        processes[1].kill()
        assert processes[0].wait(PATIENCE) == 1
    finally:
        for process in processes:
            process.kill()
    assert "error: another process of this training ended" in logs[0].read_text()
    assert "Traceback" not in logs[0].read_text()
