"""A damaged checkpoint is refused in a sentence that names the file and the checkpoint before it, before anything is loaded from it."""

import hashlib
import json
import re
import shutil
import zipfile

import pytest
import torch
from peft import LoraConfig
from small import build_model, build_tokenizer, many_ones, weights_of
from typer.testing import CliRunner

from posttrain import GRPOConfig, GRPOTrainer
from posttrain.cli.main import app
from posttrain.errors import UserError
from posttrain.trainers.core import checkpoints

ROWS = [{"prompt": f"{a}+{b}="} for a in range(5) for b in range(4)]


def trainer_in(output_dir, **settings):
    """Its checkpoints hold a pending rollout, a reference that moved and all that torch saves."""
    tokenizer = build_tokenizer()
    base = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "num_iterations": 4,
        "beta": 0.05,
        "sync_ref_model": True,
    }
    base |= {"ref_model_sync_steps": 1, "learning_rate": 1e-2, "max_steps": 4, "save_steps": 2, "use_cpu": True, "seed": 5}
    args = GRPOConfig(output_dir=str(output_dir), **base | settings)
    return GRPOTrainer(build_model(tokenizer), many_ones, args, ROWS, processing_class=tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Saved at steps 2 and 4."""
    torch.set_num_threads(1)
    output_dir = tmp_path_factory.mktemp("damaged") / "run"
    trainer_in(output_dir).train()
    return output_dir


def flipped(data, before):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "a byte flipped": flipped,
    "truncated": lambda data, before: data[:-7],
    "emptied": lambda data, before: b"",
    "deleted": lambda data, before: None,
    "taken from another checkpoint": lambda data, before: before,
}


def put(path, data):
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


def test_every_damage_to_every_file_is_refused_by_the_files_name_and_none_trains_on(run):
    newest, before = run / "checkpoint-4", run / "checkpoint-2"
    trainer = trainer_in(run, max_steps=5)
    weights = weights_of(trainer)
    refused = 0
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for damage, damaged in DAMAGES.items():
            data = damaged(whole, (before / path.name).read_bytes())
            if data == whole:  # the same file in both checkpoints: nothing was damaged
                continue
            put(path, data)
            try:
                with pytest.raises(UserError) as refusal:
                    trainer.train(resume_from_checkpoint=True)
            finally:
                put(path, whole)
            sentence = str(refusal.value)
            assert path.name in sentence, (path.name, damage, sentence)
            assert "checkpoint-2 before it is whole" in sentence, (path.name, damage)
            assert trainer.state.global_step == 0
            assert torch.equal(weights_of(trainer), weights)
            refused += 1
    assert refused >= 50
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_file_that_was_not_saved_with_it_is_refused_and_hidden_ones_are_not(run):
    stranger = run / "checkpoint-4" / "pytorch_model.bin"
    stranger.write_bytes(b"weights of somebody")
    (run / "checkpoint-4" / ".DS_Store").write_bytes(b"")
    try:
        with pytest.raises(UserError, match=r"pytorch_model.bin was not saved with this checkpoint; remove it, or put it elsewhere, and resume$"):
            trainer_in(run, max_steps=5).train(resume_from_checkpoint=True)
    finally:
        stranger.unlink()
    manifest = json.loads((run / "checkpoint-4" / "posttrain.json").read_text())
    assert ".DS_Store" not in manifest["files"]


def test_the_manifest_holds_the_sha256_of_every_other_file_and_the_version(run):
    from posttrain import __version__

    manifest = json.loads((run / "checkpoint-4" / "posttrain.json").read_text())
    files = [path for path in (run / "checkpoint-4").iterdir() if path.name != "posttrain.json" and not path.name.startswith(".")]
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == {n: f["sha256"] for n, f in manifest["files"].items()}
    assert manifest["versions"]["posttrain"] == __version__
    assert manifest["step"] == 4


def test_where_every_checkpoint_is_damaged_the_sentence_says_so(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for checkpoint in copy.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"optimizer.pt .*no earlier checkpoint there is whole"):
        trainer_in(copy, max_steps=5).train(resume_from_checkpoint=True)


def test_a_checkpoint_under_another_ones_name_is_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoint-4").rename(copy / "checkpoint-6")
    with pytest.raises(UserError, match=r"checkpoint-6: posttrain.json is that of another checkpoint, of step 4"):
        trainer_in(copy, max_steps=8).train(resume_from_checkpoint=True)


def test_going_on_from_the_checkpoint_before_takes_the_later_one_out_of_the_way(run, tmp_path):
    """Killed between, the next resume must not find the later one of the other continuation."""
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoint-4" / "model.safetensors").write_bytes(b"damaged")
    trainer_in(copy, max_steps=3).train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert checkpoints.newest(copy).name == "checkpoint-3"
    assert (copy / "abandoned-checkpoint-4" / "model.safetensors").read_bytes() == b"damaged"


def as_before_digests(checkpoint):
    """The manifest as posttrain 0.1 wrote it, with the fingerprints of that time: a sample of rows and of weights."""
    manifest = json.loads((checkpoint / "posttrain.json").read_text())
    trainer = trainer_in(checkpoint.parent)
    sampled = {name: fingerprint.sampled for name, fingerprint in trainer._start().items() if name != "rubric"}  # which came later
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in sampled.values())
    settings = {name: value for name, value in manifest["settings"].items() if name != "rubric"} | sampled
    (checkpoint / "posttrain.json").write_text(json.dumps({"step": manifest["step"], "settings": settings}, indent=1))


def test_a_checkpoint_without_digests_goes_on_and_says_that_it_could_not_be_checked(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    as_before_digests(copy / "checkpoint-4")
    trainer = trainer_in(copy, max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    assert "checkpoint-4 is of an earlier posttrain and holds no digests, so its files could not be checked" in " ".join(
        capsys.readouterr().out.split()
    )


def test_adapters_of_a_checkpoint_without_digests_are_not_compared_with_new_ones(tmp_path, capsys):
    """posttrain 0.1 sampled new adapters without a seed: no continuation could begin with the same ones."""

    def make(max_steps):
        tokenizer = build_tokenizer()
        size = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 4, "use_cpu": True, "save_steps": 2}
        args = GRPOConfig(output_dir=str(tmp_path / "run"), max_steps=max_steps, **size)
        return GRPOTrainer(build_model(tokenizer), many_ones, args, ROWS, processing_class=tokenizer, peft_config=LoraConfig())

    make(2).train()
    manifest = tmp_path / "run" / "checkpoint-2" / "posttrain.json"
    held = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"step": 2, "settings": held["settings"] | {"model_weights": "0123456789abcdef"}}))
    trainer = make(3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert "model_weights" in " ".join(capsys.readouterr().out.split())  # among what was not compared


def corrupted_archive(data):
    """One byte of a tensor in torch's archive: whatever lies before the first record's name ends is left alone."""
    at = data.index(b"/data/0") + 200
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("model.safetensors", lambda data: data[:-7]),
        ("optimizer.pt", lambda data: data[:-7]),
        ("optimizer.pt", corrupted_archive),
        ("scheduler.pt", lambda data: None),
        ("rng_state.pth", lambda data: b""),
        ("trainer_state.json", lambda data: data[:-7]),
        ("trainer_state.json", lambda data: data.replace(b'"global_step": 4', b'"global_step": 3')),
        ("state-0.json", lambda data: b""),
        ("posttrain.json", lambda data: b'{"step": 4}'),
    ],
)
def test_of_a_checkpoint_without_digests_what_cannot_be_read_is_named(run, tmp_path, name, damaged):
    copy = shutil.copytree(run, tmp_path / "run")
    as_before_digests(copy / "checkpoint-4")
    path = copy / "checkpoint-4" / name
    put(path, damaged(path.read_bytes()))
    with pytest.raises(UserError, match=re.escape(name)):
        trainer_in(copy, max_steps=5).train(resume_from_checkpoint=True)


def test_torch_archives_hold_the_checksums_that_old_checkpoints_are_checked_by(run):
    with zipfile.ZipFile(run / "checkpoint-4" / "optimizer.pt") as archive:
        assert all(record.CRC for record in archive.infolist() if record.file_size)


@pytest.mark.parametrize("command", ["sample", "export", "eval"])
@pytest.mark.parametrize("manifest", ["with its manifest", "without a manifest"])
def test_commands_that_use_a_damaged_checkpoint_name_the_file_without_a_traceback(run, tmp_path, command, manifest):
    copy = shutil.copytree(run, tmp_path / "run")
    checkpoint = copy / "checkpoint-4"
    if manifest == "without a manifest":
        (checkpoint / "posttrain.json").unlink()
    (tmp_path / "exam.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "recipe.yaml").write_text("model: {name: x}\ndata: {}\nrubric: [exact_answer]\n")
    arguments = {
        "sample": ["sample", checkpoint, "1+1="],
        "export": ["export", checkpoint, tmp_path / "out"],
        "eval": ["eval", checkpoint, "--data", tmp_path / "exam.jsonl", "--recipe", tmp_path / "recipe.yaml"],
    }[command]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        whole = (checkpoint / name).read_bytes()
        for damage in ("truncated", "emptied"):
            put(checkpoint / name, DAMAGES[damage](whole, None))
            done = CliRunner().invoke(app, [str(argument) for argument in arguments])
            assert done.exit_code in (1, 2), (name, damage, done.output, done.exception)
            assert isinstance(done.exception, SystemExit), (name, damage, repr(done.exception))
            assert (name if manifest == "with its manifest" else str(checkpoint)) in done.stderr, (name, damage, done.stderr)
        put(checkpoint / name, whole)


def test_a_damaged_best_model_is_not_loaded_in_the_end(tmp_path, run):
    trainer = trainer_in(run)
    copy = shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    (copy / "model.safetensors").write_bytes(flipped((copy / "model.safetensors").read_bytes(), None))
    trainer.state.best_model_checkpoint = str(copy)
    with pytest.raises(UserError, match=r"the best model cannot be loaded: .*model.safetensors"):
        trainer._load_best_model()
