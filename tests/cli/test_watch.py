"""`posttrain watch` and `report` as a user types them: which runs they find, where they listen, and what they say when they cannot."""

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import pytest
from recorded import write_run
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.cli.watch import watching
from posttrain.errors import UserError
from posttrain.watch.server import Address, choose_address, find_runs

pytest.importorskip("nicegui", reason="the page needs nicegui: pip install 'posttrain[watch]'")


def make(directory):
    directory.mkdir(parents=True)
    write_run(directory, 2).close()
    return directory


def said(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_a_directory_of_runs_means_all_of_them(tmp_path):
    for name in ("a/x", "a/y", "b/x"):
        make(tmp_path / name)
    assert [run.name for run in find_runs([str(tmp_path / "a")])] == ["x", "y"]
    assert [run.name for run in find_runs([str(tmp_path / "a" / "x"), str(tmp_path / "b")])] == ["a/x", "b/x"]  # told apart
    assert [run.name for run in find_runs([str(tmp_path / "a" / "x" / "run.sqlite"), str(tmp_path / "a" / "x")])] == ["x"]


def test_a_path_without_a_run_is_a_sentence(tmp_path):
    code, text = said("watch", tmp_path)
    assert code == 2
    assert "holds no run.sqlite" in text
    assert [run.name for run in find_runs([str(tmp_path / "later")], wait=True)] == ["later"]


def test_a_run_that_is_waited_for_is_shown_also_where_others_stand_below_it(tmp_path):
    make(tmp_path / "demo" / "sft")
    runs = find_runs([str(tmp_path / "demo"), str(tmp_path / "demo" / "sft")], wait=True)
    assert [run.directory.name for run in runs] == ["demo", "sft"]
    write_run(tmp_path / "demo", 2).close()
    assert runs[0].refresh()


def test_this_machine_needs_no_token_and_any_other_gets_one():
    assert choose_address("127.0.0.1", 0, with_token=False).token is None
    here, everywhere = choose_address("localhost", 0, with_token=True), choose_address("0.0.0.0", 0, with_token=False)
    for address in (here, everywhere):
        assert len(address.token) >= 20
        assert f"?token={address.token}" in address.url
    assert here.names == {"127.0.0.1", "localhost", "::1"}
    assert everywhere.names is None
    assert Address("::1", 5, None).url == "http://[::1]:5/"


def test_a_taken_port_is_a_sentence_when_asked_for_and_passed_over_when_not():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="leave --port out"):
            choose_address("127.0.0.1", port, with_token=False)
        assert choose_address("127.0.0.1", None, with_token=False).port != port


def test_a_report_is_written(tmp_path):
    run = make(tmp_path / "run")
    code, text = said("report", run, "-o", tmp_path / "r.html", "--group", "2/1", "--color", "entropy")
    assert (code, text.startswith("written to")) == (0, True)
    assert "Step 2, group 1" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--group", "5"], "a step and the number of a group in it, as in 120/3"),
        (["--group", "5/0"], "the nearest step with groups is 2"),
        (["--color", "entrpy"], "Did you mean 'entropy'?"),
    ],
)
def test_what_a_report_cannot_show_is_a_sentence(tmp_path, arguments, sentence):
    code, text = said("report", make(tmp_path / "run"), "-o", tmp_path / "r.html", *arguments)
    assert code == 2
    assert sentence in text
    assert not (tmp_path / "r.html").exists()


def test_a_run_that_has_not_begun_cannot_be_reported(tmp_path):
    sqlite3.connect(tmp_path / "run.sqlite").execute("PRAGMA journal_mode=WAL")  # the file is there, its first transaction is not
    code, text = said("report", tmp_path, "-o", tmp_path / "r.html")
    assert code == 2
    assert "the run has not begun yet" in text
    assert not (tmp_path / "r.html").exists()


def test_a_page_that_ends_with_its_training_says_nothing_of_it(tmp_path):
    write_run(tmp_path, 2).close()
    program = f"""
from posttrain.cli.watch import watching
with watching([{str(tmp_path)!r}], True):
    input()
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as training:
        first = training.stdout.readline()
        assert first.startswith("watch it:  http://127.0.0.1:"), first + training.stdout.read()
        rest, _ = training.communicate("the training is over\n", timeout=30)
    assert (training.returncode, rest) == (0, "")


def children_named(text):
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                if text.encode() in file.read():
                    found.append(int(entry))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_until(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_the_page_of_a_training_ends_with_it_also_when_it_is_killed(tmp_path):
    directory = str(tmp_path / "run-to-watch")
    with watching([directory], wanted=False):
        assert children_named(directory) == []
    with watching([directory], wanted=True):
        wait_until(lambda: len(children_named(directory)) == 1)
    assert children_named(directory) == []
    program = f"import time\\nfrom posttrain.cli.watch import watching\\nwith watching([{directory!r}], True):\\n    print('begun', flush=True)\\n    time.sleep(60)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    process = subprocess.Popen([sys.executable, "-c", program.replace("\\n", "\n")], env=environment, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert any(re.search("watch it:  http://127.0.0.1:", line) for line in lines), lines
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_until(lambda: children_named(directory) == [])
