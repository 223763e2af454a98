"""`posttrain plan`, and the check that training commands make with it."""

import json

import pytest
from small import build_tokenizer
from typer.testing import CliRunner

from posttrain import SFTConfig
from posttrain.cli.fit import longest
from posttrain.cli.kinds import KINDS
from posttrain.cli.main import app

HEADLINE = ["plan", "--model", "meta-llama/Llama-3.1-8B-Instruct", "--context", "20480", "--generations", "8", "--load-in-4bit", "--lora-r", "32"]
RECIPE = """
model: {{from_scratch: {{model_type: {kind}, hidden_size: {hidden}, intermediate_size: {hidden}, num_hidden_layers: {layers}, num_attention_heads: 4,
        num_key_value_heads: 2, max_position_embeddings: 256}}, tokenizer: {{vocab_size: 300}}}}
data: {{train: rows.jsonl, prompt: "{{question}}", answer: "{{answer}}"}}
rubric: [arithmetic]
train: {{output_dir: run, num_generations: 2, per_device_train_batch_size: 4, max_completion_length: 6, max_steps: 2, use_cpu: true}}
sft: {{output_dir: run, max_steps: 1, per_device_train_batch_size: 2, use_cpu: true}}
"""


def ask(*words):
    return CliRunner().invoke(app, list(words))


def answer(*words):
    result = ask(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": f"what is {n}+1?", "answer": n + 1}) + "\n" for n in range(20)))

    def write(hidden=32, layers=2, kind="qwen3"):
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(hidden=hidden, layers=layers, kind=kind))
        return "recipe.yaml"

    return write


def test_the_headline_has_every_term_in_bytes_under_names_that_stay():
    found = answer(*HEADLINE, "--gpu", "16GB")
    assert set(found["training"]) == {
        "weights", "adapters", "gradients", "optimizer", "reference", "checkpoints", "activations", "weight_casts", "logprob_tiles", "optimizer_step",
        "holes",
        "context",
    }  # fmt: skip
    assert set(found["rollout"]) == {
        "weights", "adapters", "optimizer", "reference", "inference_copy", "kv_prompts", "kv_completions", "prefill", "sampling", "context",
    }  # fmt: skip
    assert set(found["host"]) == {"checkpoints_host", "optimizer_host"}
    assert found["peak"] == max(found["train_peak"], found["rollout_peak"])
    assert found["training"]["adapters"] == 83_886_080 * 4  # rank 32 on all linear layers of an 8B, in float32
    assert found["fits"] is False
    assert found["peak_then"] <= found["limit"] == 16 * 10**9
    assert "gradient_checkpointing=true" in found["to_fit"]


def test_options_are_the_trainers_settings():
    plain = answer(*HEADLINE)
    switched = answer(
        *HEADLINE,
        *["--gradient-checkpointing", "--tiles", "auto", "--offload", "--adapter-dtype", "bfloat16", "--optim", "adamw_8bit", "--dtype", "bfloat16"],
    )
    assert switched["train_peak"] < plain["train_peak"] / 10
    assert switched["training"]["adapters"] * 2 == plain["training"]["adapters"]
    assert switched["host"]["checkpoints_host"] > 32 * 20480 * 4096 * 2
    assert [saving["setting"].partition("=")[0] for saving in switched["savings"]] == ["max_concurrent_completions"]


def test_the_text_says_what_to_change_and_how_far_a_card_reaches():
    text = ask(*HEADLINE, "--gpu", "16GB", "--rates", "65,320").output
    assert "it does not fit 14.9 GiB; with these settings it needs" in text
    assert "gradient_checkpointing=true" in text
    assert "tokens of context" in text
    assert "of the known models at most" in text
    assert "a lower bound" in text


def test_the_published_table_says_which_terms_are_extrapolations():
    text = ask("plan", "--seeds-table").output
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "414.51" in lines["training"]
    assert "**extrapolated**" in lines["training"]
    assert "78.28" in lines["logits of GRPO"]
    assert "extrapolated" not in lines["logits of GRPO"]
    assert "510.8" in lines["together"]
    assert "54.33" in lines["together"]


def test_a_directory_and_a_config_file_will_do(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 2}))
    by_file, by_folder = (answer("plan", "--model", str(place), "--context", "512") for place in (tmp_path / "config.json", tmp_path))
    assert by_file["peak"] == by_folder["peak"]
    (tmp_path / "other.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 3}))
    assert answer("plan", "--model", str(tmp_path / "other.json"), "--context", "512")["parameters"] > by_file["parameters"]


def test_a_recipe_brings_its_settings(recipe):
    name = recipe()
    found = answer("plan", name, "--trainer", "grpo", "--train.max_completion_length=40", "--prompt-length", "10")
    assert (found["completion_length"], found["prompt_length"], found["generations"]) == (40, 10, 2)
    assert found["training"]["context"] == 0  # this recipe trains on the CPU
    sft = answer("plan", name, "--trainer", "sft", "--sft.max_length=256")
    assert sft["rollout_peak"] == 0
    assert sft["prompt_length"] + sft["completion_length"] == 256
    short = answer("plan", name, "--trainer", "sft", "--sft.max_length=256", "--prompt-length", "100")
    assert (short["prompt_length"], short["completion_length"]) == (100, 156)


def test_a_recipe_on_a_gpu_has_the_precision_of_a_gpu(recipe):
    name = recipe()
    lengths = ("--trainer", "grpo", "--train.max_completion_length=40", "--prompt-length", "10", "--device", "cuda")
    assert answer("plan", name, *lengths)["training"]["weight_casts"] > 0
    assert answer("plan", name, *lengths, "--train.bf16=false")["training"]["weight_casts"] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plan"], "a recipe, or --model"),
        (["plan", "--model", "qwen3-8b"], "--context or --completion-length"),
        (["plan", "--model", "qwen3-8bb", "--context", "64"], "Did you mean 'qwen3-8b'"),
        (["plan", "--model", "qwen3-8b", "--context", "64", "--prompt-length", "64"], "leaves no room"),
        (["plan", "--model", "qwen3-8b", "--context", "64", "--prompt-length", "4", "--completion-length", "4"], "two of the three"),
        (["plan", "--model", "qwen3-8b", "--context", "64", "--gpu", "big"], "16GB or 15.5GiB"),
        (["plan", "--model", "qwen3-8b", "--context", "64", "--tiles", "some"], "a number of rows, or auto"),
        (["plan", "--model", "qwen3-8b", "--context", "64", "--train.beta=1"], "belongs to a plan of a recipe"),
        (["plan", "--model", "qwen3-8b", "--context", "64", "--rates", "fast"], "65,320"),
        (["plan", "--model", "qwen3-8b", "--context", "64", "--rates", "0,320"], "above 0"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(words, sentence):
    result = ask(*words)
    assert result.exit_code == 2
    assert sentence in result.output


def test_training_refuses_what_cannot_fit_this_machine_before_a_model_is_made(recipe, tmp_path):
    result = ask("grpo", recipe(hidden=16384, layers=200))  # 250 billion parameters
    assert result.exit_code == 2
    assert "this machine has" in result.output
    assert "memory_check=false" in result.output
    assert not (tmp_path / "run").exists()


def test_columns_that_are_not_trained_on_count_for_nothing():
    tokenizer = build_tokenizer()
    args = SFTConfig(output_dir="unused", use_cpu=True, report_to="none", max_length=None)
    row = {"prompt": "1 + 1 = ", "completion": "2"}
    alone, beside = (longest(KINDS["sft"], rows, tokenizer, args) for rows in ([row], [row | {"source": "1 " * 6000}]))
    assert alone == beside


def test_every_trainer_asks(recipe):
    result = ask("sft", recipe(hidden=16384, layers=200), "--data.completion={answer}")
    assert result.exit_code == 2
    assert "this machine has" in result.output


def test_what_fits_is_not_spoken_of(recipe):
    result = ask("grpo", recipe(), "--dry-run")
    assert result.exit_code == 0
    assert "memory" not in result.output


def test_an_architecture_without_a_plan_is_said_and_goes_on(recipe):
    result = ask("grpo", recipe(kind="olmo2"), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "memory was not checked" in result.output


def test_the_check_can_be_left_out(recipe, monkeypatch):
    from posttrain.cli import build

    def make_no_model(*_):
        raise RuntimeError("it came this far")

    monkeypatch.setattr(build, "make_model", make_no_model)
    result = ask("grpo", recipe(hidden=16384, layers=200), "--train.memory_check=false")
    assert "it came this far" in str(result.exception)
