"""What a checkpoint holds and which ones stay are as in transformers' own Trainer, run beside: callbacks' states, uploads, rotation, the best model."""

import json
import types

import pytest
import torch
import transformers.trainer
from small import build_model, build_tokenizer, many_ones
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from posttrain import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from posttrain.errors import UserError
from posttrain.trainers.core import checkpoints, manifest

ROWS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(2) for b in range(4)]
EXAM = [{"prompt": "9+9=", "completion": "777777"}]  # gets worse as the rows are learned
SHARED = {"per_device_train_batch_size": 4, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "save_steps": 1, "use_cpu": True}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def sft(folder, *callbacks, eval_dataset=None, **settings):
    tokenizer = build_tokenizer()
    args = SFTConfig(output_dir=str(folder), **{**SHARED, "max_steps": 4} | settings)
    data = {"train_dataset": ROWS, "eval_dataset": eval_dataset}
    return SFTTrainer(build_model(tokenizer), args, processing_class=tokenizer, callbacks=list(callbacks), **data)


def plain(folder, *callbacks, **settings):
    """transformers' own."""
    tokenizer = build_tokenizer()

    def example(*ids):
        return {"input_ids": list(ids), "labels": list(ids), "attention_mask": [1] * len(ids)}

    args = TrainingArguments(str(folder), report_to="none", disable_tqdm=True, **{**SHARED, "max_steps": 4} | settings)
    data = {"train_dataset": [example(1, 2, 3, 4)] * 8, "eval_dataset": [example(9, 8, 7, 6)]}
    return Trainer(build_model(tokenizer), args, processing_class=tokenizer, callbacks=list(callbacks), **data)


class Stops(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_early_stopping_counts_on_after_a_resume(tmp_path):
    settings = {**BEST, "max_steps": 30}
    whole = sft(tmp_path / "whole", EarlyStoppingCallback(4), eval_dataset=EXAM, **settings)
    whole.train()
    end = whole.state.global_step
    assert 4 < end < 30
    sft(tmp_path / "halves", EarlyStoppingCallback(4), Stops(end - 2), eval_dataset=EXAM, **settings).train()
    resumed = sft(tmp_path / "halves", EarlyStoppingCallback(4), eval_dataset=EXAM, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == end


def test_a_callback_with_other_arguments_is_refused_and_may_begin_anew(tmp_path):
    sft(tmp_path, EarlyStoppingCallback(4), eval_dataset=EXAM, **BEST, max_steps=1).train()
    with pytest.raises(UserError, match=r"EarlyStoppingCallback was made with other arguments \(early_stopping_patience: 4 -> 9\)"):
        sft(tmp_path, EarlyStoppingCallback(9), eval_dataset=EXAM, **BEST).train(resume_from_checkpoint=True)
    anew = sft(tmp_path, EarlyStoppingCallback(9), eval_dataset=EXAM, **BEST, restore_callback_states_from_checkpoint=False, max_steps=2)
    anew.train(resume_from_checkpoint=True)
    assert anew.state.global_step == 2


def test_states_of_several_callbacks_of_a_class_are_those_of_now(tmp_path):
    """transformers appends at every save, and reads the first ones back."""
    one, two = EarlyStoppingCallback(7), EarlyStoppingCallback(8)
    trainer = sft(tmp_path, one, two, eval_dataset=EXAM, **BEST)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert [state["args"]["early_stopping_patience"] for state in saved["EarlyStoppingCallback"]] == [7, 8]
    counts = [state["attributes"]["early_stopping_patience_counter"] for state in saved["EarlyStoppingCallback"]]
    assert counts == [one.early_stopping_patience_counter, two.early_stopping_patience_counter]
    assert saved["TrainerControl"]["args"].keys() == trainer.control.state()["args"].keys()


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_as_many_checkpoints_stay_as_transformers_keeps(tmp_path, limit):
    ours = sft(tmp_path / "ours", eval_dataset=EXAM, **BEST, max_steps=5, save_total_limit=limit)
    theirs = plain(tmp_path / "theirs", **BEST, max_steps=5, save_total_limit=limit)
    for trainer in (ours, theirs):
        trainer.train()
    left = [{path.name for path in (tmp_path / name).glob("checkpoint-*")} for name in ("ours", "theirs")]
    assert len(left[0]) == len(left[1])
    assert all(f"checkpoint-{trainer.state.best_global_step}" in kept for trainer, kept in zip((ours, theirs), left, strict=True))


class Hub:
    """Takes the place of the hub's client: remembers what it was asked to upload."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, name, **kwargs):
        return types.SimpleNamespace(repo_id=name)

    def upload_folder(self, **given):
        from pathlib import Path

        files = {path.name for path in Path(given["folder_path"]).iterdir()}
        self.uploads.append((given["commit_message"], given.get("path_in_repo"), given["repo_id"], given["token"], files))
        return types.SimpleNamespace(done=lambda: True)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_uploads_while_training_are_those_that_transformers_makes(tmp_path, monkeypatch, strategy):
    uploads = {}
    for name, make in (("ours", sft), ("theirs", plain)):
        hub = Hub()
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda hub=hub: hub)
        make(tmp_path / name, push_to_hub=True, hub_model_id="me/x", hub_token="t", hub_strategy=strategy, save_steps=2).train()
        uploads[name] = hub.uploads
    assert [upload[:4] for upload in uploads["ours"]] == [upload[:4] for upload in uploads["theirs"]]
    assert all("model.safetensors" in files and "run.sqlite" not in files and "training_args.bin" not in files for *_, files in uploads["ours"])


def test_the_final_upload_holds_the_model_and_nothing_of_the_run(tmp_path, monkeypatch):
    uploads = {}
    for name, make in (("ours", sft), ("theirs", plain)):
        hub = Hub()
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda hub=hub: hub)
        trainer = make(tmp_path / name, max_steps=1, hub_model_id="me/x", hub_token="t")
        trainer.train()
        trainer.push_to_hub()
        assert trainer.args.output_dir == str(tmp_path / name)
        assert not (tmp_path / name / "pushed").exists()
        (uploads[name],) = hub.uploads
    *ours, files = uploads["ours"]
    *theirs, all_files = uploads["theirs"]
    assert ours == theirs
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files == all_files - {"training_args.bin", "checkpoint-1"}


def test_without_a_name_the_repository_is_called_as_the_run(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    trainer = sft(tmp_path / "my-run", max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    assert [upload[2] for upload in hub.uploads] == ["my-run"]


def test_a_checkpoint_holds_the_files_that_transformers_writes_but_for_pickled_arguments(tmp_path):
    names = {}
    for name, make in (("ours", sft), ("theirs", plain)):
        make(tmp_path / name, max_steps=1).train()
        names[name] = {path.name for path in (tmp_path / name / "checkpoint-1").iterdir()}
    assert names["ours"] - {"posttrain.json", "state-0.json"} == names["theirs"] - {"training_args.bin"}


def grpo(folder, **settings):
    tokenizer = build_tokenizer()
    base = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 4, "max_steps": 2, "save_steps": 1, "use_cpu": True}
    base |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    args = GRPOConfig(output_dir=str(folder), **base | settings)
    rows = [{"prompt": "1+1="}] * 4
    exam = settings.pop("exam", rows[:1])
    return GRPOTrainer(build_model(tokenizer), many_ones, args, rows, exam, processing_class=tokenizer)


def test_the_best_model_of_an_online_run_is_the_one_with_the_highest_reward(tmp_path):
    trainer = grpo(tmp_path)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("reward", True)
    trainer.train()
    rewards = {entry["step"]: entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry}
    assert rewards[trainer.state.best_global_step] == max(rewards.values()) == trainer.state.best_metric


def test_a_metric_that_no_evaluation_gives_is_refused_with_the_step_saved(tmp_path):
    with pytest.raises(UserError, match="has no loss"):
        grpo(tmp_path, metric_for_best_model="eval_loss")
    with pytest.raises(UserError, match=r"gives no such metric. Did you mean 'eval_reward'\?.*Step 1 is saved"):
        grpo(tmp_path, metric_for_best_model="rewart").train()
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-1"


def test_of_several_evaluation_data_sets_the_metric_says_which(tmp_path):
    with pytest.raises(UserError, match="'easy_loss' or 'hard_loss'"):
        sft(tmp_path, eval_dataset={"easy": EXAM, "hard": EXAM}, **BEST).train()


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path):
    for name in (".deleting-checkpoint-3", ".writing-checkpoint-4", ".deleting-model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".recipe.yaml.tmp").write_text("half")
    (tmp_path / ".of-somebody-else").write_text("stays")
    sft(tmp_path, max_steps=1).train()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [".of-somebody-else"]


def test_what_was_chosen_by_itself_stands_in_the_manifest(tmp_path):
    class Chooses(SFTTrainer):
        @property
        def chosen(self):
            return {"tile_rows": 2048}

    tokenizer = build_tokenizer()
    args = SFTConfig(output_dir=str(tmp_path), **SHARED, max_steps=1)
    Chooses(build_model(tokenizer), args, train_dataset=ROWS, processing_class=tokenizer).train()
    assert manifest.read(tmp_path / "checkpoint-1").chosen == {"tile_rows": 2048}
