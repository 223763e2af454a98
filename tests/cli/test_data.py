"""`posttrain data preview`: which tokens it marks, what it counts, and the rows it refuses."""

import json

import pytest
from typer.testing import CliRunner

from posttrain.cli.main import app

RECIPE = """
model: {from_scratch: {hidden_size: 16, num_hidden_layers: 1}, tokenizer: {vocab_size: 300}}
data: {train: rows.jsonl}
"""
USER, FOUR = {"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}


@pytest.fixture
def preview(tmp_path):
    def preview(rows, *options, recipe=RECIPE):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "recipe.yaml").write_text(recipe)
        return CliRunner().invoke(app, ["data", "preview", str(tmp_path / "recipe.yaml"), *options])

    return preview


def counts(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_trained_tokens_are_marked_in_a_row(preview):
    result = preview([{"prompt": [USER], "completion": [FOUR]}], "--kind", "sft")
    assert "<|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\n⟦four⟧⟦<|im_end|>⟧" in result.stdout
    assert "a stop token is trained in every completion" in result.stdout


def test_all_rows_are_counted_and_some_are_shown(preview):
    rows = [{"prompt": "two and two? ", "completion": "four"}] * 5
    found = counts(preview(rows, "--kind", "sft", "-n", "2", "--json"))
    assert (found["rows"], len(found["shown"]), found["runs"], found["ended"]) == (5, 2, 5, 5)
    (piece,) = found["shown"][0]
    assert found["trained"] == 5 * sum(piece["trained"])
    assert found["tokens"] == 5 * len(piece["ids"])


def test_pairs_show_what_is_chosen_and_what_is_rejected(preview):
    result = preview([{"chosen": [USER, FOUR], "rejected": [USER, {"role": "assistant", "content": "five"}]}], "--kind", "dpo")
    assert result.exit_code == 0, result.output
    assert "chosen: ⟦four⟧⟦<|im_end|>⟧" in result.stdout
    assert "rejected: ⟦five⟧⟦<|im_end|>⟧" in result.stdout


@pytest.mark.parametrize(("label", "name"), [(True, "good completion"), (False, "bad completion")])
def test_completions_with_a_label_say_which_it_is(preview, label, name):
    result = preview([{"prompt": "two and two? ", "completion": "four", "label": label}], "--kind", "kto")
    assert f"{name}: ⟦four⟧" in result.stdout


def test_prompts_are_only_read(preview):
    found = counts(preview([{"prompt": [USER]}], "--kind", "grpo", "--json"))
    assert found["trained"] == 0
    assert "what the model samples after them is trained" in preview([{"prompt": [USER]}], "--kind", "grpo").stdout


def test_cut_completions_are_counted(preview):
    result = preview(
        [{"prompt": "two ", "completion": "four " * 20}, {"prompt": "two ", "completion": "four"}], "--kind", "sft", "--sft.max_length=12"
    )
    assert "1 completions are cut at max_length" in result.stdout
    assert "trained in 50.0% of the completions; 1 do not teach where to stop" in result.stdout


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([{"messages": [USER, FOUR]}, {"messages": [USER]}], ["--sft.assistant_only_loss=true"], "row 1: a conversation has no message of the assistant"),
        ([{"prompt": "two ", "completion": ""}], [], "row 0: its completion is empty"),
        ([{"prompt": "two " * 40, "completion": "four"}], ["--sft.max_length=8"], "row 0: its prompt has"),
        ([{"prompt": "two ", "completion": "four"}], ["--kind", "dpo"], "needs rows with the columns (prompt, chosen, rejected)"),
        ([{"prompt": "two ", "completion": "four"}], ["--kind", "sfd"], "--kind sfd is not known"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_trained_on_are_an_error(preview, rows, options, sentence):
    result = preview(rows, *([] if "--kind" in options else ["--kind", "sft"]), *options)
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.split())


def test_the_trainer_follows_from_the_recipe(preview):
    result = preview([{"prompt": "two ", "completion": "four"}], recipe=RECIPE + "sft: {max_length: 64}\n")
    assert "⟦four⟧" in result.stdout
    result = preview([{"prompt": "two "}], recipe=RECIPE + "sft: {max_length: 64}\ndpo: {beta: 0.1}\n")
    assert "say which data to show: --kind sft" in result.stderr


def test_the_preview_is_what_the_trainer_trains(preview, tmp_path):
    """The same ids and the same mask, through another door."""
    from posttrain import SFTConfig, SFTTrainer
    from posttrain.cli.build import make_model, make_tokenizer
    from posttrain.cli.recipe import read_recipe

    rows = [{"messages": [USER, FOUR, USER, FOUR]}]
    found = counts(preview(rows, "--kind", "sft", "--sft.assistant_only_loss=true", "--json"))
    recipe = read_recipe(str(tmp_path / "recipe.yaml"))
    tokenizer = make_tokenizer(recipe.model, rows)
    args = SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, assistant_only_loss=True)
    trainer = SFTTrainer(make_model(recipe.model, tokenizer, args), args, train_dataset=rows, processing_class=tokenizer)
    (piece,) = found["shown"][0]
    assert piece["ids"] == list(trainer.examples[0].ids)
    assert piece["trained"] == list(map(bool, trainer.examples[0].trained))
