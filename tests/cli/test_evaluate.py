"""`posttrain eval` beyond greedy accuracy: drawn answers, comparisons, categories, duplicates, saved completions."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from posttrain.cli.main import app
from posttrain.data.tokenizer import train_bpe

QUESTIONS = [{"prompt": f"what is {a}+{b}?", "answer": str(a + b), "carry": "yes" if a + b > 3 else "no"} for a in range(4) for b in range(4)]
RECIPE = """
model: {name: first}
data: {train: train.jsonl}
rubric: [mine.py:even]
train: {max_completion_length: 5, temperature: 0.7}
eval: {data: exam.jsonl}
"""


def save_model(folder, seed):
    tokenizer = train_bpe([row["prompt"] for row in QUESTIONS], 300)
    tokenizer.chat_template = None
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "first", 0)
    save_model(folder / "second", 1)
    return folder


@pytest.fixture
def run(tmp_path, models):
    """A finished run: it began with `first` and ended as `second`."""
    for name, target in (("first", "first"), ("model", "second")):
        (tmp_path / name).symlink_to(models / target)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "mine.py").write_text("from posttrain import verifier\n\n@verifier\ndef even(completion):\n    return len(completion) % 2 == 0\n")
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "What is 0 + 0?"}, QUESTIONS[5], {"prompt": "x"}]))
    return tmp_path


def call(*args):
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def result_of(*args):
    called = call(*args, "--json")
    assert called.exit_code == 0, called.output
    return json.loads(called.stdout.splitlines()[-1])


def saved(run):
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def test_every_figure_can_be_recomputed_from_the_saved_completions(run):
    found = result_of(run, "-n", "4", "--by", "carry", "--against", "start")
    lines = saved(run)
    assert len(lines) == 2 * 16 * 5

    def verdicts(model, drawn):
        return {(line["task"], line["sample"]): line["right"] for line in lines if line["model"].endswith(model) and line["drawn"] == drawn}

    new, old, drawn = verdicts("model", "greedy"), verdicts("first", "greedy"), verdicts("model", "sampled")
    assert found["accuracy"] == sum(new.values()) / 16
    assert found["against"]["accuracy"] == sum(old.values()) / 16
    assert found["against"]["difference"][0] == pytest.approx((sum(new.values()) - sum(old.values())) / 16)
    assert found["against"]["gained"] == sum(new[key] and not old[key] for key in new)
    assert found["sampled"]["pass_at"]["1"][0] == pytest.approx(sum(drawn.values()) / 64)
    assert found["sampled"]["pass_at"]["4"][0] == pytest.approx(sum(any(drawn[task, k] for k in range(4)) for task in range(16)) / 16)
    with_carry = [line["task"] for line in lines if line["sample"] == 0 and line["columns"]["carry"] == "yes"]
    row = next(row for row in found["by"]["values"] if row["value"] == "yes")
    assert (row["questions"], row["right"]) == (len(set(with_carry)), sum(new[task, 0] for task in set(with_carry)))


def test_a_model_against_itself_gained_nothing(run):
    found = result_of(run, "--against", run, "-n", "2")["against"]
    assert (found["difference"][0], found["p_value"], found["gained"], found["lost"]) == (0.0, 1.0, 0, 0)
    assert found["sampled_difference"]["p_value"] == 1.0
    assert found["difference"][1] < 0 < found["difference"][2]


def test_questions_of_the_training_data_are_reported(run):
    found = result_of(run)["duplicates"]
    assert (found["exact"], found["normalised"]) == (1, 1)
    assert "warning: 1 of 16 questions are in the training data and 1 more" in call(run).output
    (run / "train.jsonl").unlink()
    assert "not compared with the training data: the data file" in call(run).output


def test_the_temperature_is_that_of_training(run):
    def drawn(*args):
        result_of(run, "-n", "3", *args)
        return [line["completion"] for line in saved(run) if line["drawn"] == "sampled"]

    assert drawn() == drawn("--temperature", "0.7") != drawn("--temperature", "1.5")


def test_the_report_reads_like_this(run):
    said = call(run, "-n", "2", "--against", "start", "--by", "carry").output
    for part in ("greedy accuracy ", "2 drawn answers each · pass@1 ", "pass@2 ", "against ", "questions gained, ", "by carry:", "completions: "):
        assert part in said


@pytest.mark.parametrize(
    ("args", "said"), [(("--by", "cary"), "Did you mean 'carry'?"), (("--against", "/no/such/run"), "there is no model or run at /no/such/run")]
)
def test_what_cannot_be_asked_is_said_before_anything_is_spent(run, args, said):
    result = call(run, *args)
    assert (result.exit_code, said in result.output) == (2, True), result.output
    assert not (run / "eval.jsonl").exists()
