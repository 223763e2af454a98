"""The recorder, as a callback of a real (tiny) transformers Trainer."""

import json
import math

import pytest
import torch
from recorded import another_writer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.errors import UserError
from posttrain.tracking.events import CompletionKey
from posttrain.tracking.reader import RunReader
from posttrain.tracking.recorder import Recorder, write_json
from posttrain.types import Completion, Group, StopReason, Task


class Line(nn.Module):
    """y = w x, for the Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x, labels):
        return {"loss": ((self.w * x - labels) ** 2).mean()}


class Play(TrainerCallback):
    """Stands in for an online trainer: two groups are collected before each step and its update looks at their tokens."""

    def __init__(self, recorder: Recorder, crash_in: int | None = None) -> None:
        self.recorder = recorder
        self.crash_in = crash_in

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step + 1
        groups = [Group(Task(n, "p"), [completion(f"{step}/{n}/{i}", float(i)) for i in range(2)]) for n in range(2)]
        self.recorder.groups(step, groups, [[-1.0, 1.0]] * 2, ["p"] * 2)
        for n in range(2):
            for i in range(2):
                key = CompletionKey(step, n, i)
                self.recorder.tokens(step, key, logps=torch.tensor([-1.0, -2.0]), ratio=torch.ones(2), entropy=[0.5, 0.5])
        if step == self.crash_in:
            self.recorder.note("crash", "the reward fell over")
            raise RuntimeError("crash")


def completion(text: str, reward: float) -> Completion:
    return Completion([1], [5, 6], [True, True], [-1.0, -2.0], [-1.0, -2.0], StopReason.STOP, text, scores={"right": reward}, reward=reward)


def trainer(tmp_path, recorder, *, steps=6, logging_steps=1, crash_in=None, **settings) -> Trainer:
    rows = [{"x": torch.tensor([float(n)]), "labels": torch.tensor([2.0 * n])} for n in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        logging_steps=logging_steps,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return Trainer(Line(), args, train_dataset=rows, eval_dataset=rows, callbacks=[recorder, Play(recorder, crash_in)])


def test_each_step_of_a_training_is_in_the_store(tmp_path):
    trainer(tmp_path, Recorder()).train()
    reader = RunReader(tmp_path)
    assert reader.steps() == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in reader.series("loss")] == [1, 2, 3, 4, 5, 6]
    for step in reader.steps():
        assert [[row.text for row in reader.completions(step, group)] for group in (0, 1)] == [[f"{step}/{n}/{i}" for i in (0, 1)] for n in (0, 1)]
        (update,) = reader.tokens(CompletionKey(step, 1, 0)).updates
        assert (update.step, update.logps, update.ratio, update.entropy, update.kl) == (step, [-1.0, -2.0], [1.0, 1.0], [0.5, 0.5], None)
    meta = reader.meta()
    assert meta["config"]["max_steps"] == 6
    assert meta["versions"]["torch"] == str(torch.__version__)


def test_steps_that_are_not_logged_keep_their_groups(tmp_path):
    trainer(tmp_path, Recorder(), logging_steps=4).train()
    reader = RunReader(tmp_path)
    assert [len(reader.groups(step)) for step in range(1, 7)] == [2] * 6
    assert [point.step for point in reader.series("loss")] == [4]


def test_a_logged_step_is_one_transaction(tmp_path):
    recorder, seen = Recorder(), []

    class Watch(TrainerCallback):
        """Between the end of the step and its log, a reader must not see half of it."""

        def on_step_end(self, args, state, control, **kwargs):
            seen.append(RunReader(tmp_path).steps())

    run = trainer(tmp_path, recorder, steps=3)
    run.add_callback(Watch())
    run.train()
    assert seen == [[], [1], [1, 2]]


def test_only_the_first_groups_of_a_step_keep_token_details(tmp_path):
    recorder = Recorder(token_groups=1)
    trainer(tmp_path, recorder, steps=1).train()
    reader = RunReader(tmp_path)
    assert len(reader.tokens(CompletionKey(1, 0, 1)).updates) == 1
    kept = reader.tokens(CompletionKey(1, 1, 1))
    assert (kept.token_ids, kept.updates) == ([5, 6], [])  # ids and the engine's log-probs are kept of all
    assert not recorder.wants_tokens(CompletionKey(1, 0, 0))  # training is over


def test_a_crash_and_a_resume_leave_no_gap_no_double_and_no_half_step(tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        trainer(tmp_path, Recorder(), crash_in=6).train()
    reader = RunReader(tmp_path)
    assert reader.steps() == [1, 2, 3, 4, 5]
    assert reader.groups(6) == []
    assert [(note.step, note.kind) for note in reader.notes()] == [(6, "crash")]
    assert not (tmp_path / "summary.json").exists()
    trainer(tmp_path, Recorder()).train(resume_from_checkpoint=True)  # from step 4
    assert reader.steps() == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in reader.series("loss")] == [1, 2, 3, 4, 5, 6]
    assert [len(reader.completions(step, 0)) for step in range(1, 7)] == [2] * 6
    assert [(note.step, note.kind) for note in reader.notes()] == [(4, "resume")]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6


def test_seconds_go_on_counting_after_a_resume(tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        trainer(tmp_path, Recorder(), crash_in=6).train()
    reader = RunReader(tmp_path)
    ((before,),) = reader._db.execute("SELECT seconds FROM steps WHERE step = 4").fetchall()
    trainer(tmp_path, Recorder()).train(resume_from_checkpoint=True)
    seconds = [value for (value,) in reader._db.execute("SELECT seconds FROM steps ORDER BY step")]
    assert seconds == sorted(seconds)
    assert json.loads((tmp_path / "summary.json").read_text())["seconds"] > before > 0


def test_a_new_run_in_the_same_directory_forgets_the_old_one(tmp_path):
    trainer(tmp_path, Recorder(), steps=6).train()
    again = trainer(tmp_path, Recorder(), steps=2)
    again.train()
    reader = RunReader(tmp_path)
    assert reader.steps() == [1, 2]
    assert reader.meta()["config"]["max_steps"] == 2
    again.train()  # as in a notebook: the same cell once more
    assert reader.steps() == [1, 2]


def test_a_second_training_leaves_the_record_of_the_first_alone(tmp_path):
    with another_writer(tmp_path):
        with pytest.raises(UserError, match="another training writes here"):
            trainer(tmp_path, Recorder(), steps=2).train()
        assert RunReader(tmp_path).steps() == [1]
        assert RunReader(tmp_path).scalar_names() == ["reward"]


def test_evaluation_is_kept_during_training_and_after_it(tmp_path):
    run = trainer(tmp_path, Recorder(), steps=4, eval_strategy="steps", eval_steps=2)
    run.evaluate()  # before training there is no run yet
    assert not (tmp_path / "run.sqlite").exists()
    run.train()
    assert [point.step for point in RunReader(tmp_path).series("eval_loss")] == [2, 4]
    run.evaluate(metric_key_prefix="exam")
    assert [point.step for point in RunReader(tmp_path).series("exam_loss")] == [4]


def test_the_summary_tells_how_the_run_ended(tmp_path):
    run = trainer(tmp_path, Recorder(), steps=4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    run.train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["max_steps"]) == (4, 4)
    assert summary["metrics"]["eval_loss"] == RunReader(tmp_path).series("eval_loss")[-1].mean
    assert summary["best_metric"] == min(point.mean for point in RunReader(tmp_path).series("eval_loss"))
    assert summary["best_checkpoint"].endswith("checkpoint-4")
    assert summary["seconds"] > 0


def test_tokens_of_services_are_not_written_down(tmp_path):
    trainer(tmp_path, Recorder(), steps=1, hub_token="hf_secret").train()
    assert "hf_secret" not in json.dumps(RunReader(tmp_path).meta())


def test_other_processes_write_nothing(tmp_path):
    recorder, state = Recorder(), TrainerState(max_steps=3, is_world_process_zero=False)
    args, control = TrainingArguments(output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True), TrainerControl()
    recorder.on_train_begin(args, state, control)
    recorder.groups(1, [Group(Task(0, "p"), [completion("x", 1.0)])], [[0.0]], ["p"])
    assert not recorder.wants_tokens(CompletionKey(1, 0, 0))
    recorder.tokens(1, CompletionKey(1, 0, 0), logps=[-1.0, -2.0])
    recorder.note("oom", "halved")
    state.global_step = 1
    recorder.on_step_end(args, state, control)
    recorder.on_log(args, state, control, logs={"loss": 1.0})
    recorder.on_train_end(args, state, control)
    assert not (tmp_path / "run" / "run.sqlite").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_what_is_collected_for_a_later_step_waits_for_it(tmp_path):
    recorder, state = Recorder(), TrainerState(max_steps=3)
    args, control = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True), TrainerControl()
    recorder.on_train_begin(args, state, control)
    recorder.groups(1, [Group(Task(0, "p"), [completion("x", 1.0)])], [[0.0]], ["p"])
    recorder.on_log(args, state, control, logs={"eval_reward": 1.0})  # an evaluation before the first step
    assert RunReader(tmp_path).groups(1) == []
    state.global_step = 1
    recorder.on_step_end(args, state, control)
    assert len(RunReader(tmp_path).groups(1)) == 1
    recorder.on_train_end(args, state, control)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"loss": math.nan, "metrics": {"kl": math.inf, "reward": 1.5}})
    assert json.loads(path.read_text()) == {"loss": None, "metrics": {"kl": None, "reward": 1.5}}
    with pytest.raises(TypeError):
        write_json(path, {"metrics": {"reward": object()}})
    assert json.loads(path.read_text())["metrics"]["reward"] == 1.5
