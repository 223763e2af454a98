"""Memory switches that nobody sets: chosen for the memory that there is, said, kept over a resume, and absent where there is enough."""

import json

import pytest
import torch
from small import build_model, build_tokenizer, many_ones, weights_of
from transformers import TrainingArguments

from posttrain import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from posttrain.memory import plan
from posttrain.tracking.reader import RunReader
from posttrain.trainers.core import switches
from posttrain.trainers.core.config import SWITCHED_OFF, as_config

SETTINGS = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "max_steps": 3, "learning_rate": 1e-2, "seed": 3}
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(4)]


@pytest.fixture
def memory(monkeypatch):
    """Says how much memory there is, in parts of what the job needs with every switch off."""

    def has(fraction):
        needed = plan(switches.job_of(config(), switches.weights_of(build_model(build_tokenizer())), (4, 6, None))).peak
        held = sum(parameter.numel() * 4 for parameter in build_model(build_tokenizer()).parameters())  # counted by the plan, there before
        monkeypatch.setattr(switches, "free_memory", lambda device: int(needed * fraction) - held)

    return has


def config(path="unused", **settings):
    return GRPOConfig(**SETTINGS | {"output_dir": str(path), "use_cpu": True, "save_strategy": "no"} | settings)


def grpo(path, **settings):
    tokenizer = build_tokenizer()
    return GRPOTrainer(build_model(tokenizer), many_ones, config(path, **settings), ROWS, processing_class=tokenizer)


def chosen(trainer):
    return {name: getattr(trainer.args, name) for name in SWITCHED_OFF}


def test_a_small_run_on_a_cpu_switches_nothing_on_and_has_the_bits_of_a_run_with_everything_off(tmp_path, capsys):
    trainer = grpo(tmp_path / "automatic")
    assert chosen(trainer) == SWITCHED_OFF
    trainer.train()
    assert not trainer.model.is_gradient_checkpointing
    assert "memory:" not in capsys.readouterr().out
    explicit = grpo(tmp_path / "off", **SWITCHED_OFF | {"max_tokens_per_micro_batch": 4096})
    assert explicit.args.chosen == ()
    explicit.train()
    assert torch.equal(weights_of(trainer), weights_of(explicit))


def test_where_memory_is_short_the_run_has_what_the_plan_chose_and_says_so(tmp_path, memory, capsys):
    memory(0.8)
    trainer = grpo(tmp_path / "run")
    choice = trainer.args.memory
    assert choice.settings == {"gradient_checkpointing": True}
    assert chosen(trainer) == SWITCHED_OFF | choice.settings
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    assert f"memory: {choice.line()}" in " ".join(capsys.readouterr().out.split())
    run = RunReader(tmp_path / "run")
    assert [note.text for note in run.notes() if note.kind == "memory"] == [f"memory: {choice.line()}"]
    run.close()


def test_the_users_settings_are_not_touched(memory):
    args = config()
    memory(0.3)
    tokenizer = build_tokenizer()
    trainer = GRPOTrainer(build_model(tokenizer), many_ones, args, ROWS, processing_class=tokenizer)
    assert trainer.args.gradient_checkpointing is True
    assert args.gradient_checkpointing == "auto"  # another trainer may be made with them, of a larger model
    assert args.memory is None


def test_explicit_settings_win(tmp_path, memory):
    memory(0.3)
    trainer = grpo(tmp_path, gradient_checkpointing=False, max_concurrent_completions=3)
    assert (trainer.args.gradient_checkpointing, trainer.args.max_concurrent_completions, trainer.engine.max_slots) == (False, 3, 3)
    assert trainer.args.max_tokens_per_micro_batch == 10  # which nobody had set


def test_completions_at_once_reach_the_engine(tmp_path, memory):
    memory(0.3)
    trainer = grpo(tmp_path)
    assert trainer.args.max_concurrent_completions == trainer.engine.max_slots == 1


@pytest.mark.parametrize("then", [0.3, 10])
def test_a_resumed_run_has_the_choice_it_was_started_with(tmp_path, memory, capsys, then):
    """Another amount of memory on another day; what touches no bit (gradient checkpointing) may be chosen anew."""
    memory(0.55)
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    whole = grpo(tmp_path / "whole", **settings)
    first = chosen(whole)
    assert first["max_tokens_per_micro_batch"] == 10
    assert 1 < first["max_concurrent_completions"] < 8
    whole.train()
    grpo(tmp_path / "cut", **settings | {"max_steps": 1}).train()
    memory(then)
    resumed = grpo(tmp_path / "cut", **settings)
    assert chosen(resumed) != first
    capsys.readouterr()
    resumed.train(resume_from_checkpoint=True)
    kept = ("tile_rows", "max_tokens_per_micro_batch", "max_concurrent_completions")
    assert {name: chosen(resumed)[name] for name in kept} == {name: first[name] for name in kept}
    assert resumed.engine.max_slots == first["max_concurrent_completions"]
    assert resumed.args.gradient_checkpointing == (then == 0.3)
    assert "micro-batches of 10 tokens + 4 completions at once" in " ".join(capsys.readouterr().out.split())
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_an_explicit_setting_that_differs_from_the_stored_one_is_refused(tmp_path, memory):
    memory(0.55)
    settings = {"save_strategy": "steps", "save_steps": 1}
    grpo(tmp_path, **settings | {"max_steps": 1}).train()
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch: 10 -> 20"):
        grpo(tmp_path, **settings, max_tokens_per_micro_batch=20).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_micro_batch": 4096, "max_concurrent_completions": 64}], ids=["automatic", "explicit"])
def test_what_was_halved_after_running_out_of_memory_is_stored_too(tmp_path, settings):
    trainer = grpo(tmp_path, save_strategy="steps", save_steps=1, max_steps=2, **settings)
    trainer.engine.max_slots = 2  # as after a rollout that did not fit
    loss, failed = trainer.loss, []

    def once(model, batch):
        if not failed:
            failed.append(len(batch.stream))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(model, batch)

    trainer.loss = once
    trainer.train()
    stored = json.loads((tmp_path / "checkpoint-2" / "posttrain.json").read_text())["chosen"]
    assert stored == {"token_budget": failed[0] // 2, "completions_at_once": 2}
    resumed = grpo(tmp_path, save_strategy="steps", save_steps=1, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.token_budget, resumed.engine.max_slots) == (failed[0] // 2, 2)


def test_an_architecture_that_is_not_modelled_has_nothing_switched_on(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = build_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=0))
    trainer = GRPOTrainer(model, many_ones, config(tmp_path), ROWS, processing_class=tokenizer)
    assert chosen(trainer) == SWITCHED_OFF
    assert "gpt2" in trainer.args.memory


def test_a_stream_of_rows_counts_as_long_as_rows_may_be(tmp_path):
    class Rows:
        def __iter__(self):
            return iter([{"text": "1+1=2"}] * 8)

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, max_length=48, save_strategy="no")
    trainer = SFTTrainer(build_model(build_tokenizer()), args, train_dataset=Rows(), processing_class=build_tokenizer())
    assert trainer.args.memory.job.context == 48


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_both_names_of_gradient_checkpointing_are_explicit(name, value):
    from dataclasses import fields

    if name not in {field.name for field in fields(GRPOConfig)}:
        pytest.skip("this version of transformers has one name")
    args = config(**{name: value})
    assert args.gradient_checkpointing is value
    assert "gradient_checkpointing" not in args.automatic


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_a_script_may_switch_checkpointing_by_either_name_after_it_made_the_config(tmp_path, name, value):
    args = config(tmp_path, max_steps=1)
    if not hasattr(args, name):
        pytest.skip("this version of transformers has one name")
    setattr(args, name, value)
    tokenizer = build_tokenizer()
    trainer = GRPOTrainer(build_model(tokenizer), many_ones, args, ROWS, processing_class=tokenizer)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing is value
    assert trainer.args.gradient_checkpointing is value
    assert "gradient_checkpointing" not in trainer.args.chosen


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gradient_checkpointing": "some"}, "use True, False or 'auto'"),
        ({"max_concurrent_completions": "many"}, "use a number, 1 or more, or 'auto'"),
        ({"tile_rows": "few"}, "or 'auto'"),
    ],
)
def test_what_is_no_choice_is_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**settings)


@pytest.mark.parametrize(("given", "expected"), [({}, "auto"), ({"gradient_checkpointing": True}, True)])
def test_settings_of_transformers_leave_open_what_they_do_not_switch_on(tmp_path, given, expected):
    args = as_config(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given), SFTConfig)
    assert args.gradient_checkpointing == expected


def test_a_job_that_does_not_fit_says_so_and_how_much_it_needs(tmp_path, memory, capsys):
    memory(0.05)
    trainer = grpo(tmp_path, max_steps=1)
    assert not trainer.args.memory.fits
    trainer.train()
    said = " ".join(capsys.readouterr().out.split())
    assert "it does not fit: training needs about" in said or "it does not fit: sampling needs about" in said
    assert "this machine has" in said


def test_the_settings_of_one_trainer_are_chosen_anew_for_another(tmp_path, memory):
    memory(0.5)
    first = grpo(tmp_path / "first")
    assert first.args.memory.settings
    memory(10.0)
    tokenizer = build_tokenizer()
    second = GRPOTrainer(build_model(tokenizer), many_ones, first.args, ROWS, processing_class=tokenizer)
    assert (chosen(second), second.args.chosen) == (SWITCHED_OFF, first.args.chosen)
    assert first.args.memory.settings
