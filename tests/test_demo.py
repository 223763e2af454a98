"""The demo: what it says to type works as it stands, and it never writes over a run that is none of its own."""

import json
import re
import shlex
import shutil

import pytest
import torch
from recorded import another_writer, write_run
from typer.testing import CliRunner

import posttrain.demo
from posttrain.cli.main import app
from posttrain.cli.runs import make_way_for_demo
from posttrain.tracking.reader import RunReader


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(directory, what was printed) of a demo of a few steps."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "my demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posttrain.demo, "EVAL_SIZE", 40)  # a short exam
        result = call("demo", "--quick", "--output", output)
    assert result.exit_code == 0, result.output
    return output, result.output


def command(text, name):
    """The arguments of the command that is printed, up to the next gap."""
    line = next(line for line in text.splitlines() if f"posttrain {name}" in line)
    return shlex.split(re.split(r"  +", line[line.index(f"posttrain {name}") :])[0])[1:]


def test_what_it_says_to_do_oneself_can_be_done(demo, tmp_path, monkeypatch):
    _, text = demo
    dry = call(*command(text, "grpo"), "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "16 prompts x 16 completions" in dry.output
    monkeypatch.chdir(tmp_path)
    trained = call(*command(text, "grpo"), "--train.max_steps=1")
    assert trained.exit_code == 0, trained.output
    assert RunReader(tmp_path / "runs" / "sums").steps() == [1]


def test_its_exam_can_be_taken_again(demo):
    _, text = demo
    result = call(*command(text, "eval"), "--json", "--samples", "20")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["questions"] == 20


def test_an_earlier_demo_is_replaced(demo, tmp_path):
    again = shutil.copytree(demo[0], tmp_path / "again")
    assert {"model", "sft", "exam.jsonl", "summary.json", "run.sqlite"} <= {path.name for path in again.iterdir()}
    make_way_for_demo(str(again), ["sft"])
    assert sorted(path.name for path in again.rglob("*") if path.is_file()) == ["run.sqlite-lock", "run.sqlite-lock", "sums.jsonl", "sums.yaml"]


def test_a_demo_that_is_still_running_is_not_replaced(demo, tmp_path):
    again = shutil.copytree(demo[0], tmp_path / "again")
    with another_writer(again / "sft"):
        result = call("demo", "--quick", "--output", again)
        assert result.exit_code == 2
        assert "another training writes here" in result.output
        assert (again / "model").is_dir()


@pytest.mark.parametrize("where", ["", "sft"])
@pytest.mark.parametrize(
    "also",
    [{}, {"exam.jsonl": '{"prompt": "Who?", "answer": "me"}'}, {"exam.jsonl": '{"prompt": "47+38=", "answer": "85"}', "recipe.yaml": "model:"}],
)
def test_any_other_run_is_left_alone(tmp_path, where, also):
    directory = tmp_path / "mine" / where
    directory.mkdir(parents=True)
    write_run(directory, 2).close()
    for name, text in also.items():
        (tmp_path / "mine" / name).write_text(text)
    result = call("demo", "--quick", "--output", tmp_path / "mine")
    assert result.exit_code == 2
    assert "holds a run that is no demo" in result.output
    assert RunReader(directory).steps() == [1, 2]
