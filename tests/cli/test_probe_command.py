"""`posttrain probe`: its exit codes, and that it asks as the run would."""

import json

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app

RECIPE = """
model: {from_scratch: {model_type: qwen3, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
        num_key_value_heads: 1, head_dim: 8, max_position_embeddings: 64}, tokenizer: {vocab_size: 300}}
data: {train: rows.jsonl, prompt: "{question}"}
rubric: [mine.py:even]
train: {num_generations: 4, per_device_train_batch_size: 8, max_completion_length: 6, max_steps: 40, use_cpu: true}
"""
REWARDS = """
from posttrain import verifier

@verifier
def never(completion):
    return False

@verifier
def always(completion):
    return True

@verifier
def even(completion):
    return len(completion) % 2 == 0

def nothing(completion):
    return None

def raises(completion):
    raise KeyError("oops")
"""


@pytest.fixture
def folder(tmp_path):
    rows = [{"question": f"what is {a}+{b}?", "answer": a + b} for a in range(5) for b in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(REWARDS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def probe(folder, *args):
    return CliRunner().invoke(app, ["probe", str(folder / "recipe.yaml"), "--prompts", "6", "--completions", "8", *map(str, args)])


@pytest.mark.parametrize(
    ("reward", "code", "verdict"),
    [
        ("even", 0, "RL can work: "),
        ("never", 1, "RL will not work here: no completion of 48 was right; SFT first"),
        ("always", 3, "RL has nothing to learn here: all 48 completions were right"),
        ("nothing", 1, "none of 48 completions could be scored"),
        ("raises", 2, "error: reward 'raises' raised KeyError"),
    ],
)
def test_the_exit_code_and_the_last_sentence_are_the_verdict(folder, reward, code, verdict):
    result = probe(folder, f"--rubric=[{folder}/mine.py:{reward}]")
    assert result.exit_code == code, result.output
    assert verdict in result.output.splitlines()[-1]


def test_json_holds_the_findings_and_completions_are_saved(folder):
    result = probe(folder, "--json", "--save", folder / "seen.jsonl", "--train.num_generations=8")
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["n"], found["k"], found["num_generations"], found["exit_code"]) == (6, 8, 8, 0)
    assert set(found["signal"]) == {"2", "4", "8"}
    lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    assert len(lines) == 48
    assert sum(line["right"] for line in lines) == found["right"]
    assert len({line["task"] for line in lines}) == 6


def test_nothing_is_written_and_bad_input_is_a_sentence(folder):
    before = sorted(path.name for path in folder.iterdir())
    assert probe(folder).exit_code == 0
    result = probe(folder, "--train.num_generation=4")
    assert (result.exit_code, "Did you mean train.num_generations?" in result.output) == (2, True)
    assert "use grpo or rloo" in probe(folder, "--trainer", "sft").output
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


def test_a_place_that_cannot_be_written_is_found_before_the_model_is_asked(folder):
    result = probe(folder, f"--rubric=[{folder}/mine.py:raises]", "--save", folder / "missing" / "seen.jsonl")
    assert (result.exit_code, "error: cannot write" in result.output) == (2, True), result.output
