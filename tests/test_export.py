"""Models leave and come back: merged, as adapters, in 4 bits. What was trained, what was exported and what samples say the same."""

import contextlib
import json
import logging
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from small import build_model, build_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from posttrain import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, load_policy
from posttrain.errors import TrainingError, UserError
from posttrain.export import check_parity, export_model, push_to_hub, write_card

ROWS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(6) for b in range(3)]
PROMPTS = [row["prompt"] for row in ROWS]
LORA = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a base model, and adapters that SFT trained on it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model = build_model(tokenizer, tie_word_embeddings=True)
    model.generation_config.eos_token_id = [0, 12]
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    train(str(folder / "base"), folder / "adapter", LORA)
    return folder


def train(model, directory, peft_config=None, steps=30):
    args = SFTConfig(
        output_dir=str(directory / "run"), use_cpu=True, save_strategy="no", learning_rate=3e-2, max_steps=steps, per_device_train_batch_size=8
    )
    trainer = SFTTrainer(model, args, train_dataset=ROWS, peft_config=peft_config)
    trainer.train()
    trainer.save_model(str(directory))
    return trainer


def call(*arguments):
    from typer.testing import CliRunner

    from posttrain.cli.main import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain_greedy(directory, prompt_ids, max_new_tokens=8):
    model = AutoModelForCausalLM.from_pretrained(directory)
    out = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=max_new_tokens)
    return out[0, len(prompt_ids) :].tolist()


def test_merged_weights_in_plain_transformers_say_what_the_engine_says_of_the_trained_model(trained, tmp_path):
    export_model(str(trained / "adapter"), tmp_path / "out", dtype="float32")
    policy = load_policy(str(trained / "adapter"))
    assert isinstance(policy.model, PeftModel)
    for group in policy.sample(PROMPTS, temperature=0.0, max_new_tokens=8):
        completion = group.completions[0]
        assert plain_greedy(tmp_path / "out", completion.prompt_ids) == completion.token_ids
    base = load_policy(str(trained / "base")).generate(PROMPTS, temperature=0.0, max_new_tokens=8)
    assert base != policy.generate(PROMPTS, temperature=0.0, max_new_tokens=8)  # the adapters matter


def test_the_exported_directory_is_complete(trained, tmp_path):
    export_model(str(trained / "adapter"), tmp_path / "out")
    config, generation = (json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert generation["eos_token_id"] == [0, 12]  # every token that ends a reply
    assert config["eos_token_id"] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{% for message in messages %}{{ message.content }}{% endfor %}"
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert not any("lora" in name for name in names)
        assert "lm_head.weight" not in names  # tied: stored once
        assert weights.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16


def test_a_head_that_was_trained_apart_is_no_longer_tied(trained, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    train(str(trained / "base"), tmp_path / "adapter", config, steps=4)
    export_model(str(tmp_path / "adapter"), tmp_path / "out", dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert check_parity(str(tmp_path / "adapter"), tmp_path / "out", PROMPTS[:4]).identical == 4


def test_the_parity_report_counts_what_agrees(trained, tmp_path):
    export_model(str(trained / "adapter"), tmp_path / "out", dtype="float32")
    parity = check_parity(str(trained / "adapter"), tmp_path / "out", PROMPTS, max_new_tokens=8)
    assert (parity.prompts, parity.identical, parity.agreeing) == (len(PROMPTS), len(PROMPTS), 1.0)
    assert parity.max_logprob_difference < 1e-4


def test_another_model_does_not_pass_for_the_trained_one(trained):
    with pytest.raises(TrainingError, match="says something else than the trained one"):
        check_parity(str(trained / "adapter"), trained / "base", PROMPTS, max_new_tokens=8)


def save_base(folder, **changes):
    """A directory with a small model; `changes` are made to its generation config."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    for name, value in changes.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_the_models_own_repetition_penalty_does_not_count_against_the_export(tmp_path):
    save_base(tmp_path / "base", repetition_penalty=5.0)
    export_model(str(tmp_path / "base"), tmp_path / "out", dtype="float32")
    parity = check_parity(str(tmp_path / "base"), tmp_path / "out", PROMPTS)
    assert (parity.prompts, parity.identical) == (len(PROMPTS), len(PROMPTS))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["repetition_penalty"] == 5.0


def test_what_is_another_model_is_not_left_behind(tmp_path):
    model = save_base(tmp_path / "base")
    model.model.embed_tokens.weight.data *= 1e8  # too large for float16
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+"}')
    before = sorted(tmp_path.iterdir())
    wrong = call("export", tmp_path / "base", tmp_path / "out", "--dtype", "float16", "--prompts", tmp_path / "prompts.jsonl")
    assert (wrong.exit_code, "try dtype float32" in wrong.output) == (1, True), wrong.output
    assert sorted(tmp_path.iterdir()) == before
    right = call("export", tmp_path / "base", tmp_path / "out", "--dtype", "float32", "--prompts", tmp_path / "prompts.jsonl")
    assert right.exit_code == 0, right.output


def test_adapters_are_exported_for_peft_and_training_goes_on_from_them(trained, tmp_path):
    export_model(str(trained / "adapter"), tmp_path / "out", format="adapter")
    base = AutoModelForCausalLM.from_pretrained(trained / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "out")
    ours = load_policy(str(tmp_path / "out"))
    ids = torch.tensor([[3, 11, 4, 12]])
    assert torch.allclose(theirs(ids).logits, ours.model(input_ids=ids).logits, atol=1e-5)
    trainer = train(str(tmp_path / "out"), tmp_path / "more", steps=2)
    after = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert after
    assert all("lora" in name for name in after)
    before = dict(ours.model.named_parameters())
    assert any(not torch.equal(before[name], p) for name, p in after.items())
    assert json.loads((tmp_path / "more" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(trained / "base")


def test_the_name_of_the_base_can_be_the_one_that_others_know(trained, tmp_path):
    export_model(str(trained / "adapter"), tmp_path / "out", format="adapter", base="owner/name")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"


def test_a_base_that_nobody_else_has_is_warned_of(trained, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        export_model(str(trained / "adapter"), tmp_path / "named", format="adapter", base="owner/name")
        assert not caplog.records
        export_model(str(trained / "adapter"), tmp_path / "local", format="adapter")
    assert f"the adapters belong to {trained / 'base'}, which is on this machine only" in caplog.text
    assert "--base" in caplog.text


def test_new_adapters_on_adapters_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match="already has adapters"):
        train(str(trained / "adapter"), tmp_path, LORA)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"format": "gguf"}, "format='gguf' is not known; use one of merged, adapter"), ({"dtype": "int8"}, "dtype='int8' is not known")],
)
def test_what_is_not_built_is_refused(trained, tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        export_model(str(trained / "adapter"), tmp_path / "out", **options)


def test_a_reward_model_is_not_mistaken_for_a_policy(trained, tmp_path):
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer" / "config.json").write_text('{"architectures": ["Qwen3ForSequenceClassification"]}')
    with pytest.raises(UserError, match="holds a reward model"):
        export_model(str(tmp_path / "scorer"), tmp_path / "out")


def plain_scores(model, texts=("1+1=2", "3+4=7", "0+0=1")):
    tokenizer = build_tokenizer()
    with torch.no_grad():
        return torch.stack([model.eval()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0] for text in texts])


@pytest.fixture(scope="module")
def scorer(trained, tmp_path_factory):
    """The adapters of a reward model, and what it scores."""
    folder = tmp_path_factory.mktemp("scorer")
    args = RewardConfig(
        output_dir=str(folder / "run"), use_cpu=True, save_strategy="no", max_steps=6, per_device_train_batch_size=2, learning_rate=3e-2
    )
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 2
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = RewardTrainer(str(trained / "base"), args, train_dataset=rows, peft_config=config)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder / "adapter", plain_scores(trainer.model)


def test_adapters_of_a_reward_model_are_exported_as_transformers_classifier(scorer, tmp_path):
    adapter, scores = scorer
    export_model(str(adapter), tmp_path / "out", dtype="float32", prompts=PROMPTS[:2])
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert exported.config.num_labels == 1
    assert torch.allclose(plain_scores(exported), scores, atol=1e-5)
    export_model(str(adapter), tmp_path / "adapters", format="adapter")
    assert (tmp_path / "adapters" / "adapter_config.json").is_file()


def test_a_directory_of_adapters_scores_wherever_a_reward_model_may_stand(scorer, trained):
    from posttrain import ModelReward
    from posttrain.rewards.loading import names_model
    from posttrain.trainers.online.reward_model import with_reward_models

    adapter, scores = scorer
    assert names_model(str(adapter))
    for reward in (ModelReward(str(adapter)), *with_reward_models([str(adapter)], None, None)):
        ids = [build_tokenizer()(text)["input_ids"] for text in ("2", "7", "1")]
        given = reward(["1+1=", "3+4=", "0+0="], ["2", "7", "1"], ids)
        assert torch.allclose(torch.tensor(given), scores, atol=1e-5)
    with pytest.raises(UserError, match="without a trained score"):
        ModelReward(str(trained / "adapter"))


def test_a_reward_model_is_trained_on_from_its_adapters(scorer, trained, tmp_path):
    adapter, scores = scorer
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 2
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2)
    trainer = RewardTrainer(str(adapter), args, train_dataset=rows)
    assert torch.allclose(plain_scores(trainer.model), scores, atol=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all("lora_" in name or "score" in name for name in moved)
    from_policy = RewardTrainer(str(trained / "adapter"), args, train_dataset=rows)  # a new head on the policy with its adapters folded in
    assert not any("lora_" in name for name, _ in from_policy.model.named_parameters())
    with pytest.raises(UserError, match="holds adapters already"):
        RewardTrainer(str(trained / "adapter"), args, train_dataset=rows, peft_config=LORA)


def test_nothing_is_overwritten_and_adapters_must_be_there(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already and not empty"):
        export_model(str(trained / "adapter"), tmp_path)
    with pytest.raises(UserError, match="holds no adapters"):
        export_model(str(trained / "base"), tmp_path / "out", format="adapter")


def test_the_card_says_where_the_model_comes_from(trained, tmp_path):
    export_model(str(trained / "adapter"), tmp_path / "out", format="adapter", base="owner/name")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: {name: owner/name}")
    write_card(tmp_path / "out", source=str(trained / "adapter"), run=run, parity=None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: owner/name" in card
    assert "model:\n  name: owner/name" in card


RECIPE = """
model: {name: /home/someone/models/base, dtype: null}
data: {train: [{path: /home/someone/rows.jsonl, weight: 2}, squad], prompt: "/no_think {question}", system: /think}
rubric: ["/home/someone/my_rewards.py:is_right", {reward: /home/someone/judge/model, weight: 2}, gsm8k]
env: {name: null, tools: []}
train: {output_dir: /home/someone/runs/x, hub_token: hf_abc, learning_rate: 1.0e-06}
sft: {eos_token: <|im_end|>}
dpo: {}
"""
SUMMARY = {"steps": 7, "metrics": {"mean_token": 0.5}, "best_checkpoint": "/home/someone/runs/x/checkpoint-3"}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "run" / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path / "run"


def card_of(out, source, run):
    out.mkdir()
    write_card(out, source=str(source), run=run, parity=None)
    return (out / "README.md").read_text()


def test_a_card_holds_no_paths_and_no_secrets(run, tmp_path):
    card = card_of(tmp_path / "out", run / "model", run)
    assert "someone" not in card
    assert "hf_abc" not in card
    assert yaml.safe_load(card.partition("```yaml")[2].partition("```")[0]) == {
        "model": {"name": "base", "dtype": None},
        "data": {"train": [{"path": "rows.jsonl", "weight": 2}, "squad"], "prompt": "/no_think {question}", "system": "/think"},
        "rubric": ["my_rewards.py:is_right", {"reward": "model", "weight": 2}, "gsm8k"],
        "train": {"output_dir": "x", "hub_token": None, "learning_rate": 1e-6},
        "sft": {"eos_token": "<|im_end|>"},
    }
    assert json.loads(card.partition("```json")[2].partition("```")[0]) == {"steps": 7, "metrics": {"mean_token": 0.5}}


@pytest.mark.parametrize(("step", "is_last"), [(7, True), (5, False)])
def test_a_checkpoint_has_the_figures_of_its_own_step_or_none(run, tmp_path, step, is_last):
    checkpoint = run / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "posttrain.json").write_text(json.dumps({"step": step}))
    assert ("## Last step" in card_of(tmp_path / "out", checkpoint, run)) == is_last


def test_a_hub_that_cannot_be_reached_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="could not push to owner/name"):
        push_to_hub(tmp_path, "owner/name")


def test_four_bits_train_adapters_and_are_exported_dequantised(trained, tmp_path):
    """On a CPU too. The adapters learned beside rounded weights, so it is those that are merged."""
    pytest.importorskip("bitsandbytes")
    policy = load_policy(str(trained / "base"), lora=LORA, load_in_4bit=True)
    assert "Linear4bit" in str(policy.model)
    trainer = train(policy.model, tmp_path / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.3
    export_model(str(tmp_path / "adapter"), tmp_path / "out", dtype="float32", load_in_4bit=True)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    parity = check_parity(str(tmp_path / "adapter"), tmp_path / "out", PROMPTS, max_new_tokens=8, load_in_4bit=True)
    assert parity.agreeing > 0.95


def test_commands_load_what_the_adapters_of_a_run_were_trained_beside(trained, tmp_path):
    """Of the run, and of a checkpoint in it. The base without them only where it is the run's own start."""
    pytest.importorskip("bitsandbytes")
    from posttrain.cli.evaluations import _load
    from posttrain.cli.recipe import read_recipe
    from posttrain.models.load import is_quantised

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {trained}/base, load_in_4bit: true, lora: {{r: 2}}}}\ndata: {{train: rows.jsonl}}\n"
        f"sft: {{output_dir: {tmp_path}/run, max_steps: 2, save_steps: 1, learning_rate: 1.0e-2, use_cpu: true}}\n"
    )
    assert call("sft", tmp_path / "recipe.yaml").exit_code == 0
    checkpoint = tmp_path / "run" / "checkpoint-1"
    for source in (tmp_path / "run" / "model", checkpoint):
        assert is_quantised(_load(str(source), None))
    (tmp_path / "best").symlink_to(checkpoint)
    assert is_quantised(_load(str(tmp_path / "best"), None))
    recipe = read_recipe(str(tmp_path / "run" / "recipe.yaml"))
    assert is_quantised(_load(str(trained / "base"), recipe))
    save_base(tmp_path / "other")
    assert not is_quantised(_load(str(tmp_path / "other"), recipe))

    exported = call("export", checkpoint, tmp_path / "out", "--dtype", "float32")
    assert exported.exit_code == 0, exported.output
    export_model(str(checkpoint), tmp_path / "expected", dtype="float32", load_in_4bit=True)
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "out"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert call("export", tmp_path / "run", tmp_path / "adapters", "--format", "adapter").exit_code == 0


def test_a_run_is_loaded_as_the_trainer_that_made_it_was_told(tmp_path):
    """Other sections of its recipe say nothing about it; files of other programs that are called recipe.yaml neither."""
    from posttrain.cli.build import loading
    from posttrain.tracking.events import RunStore

    recipe = {"model": {"name": "org/base"}, "data": {"train": "x"}, "sft": {"model_init_kwargs": {"revision": "of-sft"}}}
    recipe["train"] = {"model_init_kwargs": {"revision": "of-grpo"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("model", "merged"):
        (tmp_path / name).mkdir()
    for method in ("GRPO", "SFT"):
        with contextlib.closing(RunStore(tmp_path / "run.sqlite")) as store:
            store.write_meta({"method": method})
        assert {loading(str(tmp_path / name))["revision"] for name in ("model", "merged")} == {f"of-{method.lower()}"}
    (tmp_path / "recipe.yaml").write_text("default_stage: {default_modifiers: {}}")
    assert loading(str(tmp_path / "model")) == {}


def test_an_export_does_not_take_the_place_where_you_are(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is where you are"):
        export_model(str(trained / "base"), ".")
    assert tmp_path.is_dir()


def test_weights_that_would_be_unpickled_are_refused(trained):
    from posttrain.models.load import load_model

    with pytest.raises(UserError, match="safetensors only"):
        load_model(str(trained / "base"), use_safetensors=False)


def test_a_policy_takes_prompts_of_both_kinds_and_repeats_itself_with_a_seed(trained):
    policy = load_policy(str(trained / "base"))
    chat = [{"role": "user", "content": "1+1="}]
    assert policy.generate([chat, "1+1="], temperature=0.0, max_new_tokens=4) == [policy.generate(chat, temperature=0.0, max_new_tokens=4)[0]] * 2
    assert policy.generate("1+1=", seed=1, max_new_tokens=9) == policy.generate("1+1=", seed=1, max_new_tokens=9)
    groups = policy.sample(["1+", "2+"], n=3, max_new_tokens=4)
    assert [len(group.completions) for group in groups] == [3, 3]
    with pytest.raises(UserError, match="there are no prompts"):
        policy.generate([])


def test_the_command_exports_compares_and_writes_a_card(trained, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS[:3]))
    result = call("export", trained / "adapter", tmp_path / "out", "--dtype", "float32", "--prompts", tmp_path / "prompts.jsonl")
    assert result.exit_code == 0, result.output
    assert "3 of 3 greedy completions identical, 100.0% of" in result.output
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["identical"] == 3
    assert "Asked greedily: 3 of 3" in (tmp_path / "out" / "README.md").read_text()
    again = call("export", trained / "adapter", tmp_path / "out")
    assert again.exit_code == 2
    assert "is there already and not empty" in again.stderr


def test_adapters_of_a_checkpoint_leave_without_what_the_run_was_doing(trained, tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(trained / "adapter", checkpoint, ignore=shutil.ignore_patterns("run"))
    for name in ("state-0.json", "posttrain.json", "trainer_state.json", "reference.safetensors", "value.safetensors"):
        (checkpoint / name).write_text('{"rollout": "somebody said something"}')
    export_model(str(checkpoint), tmp_path / "out", format="adapter")
    exported = {path.name for path in (tmp_path / "out").iterdir()}
    assert exported <= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= exported
