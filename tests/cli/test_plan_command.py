"""`posttrain plan`, and the check that training commands make with it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import build_model, build_tokenizer
from typer.testing import CliRunner

from posttrain import SFTConfig
from posttrain.cli.main import app
from posttrain.trainers.core.switches import longest

HEADLINE = ["plan", "--model", "meta-llama/Llama-3.1-8B-Instruct", "--context", "20480", "--generations", "8", "--load-in-4bit", "--lora-r", "32"]
EVERYTHING_OFF = ["--no-gradient-checkpointing", "--no-offload", "--tiles", "none", "--tokens-per-micro-batch", "4096", "--concurrent", "256"]
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
    assert found["fits"] is True
    assert found["limit"] == 16 * 10**9
    forced = answer(*HEADLINE, "--gpu", "16GB", "--no-gradient-checkpointing")
    assert forced["fits"] is False
    assert forced["peak_then"] <= 16 * 10**9
    assert "gradient_checkpointing=true" in forced["to_fit"]


def test_options_are_the_trainers_settings():
    plain = answer(*HEADLINE, *EVERYTHING_OFF)
    switched = answer(
        *HEADLINE,
        *[
            "--gradient-checkpointing",
            "--tiles",
            "2048",
            "--offload",
            "--adapter-dtype",
            "bfloat16",
            "--optim",
            "adamw_8bit",
            "--dtype",
            "bfloat16",
            "--gpu",
            "16GB",
        ],
    )
    assert switched["train_peak"] < plain["train_peak"] / 10
    assert switched["training"]["adapters"] * 2 == plain["training"]["adapters"]
    assert switched["host"]["checkpoints_host"] > 32 * 20480 * 4096 * 2
    assert [saving["setting"] for saving in switched["savings"]] == []
    assert switched["memory"]["settings"] == {"max_concurrent_completions": 1}  # nobody had set it


def test_the_text_says_what_to_change_and_how_far_a_card_reaches():
    text = ask(*HEADLINE, *EVERYTHING_OFF, "--gpu", "16GB", "--rates", "65,320").output
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
    sft = answer("plan", name, "--trainer", "sft", "--context", "256")
    assert sft["rollout_peak"] == 0
    assert sft["prompt_length"] + sft["completion_length"] == 256
    elsewhere = answer("plan", name, "--trainer", "sft", "--sft.max_length=256", "--data.train=owner/elsewhere")
    assert elsewhere["prompt_length"] + elsewhere["completion_length"] == 256  # as long as rows may be
    assert "the data are not here" in elsewhere["memory"]["assumed"][0]
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
    alone, beside = (longest(args, rows, tokenizer) for rows in ([row], [row | {"source": "1 " * 6000}]))
    assert alone == beside


def test_every_trainer_asks(recipe):
    result = ask("sft", recipe(hidden=16384, layers=200), "--data.completion= {answer}.")
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


@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_the_plan_of_a_recipe_and_its_run_choose_the_same(recipe, monkeypatch, command):
    """For the same device, of which little is left; and both print it."""
    from posttrain.cli import plan
    from posttrain.trainers.core import switches

    words = (recipe(hidden=64, layers=3), "--data.completion= {answer}.")
    enough = answer("plan", *words, "--trainer", command)
    for module in (plan, switches):
        monkeypatch.setattr(module, "free_memory", lambda device: int(enough["peak"] * 0.7))
    planned = answer("plan", *words, "--trainer", command)["memory"]
    assert planned["settings"]
    line = next(line for line in ask("plan", *words, "--trainer", command).output.splitlines() if line.startswith("memory: "))
    result = ask(command, *words, "--dry-run", f"--{'train' if command == 'grpo' else 'sft'}.memory_check=false")
    assert result.exit_code == 0, result.output
    assert line in result.output.splitlines()


def test_without_a_gpu_and_a_size_the_plan_says_for_which_card_it_is(monkeypatch):
    from posttrain.cli import plan

    monkeypatch.setattr(plan, "has_gpu", lambda: False)
    found = answer(*HEADLINE)["memory"]
    assert found["limit"] == 16 * 10**9
    assert "planned for 16 GB, the smallest common card that it fits" in found["assumed"][0]
    assert [card["gb"] for card in found["cards"]] == sorted({card["gb"] for card in found["cards"]})
    assert found["cards"][0]["settings"] == found["settings"]
    text = ask(*HEADLINE).output
    assert "memory: gradient checkpointing + activation offloading + one completion at once" in text
    assert "from  48 GB: gradient checkpointing;" in text
    largest = answer("plan", "--model", "qwen2.5-72b", "--context", "512")["memory"]
    assert "which it does not fit" in largest["assumed"][0]
    assert largest["fits"] is False


def test_a_gpu_that_is_found_is_what_the_plan_is_for(monkeypatch):
    from posttrain.cli import plan

    monkeypatch.setattr(plan, "has_gpu", lambda: True)
    monkeypatch.setattr(plan, "free_memory", lambda device: {"cuda": 23 * 2**30, "cpu": 2**30}[device])
    found = answer(*HEADLINE)["memory"]
    assert (found["limit"], found["assumed"], found["cards"]) == (23 * 2**30, [], [])
    assert "activation_offloading" not in found["settings"]  # the host has no room for it


def test_frozen_weights_are_planned_in_the_16_bits_of_their_checkpoint(tmp_path):
    """Beside adapters, where the run computes in that precision; weights that are trained are float32."""
    words = ("plan", "--model", "qwen2.5-0.5b", "--context", "512")
    parameters = 494_032_768
    assert answer(*words)["training"]["weights"] == parameters * 4
    assert answer(*words, "--lora-r", "8")["training"]["weights"] == parameters * 2
    assert answer(*words, "--lora-r", "8", "--dtype", "float32")["training"]["weights"] == parameters * 4
    assert answer(*words, "--lora-r", "8", "--device", "cpu")["training"]["weights"] == parameters * 4
    config = {"model_type": "qwen3", "num_hidden_layers": 2}
    sizes = []
    for dtype in ("float16", "float32", "bfloat16"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        sizes.append(answer("plan", "--model", str(tmp_path), "--context", "64", "--lora-r", "8")["training"]["weights"])
    assert sizes[0] == sizes[1] == 2 * sizes[2]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [({}, "bfloat16"), ({"init_lora_weights": "pissa"}, "float32"), ({"init_lora_weights": "olora"}, "float32"), ({"bias": "lora_only"}, "float32")],
    ids=str,
)
def test_saved_adapters_are_planned_beside_weights_of_the_dtype_that_is_loaded(tmp_path, settings, dtype):
    from types import SimpleNamespace

    from posttrain.cli.fit import weights_of
    from posttrain.cli.recipe import ModelSection
    from posttrain.models.precision import beside_adapters

    model = build_model(build_tokenizer()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(saved | settings | {"base_model_name_or_path": str(tmp_path / "base")}))
    args = SimpleNamespace(bf16=True, fp16=False, model_init_kwargs=None)
    found = weights_of(ModelSection(name=str(tmp_path / "adapters")), args)
    assert found.dtype == dtype == str(beside_adapters(str(tmp_path / "adapters"), torch.bfloat16)).removeprefix("torch.")
    args.model_init_kwargs = {"dtype": "auto"}
    assert weights_of(ModelSection(name=str(tmp_path / "adapters")), args).dtype == "bfloat16"
