"""A store that somebody else wrote is data: whatever is in it, a reader ends soon, in little memory, with what is there or one sentence."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recorded import write_run

from posttrain.errors import UserError
from posttrain.io import read_json, read_text
from posttrain.tracking import checked
from posttrain.tracking.browse import Browser
from posttrain.tracking.checked import tables
from posttrain.tracking.reader import RunReader
from posttrain.tracking.schema import VERSION
from posttrain.tracking.typed import whole

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from strange_stores import FILES, STORES, build  # noqa: E402

pytest.importorskip("nicegui", reason="the report takes its chart library from nicegui: pip install 'posttrain[watch]'")

# What still is a run: values that a reader can leave out or draw at its edge.
READ = {
    "surrogates in JSON",
    "numbers at the edge",
    "settings of other kinds",
    "metadata of another kind",
    "many large blobs",
    "many long texts",
    "runs of tokens without end",
    "many notes",
    "a huge blob",
}


@pytest.fixture(scope="module")
def reading():
    """One process reads all stores, as the command line does: its memory is the most that any of them took."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    with subprocess.Popen(
        [sys.executable, str(HERE / "strange_stores.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("name", [*STORES, *FILES])
def test_a_strange_store_is_read_or_refused_in_a_sentence_in_little_time_and_memory(name, tmp_path, reading):
    directory = build(tmp_path, name)
    reading.stdin.write(f"{directory}\n")
    reading.stdin.flush()
    found = json.loads(reading.stdout.readline() or '"the process died"')
    assert not [how["said"] for how in found.values() if isinstance(how, dict) and "TRACEBACK" in how["said"]]
    assert max(how["seconds"] for how in found.values() if isinstance(how, dict)) < 30
    assert found["peak_mb"] < 500
    said = found["report"]["said"]
    assert (said == "read") == (name in READ), said
    if said != "read":
        assert said.startswith("error: ")
        assert "\n" not in said
        assert str(directory) in said


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_a_table_is_asked_for_the_columns_of_its_version(version):
    wanted = tables(version)
    assert ("episodes" in wanted) == (version >= 2)
    assert ("vocabulary" in wanted) == (version >= 3)
    assert ("advantage" in wanted["token_details"]) == (version >= 3)
    assert wanted["rollouts"]["idx"] == 3  # the third part of the key


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path, 2).close()
    return tmp_path


def test_an_answer_that_takes_too_long_is_refused(run, monkeypatch):
    monkeypatch.setattr(checked, "SECONDS", 0.2)
    reader = RunReader(run)
    with pytest.raises(UserError, match=r"an answer took over 0 s, as no run does"):
        reader.row(ENDLESS, kinds=(whole,))
    assert reader.steps() == [1, 2]  # and goes on with what it can


def test_many_answers_together_take_no_longer_than_they_may(run):
    reader = RunReader(run)
    started = time.monotonic()
    with pytest.raises(UserError, match="took over"), reader.within(0.2):
        reader.row(ENDLESS, kinds=(whole,))
    assert time.monotonic() - started < 5
    assert reader.steps() == [1, 2]


def test_ctrl_c_ends_an_answer(run):
    script = (
        "import sys\nfrom posttrain.tracking import checked\nfrom posttrain.tracking.reader import RunReader\nfrom posttrain.tracking.typed import whole\n"
        "checked.SECONDS = 100.0\nreader = RunReader(sys.argv[1])\nprint('ready', flush=True)\n"
        f"try:\n    reader.row({ENDLESS!r}, kinds=(whole,))\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.stdout.read() == "interrupted\n"
        assert time.monotonic() - started < 30


def test_a_store_cannot_be_written_through_a_reader_whatever_its_schema(run):
    reader = Browser(run)
    for statement in ("DELETE FROM steps", "PRAGMA writable_schema = ON; DELETE FROM sqlite_master"):
        with pytest.raises(sqlite3.Error):
            reader._db.executescript(statement)


def test_a_page_tells_the_fault_of_a_store_and_looks_again_later(tmp_path, monkeypatch):
    from posttrain.watch import curves
    from posttrain.watch.figures import status
    from posttrain.watch.page import Watched

    directory = build(tmp_path, "missing tables")
    watched = Watched([curves.WatchedRun("r", directory)])
    watched.refresh()
    assert "has no table 'rollouts'" in status(watched.runs[0])
    version = watched.version
    watched.refresh()
    assert watched.version == version  # not read again at once
    (directory / "run.sqlite").unlink()
    write_run(directory, 2).close()
    monkeypatch.setattr(watched.runs[0], "_look_again", 0.0)
    watched.refresh()
    assert "step 2" in status(watched.runs[0])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "holds no JSON"),
        (b"[]", "holds no mapping"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "holds no"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds no JSON"),
        (b'{"a": "' + b"x" * 2**21 + b'"}', "KiB"),
        (b'{"a": [' + b"{}," * 60_000 + b"{}]}", "of a usual size"),
    ],
)
def test_a_strange_file_beside_a_store_is_a_sentence(tmp_path, content, said):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        read_json(tmp_path / "summary.json")
    assert "summary.json" in str(raised.value)
    assert read_text(HERE / "strange_stores.py").startswith('"""Stores')
