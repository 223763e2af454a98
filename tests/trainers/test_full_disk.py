"""Wherever the disk refuses, training ends in a sentence, and what is on it is whole."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.cli.options import sentences
from posttrain.errors import TrainingError
from posttrain.io import write_whole
from posttrain.trainers.core import checkpoints

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="file sizes cannot be limited there")


def test_a_full_disk_at_any_write_is_a_sentence_and_leaves_only_whole_checkpoints(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(HERE / "full_disk_run.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    ends = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"limit"')]
    assert len(ends) == 12, done.stderr[-2000:]
    assert ends[-1]["ended"] == "done"
    assert [end for end in ends if end["ended"] == "raw" or end["left"]] == []
    refused = [end["said"] for end in ends if end["ended"] == "sentence"]
    assert len(refused) >= 8
    assert all("could not write" in said or "cannot write" in said for said in refused), refused
    assert any("checkpoint-1: " in said for said in refused), refused  # beside the record and the reference's file


def test_a_writer_of_torch_that_meets_a_full_disk_counts_as_one():
    """It raises a RuntimeError that speaks of positions."""

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Exception) as raised:  # which class it is depends on torch
        torch.save({"a": torch.zeros(1000)}, Full())
    assert checkpoints.is_failed_write(raised.value)


def test_other_errors_do_not_count_as_a_full_disk():
    for error in (RuntimeError("unexpected pos 64 vs 0"), ValueError("write"), Exception("could not write"), AssertionError()):
        assert not checkpoints.is_failed_write(error)
    assert checkpoints.is_failed_write(Exception("No space left on device (os error 28)"))  # how the tokenizers library says it


def test_a_whole_file_that_does_not_fit_is_named_and_the_older_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: .*recipe.yaml"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_outside_of_training_it_is_a_sentence_too(capsys):
    with pytest.raises(BaseException) as ended, sentences():
        raise OSError(errno.ENOSPC, "No space left on device", "out/report.html")
    assert ended.value.exit_code == 1
    assert "No space left on device: 'out/report.html'; free some space and run this again" in capsys.readouterr().err


def test_what_one_process_could_not_write_is_a_training_error(tmp_path):
    refusal = pytest.raises(TrainingError, match=r"could not write checkpoint-3: .*disk full.*no earlier checkpoint exists")
    with refusal, checkpoints.written_whole(tmp_path / "checkpoint-3", main=True):
        raise OSError(errno.ENOSPC, "disk full")
    assert list(tmp_path.iterdir()) == []
