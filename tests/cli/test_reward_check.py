"""`posttrain reward check`, as a user types it."""

import json

import psutil
import pytest
from small import build_model
from typer.testing import CliRunner

from posttrain import processes
from posttrain.cli.main import app

MINE = """
def lenient(completion, answer):
    return float(answer in completion)

def sound(completion, answer, points=1.0):
    return points * (completion.strip() == answer)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"question": f"What is 3 + {n}?", "solution": f"3+{n}={3 + n} #### {3 + n}"}) for n in (14, 28, 96))
    )
    (tmp_path / "recipe.yaml").write_text(
        'model: {name: none}\nrubric: [gsm8k]\ndata: {train: rows.jsonl, prompt: "{question}", answer: "{solution|after:####}"}\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["reward", "check", *arguments])


def test_a_sound_reward_passes_with_its_range_shown(folder):
    result = run("arithmetic")
    assert result.exit_code == 0, result.output
    assert "reward                -4 to +4" in result.output
    assert result.output.splitlines()[-1] == "passed"


def test_a_weak_reward_fails_with_exit_code_1(folder):
    result = run("mine.py:lenient")
    assert result.exit_code == 1
    assert "FAIL  substrings" in result.output
    assert "checks failed" in result.output.splitlines()[-1]


def test_settings_are_read_as_yaml_and_findings_as_json(folder):
    result = run("soft_format", "--set", "legacy=true", "--json")
    found = json.loads(result.output)
    assert result.exit_code == 1
    assert found["passed"] is False
    assert [finding["name"] for finding in found["findings"] if finding["verdict"] == "FAIL"] == ["reasoning in lines"]


def test_rows_of_the_user_with_templates(folder):
    result = run(
        "mine.py:sound", "--data", "rows.jsonl", "--prompt", "{question}", "--answer", "{solution|after:####}", "--rows", "2", "--set", "points=2.5"
    )
    assert result.exit_code == 0, result.output
    assert "2 rows" in result.output
    assert "gold answers earn 2.5 to 2.5" in result.output


def test_a_recipe_brings_its_rubric_and_rows(folder):
    result = run("recipe.yaml")
    assert result.exit_code == 0, result.output
    assert "3 of 3 earn 4" in result.output


def test_a_reward_model_in_the_rubric_is_asked_too(folder):
    from posttrain.data.tokenizer import train_bpe
    from posttrain.models.heads import reward_model

    tokenizer = train_bpe(["What is 3 + 14?"], 290)
    reward_model(build_model(tokenizer)).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("[gsm8k]", "[judge, gsm8k]"))
    result = run("recipe.yaml", "--rows", "1")
    assert result.exit_code == 1, result.output  # what is beyond its context is not scored
    assert "judge" in result.output.splitlines()[1]
    assert "1 rows; good completions are written as" in result.output


def test_only_the_rows_that_are_asked_about_are_read_of_a_stream(folder):
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("train: rows", "streaming: true, train: rows"))
    with (folder / "rows.jsonl").open("a") as file:
        file.write("\nno row\n")
    result = run("recipe.yaml", "--rows", "3")
    assert result.exit_code == 0, result.output
    assert "is not valid JSON" in run("recipe.yaml").output


def test_workers_end_with_the_check(folder):
    before = {child.pid for child in psutil.Process().children()}
    assert run("mine.py:sound", "--set", "workers=1", "--set", "timeout=5").exit_code == 0
    left = [child for child in psutil.Process().children() if child.pid not in before and child.status() != psutil.STATUS_ZOMBIE]
    remaining = psutil.wait_procs(left, timeout=5)[1]
    assert [
        line for line in (child.cmdline() for child in remaining) if processes.__file__ not in line
    ] == []  # but the guard, which lives as long as we do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm9k"], "Did you mean 'gsm8k'?"),
        (["mine.py:lenien"], "Did you mean 'lenient'?"),
        (["mine.py:sound", "--data", "rows.jsonl"], "asks for the column 'answer'"),
        (["arithmetic", "--set", "legacy"], "--set legacy has no value"),
        (["recipe.yaml", "--set", "legacy=true"], "a recipe holds the settings"),
        (["arithmetic", "--form", "nowhere"], "does not say where the {answer} stands"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence_with_exit_code_2(folder, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_text_of_a_reward_is_no_markup(folder):
    result = run("arithmetic", "--form", "[bold]\x1b[31m{answer}")
    assert "[bold]\\x1b[31m{answer}" in result.output


def test_a_dry_run_shows_what_each_reward_can_add(folder):
    recipe = ["gsm8k-tiny", "--data.train=rows.jsonl", "--data.answer={solution|after:####}", "--data.completion={solution}", "--dry-run"]
    result = CliRunner().invoke(app, ["grpo", *recipe])
    assert result.exit_code == 0, result.output
    assert "steps · reward 0 to +4" in result.output
    assert "correctness    x 1  0 to +2    decides right or wrong, reads 'answer'" in result.output
