"""What cannot work is refused in a sentence that names the cause and the fix, and nothing half-written is left behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from posttrain import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from posttrain.errors import RewardError, TrainingError, UserError
from posttrain.trainers.core import checkpoints, manifest
from posttrain.watch.curves import WatchedRun
from posttrain.watch.figures import status

HERE = Path(__file__).parent


def refused(make_trainer, words, **kwargs):
    with pytest.raises(UserError, match=words):
        make_trainer(**kwargs)


def test_a_missing_column_names_the_nearest_one(make_trainer):
    def right(completion, anwser):
        return 1.0

    refused(make_trainer, "right.*anwser.*Did you mean 'answer'", reward=right)


def test_an_empty_dataset(make_trainer):
    refused(make_trainer, "no rows", data=[])


def test_a_dataset_without_prompts(make_trainer):
    refused(make_trainer, "no column 'prompt'", data=[{"promt": "1+1="}])


def test_no_dataset_at_all(make_model, tokenizer, tmp_path):
    with pytest.raises(UserError, match="train_dataset is missing"):
        GRPOTrainer(make_model(), lambda completions: [0.0], GRPOConfig(output_dir=str(tmp_path), use_cpu=True), processing_class=tokenizer)


def test_fewer_prompts_than_a_rollout_takes(make_trainer, rows):
    refused(make_trainer, "1 prompts, but one rollout takes 2", data=rows[:1])


def test_a_prompt_longer_than_the_context(make_trainer, rows):
    refused(make_trainer, "row 32.*context of 64", data=[*rows, {"prompt": "1" * 60, "answer": ""}])


def test_a_model_path_that_does_not_exist(make_trainer):
    refused(make_trainer, "no model directory", model="/no/such/model")


@pytest.mark.parametrize("trainer_class", [SFTTrainer, RewardTrainer, DPOTrainer])
def test_code_that_a_tokenizer_brings_along_runs_only_when_it_is_trusted(trainer_class, tmp_path, make_model, tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = tmp_path / "made"
    make_model().save_pretrained(made)
    tokenizer.save_pretrained(made)
    (made / "own.py").write_text("from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n")
    config = json.loads((made / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (made / "tokenizer_config.json").write_text(json.dumps(config | own))
    rows = [{"text": "1+1=2"}] if trainer_class is SFTTrainer else [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]
    config_class = {SFTTrainer: SFTConfig, RewardTrainer: RewardConfig, DPOTrainer: DPOConfig}[trainer_class]
    settings = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "max_length": 16}
    for trusted in (True, False):
        trainer = trainer_class(str(made), args=config_class(**settings, trust_remote_code=trusted), train_dataset=rows)
        assert (type(trainer.tokenizer).__name__ == "OwnTokenizer") == trusted


def test_no_reward(make_trainer):
    refused(make_trainer, "reward_funcs is empty", reward=[])


def test_monitors_alone(make_trainer):
    refused(make_trainer, r"every reward has weight 0 \(lambda\)", reward=[lambda completion: 1.0], reward_weights=[0.0])


def test_what_is_not_built_is_refused_by_name(make_trainer):
    refused(make_trainer, "rollout_func", trainer_kwargs={"rollout_func": object()})


def test_a_model_that_is_loaded_already_cannot_be_packed(make_trainer):
    refused(make_trainer, "quantization_config .* loaded already", trainer_kwargs={"quantization_config": object()})


@pytest.mark.parametrize("name", ["tools", "environment_factory"])
def test_what_cannot_be_an_environment_is_refused_by_name(make_trainer, name):
    refused(make_trainer, f"{name} is .*; give a", trainer_kwargs={name: object()})


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda completions, **kwargs: [1.0], "8"),
        (lambda completions, **kwargs: [float("nan")] * len(completions), "(?i)nan|finite"),
        (lambda completions, **kwargs: 1 / 0, "division by zero"),
        (lambda completions, **kwargs: ["good"] * len(completions), "good"),
    ],
    ids=["wrong length", "NaN", "raises", "text"],
)
def test_a_broken_reward_stops_the_run_and_is_never_a_zero(make_trainer, reward, words):
    trainer = make_trainer(reward=reward)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(RewardError, match=words):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_none_means_not_scored_and_the_run_goes_on(make_trainer):
    trainer = make_trainer(reward=lambda completions, **kwargs: [None if i % 3 == 0 else float(i) for i in range(len(completions))])
    trainer.train()
    assert trainer.state.log_history[0]["unscored"] == pytest.approx(3 / 8)


def test_a_completion_that_one_reward_scores_is_scored_although_others_do_not_apply(make_trainer):
    trainer = make_trainer(reward=[lambda completion: float(len(completion)), lambda completion: None, lambda completion: None])
    trainer.train()
    assert trainer.state.log_history[0]["unscored"] == 0.0


def test_a_loss_that_is_not_finite_stops_before_the_update(make_trainer, monkeypatch):
    trainer = make_trainer()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    monkeypatch.setattr(trainer, "loss", lambda model, batch: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(TrainingError, match="loss became nan at step 1"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_update(make_trainer, monkeypatch):
    """A root at 0: its value is finite, its slope is not."""
    trainer = make_trainer()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    monkeypatch.setattr(trainer, "loss", lambda model, batch: (0 * trainer.logprobs(model, batch.stream).logps.sum()).sqrt())
    with pytest.raises(TrainingError, match="gradient became nan at step 1"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_several_gpus_without_a_launcher(make_trainer, monkeypatch):
    monkeypatch.setattr(GRPOConfig, "n_gpu", property(lambda self: 2))
    refused(make_trainer, "accelerate launch")


@pytest.mark.parametrize("settings", [{"fsdp": "full_shard"}, {"deepspeed": {"zero_optimization": {"stage": 2}}}])
def test_sharded_training_is_refused_by_name(make_trainer, settings):
    with pytest.raises((UserError, ImportError), match=f"(?i){next(iter(settings))}"):
        make_trainer(**settings)


def test_a_full_disk_at_a_checkpoint_leaves_the_last_one_whole(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    save = trainer._save_optimizer_and_scheduler

    def full(directory):
        if trainer.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(directory)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(TrainingError, match=r"checkpoint-4.*No space left.*checkpoint-2 is whole"):
        trainer.train()
    left = sorted(path.name for path in Path(trainer.args.output_dir).iterdir() if "checkpoint" in path.name)
    assert left == ["checkpoint-2"]


def test_an_incomplete_checkpoint_is_never_loaded(make_trainer, tmp_path):
    (tmp_path / "run" / "checkpoint-9").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint"):
        make_trainer().train(resume_from_checkpoint=True)


def test_a_changed_setting_or_dataset_is_refused_by_name_and_more_steps_are_not(make_trainer, rows):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(UserError, match=r"other settings \(beta: 0.0 -> 0.1\)"):
        make_trainer(beta=0.1).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="data"):
        make_trainer(data=[*rows[1:], {"prompt": "9+9=", "answer": "18"}]).train(resume_from_checkpoint=True)
    more = make_trainer(max_steps=3)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 3


def test_a_checkpoint_without_the_optimizer_is_no_place_to_go_on_from(make_trainer):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True).train()
    with pytest.raises(UserError, match="without the optimizer"):
        make_trainer(max_steps=4, save_only_model=True).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_more_processes_is_refused(make_trainer):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = checkpoints.last_checkpoint(trainer.args.output_dir)
    (saved / "state-1.json").write_text((saved / "state-0.json").read_text())  # what a second process would have left
    (saved / "posttrain.json").unlink()
    manifest.write(saved, 2, {"generation_batch_size": 999}, {})  # which counts the prompts of all of them
    with pytest.raises(UserError, match="another number of processes"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=True)


def test_checkpoints_hold_no_pickles_but_tensors(make_trainer):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = checkpoints.last_checkpoint(trainer.args.output_dir)
    names = {path.name for path in saved.iterdir()}
    assert {"model.safetensors", "trainer_state.json", "posttrain.json"} <= names
    assert "training_args.bin" not in names
    for path in saved.glob("*.p*t*"):
        if path.suffix in (".pt", ".pth") and "rng" not in path.name:
            torch.load(path, weights_only=True)


def test_ctrl_c_saves_and_raises_keyboard_interrupt(tmp_path):
    program = """
import sys, time
from small import build_model, build_tokenizer
from posttrain import GRPOConfig, GRPOTrainer
def reward(completions, **kwargs):
    print("scoring", flush=True); time.sleep(0.3)
    return [float(len(text)) for text in completions]
config = GRPOConfig(output_dir=sys.argv[1], per_device_train_batch_size=8, num_generations=4, max_completion_length=4, max_steps=500, save_steps=400, use_cpu=True)
try:
    GRPOTrainer(build_model(build_tokenizer()), reward, config, [{"prompt": "1+1="}] * 4, processing_class=build_tokenizer()).train()
except KeyboardInterrupt:
    sys.exit(130)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if "scoring" in line:
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert checkpoints.last_checkpoint(tmp_path) is not None
    run = WatchedRun("r", tmp_path)
    run.refresh()
    assert status(run).endswith("stopped")


def test_prompts_keep_their_end_where_a_length_is_given(make_trainer):
    whole, cut = make_trainer().prompt_ids, make_trainer(max_prompt_length=2).prompt_ids
    assert cut == [ids[-2:] for ids in whole]
    assert max(map(len, whole)) > 2
