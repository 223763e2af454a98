"""Training with a reward that raises 5 %, hangs 1 % and returns NaN 1 % of the time finishes, with the exact counts in the log. And resumes."""

import functools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small import many_ones

from posttrain import RewardError, Rubric
from posttrain.errors import UserError
from posttrain.rewards.loading import load_reward

HERE = Path(__file__).parent
FLAKY = HERE.parent / "rewards" / "flaky.py"
TIMEOUT = 1.0


@pytest.fixture
def flaky():
    return load_reward(f"{FLAKY}:breaks_sometimes").function


def rubrics(level, function):
    if level == "worker":
        return Rubric.from_config([{"reward": f"{FLAKY}:breaks_sometimes", "timeout": TIMEOUT, "on_error": "drop"}])
    return Rubric(functools.partial(function), timeout=TIMEOUT, on_error="drop")


@pytest.mark.parametrize("level", ["worker", "thread"])
def test_a_flaky_reward_is_survived_and_counted_exactly(make_trainer, flaky, tmp_path, level):
    trainer = make_trainer(rubrics(level, flaky), max_steps=10, per_device_train_batch_size=64, num_generations=8, max_completion_length=8)
    assert trainer.train().global_step == 10
    with sqlite3.connect(tmp_path / "run" / "run.sqlite") as store:
        completions = store.execute(
            "SELECT groups.prompt, rollouts.text, rollouts.reward, rollouts.advantage FROM rollouts JOIN groups USING (step, grp)"
        ).fetchall()
        logged = dict(store.execute("SELECT name, sum(value) FROM scalars WHERE name GLOB 'rewards/*/failed_*' GROUP BY name"))
        notes = [text for (text,) in store.execute("SELECT text FROM notes WHERE kind = 'reward'")]
    assert len(completions) == 640
    fate = flaky.__globals__["fate"]
    expected = Counter(fate(prompt + text) for prompt, text, _, _ in completions)  # told by the texts alone
    del expected["fine"]
    assert logged == {f"rewards/breaks_sometimes/failed_{kind}": count for kind, count in expected.items()}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["reward_failures"] == logged
    assert expected.keys() == {"raised", "timed_out", "not_finite"}, "the test needs one of each"
    for prompt, text, reward, advantage in completions:
        assert (reward is None) == (fate(prompt + text) != "fine")
        assert reward is not None or advantage == 0
    assert len(notes) == 1
    assert "while scoring prompt" in notes[0] or "returned nan" in notes[0]


def test_the_default_stops_training_and_notes_why(make_trainer, flaky, tmp_path):
    trainer = make_trainer(functools.partial(flaky), max_steps=10, per_device_train_batch_size=64, num_generations=8, reward_timeout=TIMEOUT)
    with pytest.raises(RewardError, match="breaks_sometimes"):
        trainer.train()
    with sqlite3.connect(tmp_path / "run" / "run.sqlite") as store:
        assert "breaks_sometimes" in store.execute("SELECT text FROM notes WHERE kind = 'reward'").fetchone()[0]


def test_the_settings_of_the_trainer_are_the_widest_policy(make_trainer):
    broken = Counter()

    def breaks(completions, **columns):
        broken["calls"] += 1
        return [float("nan")] * (len(completions) // 2) + [1.0] * (len(completions) - len(completions) // 2)

    trainer = make_trainer([breaks, many_ones], max_steps=1, reward_on_error="drop", reward_retries=2)
    trainer.train()
    assert broken["calls"] == 3
    logs = next(entry for entry in trainer.state.log_history if "rewards/breaks/retried" in entry)
    assert (logs["rewards/breaks/retried"], logs["rewards/breaks/failed_not_finite"]) == (2, 4)


@pytest.mark.parametrize("bad", [{"reward_timeout": 0}, {"reward_on_error": "ignore"}, {"reward_retries": -1}])
def test_settings_that_cannot_be_meant_are_refused(make_trainer, bad):
    with pytest.raises(UserError):
        make_trainer(**bad)


def test_a_completion_over_which_a_reward_broke_has_no_part_in_the_comparison(make_trainer):
    """Dropped rows are left out of mean and deviation, also where the KL is part of the reward."""

    def half(completions, **columns):
        return [float("nan") if index % 2 else float(index) for index in range(len(completions))]

    trainer = make_trainer([half, many_ones], max_steps=1, reward_on_error="drop", beta=0.1, kl_estimator="k1_in_reward")
    groups = trainer.collect(trainer.train_dataset[:2])
    trainer.learn_from(groups)
    rows = trainer.learn_from(groups).rows
    assert [row.advantage == 0.0 for row in rows] == [bool(index % 2) for index in range(8)]


@pytest.mark.long
def test_a_run_with_a_worker_reward_resumes_to_the_same_bits(tmp_path):
    def run(output_dir, *more):
        return subprocess.run(
            [sys.executable, str(HERE / "flaky_run.py"), str(output_dir), *more],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole).returncode == 0
    assert run(broken, "5").returncode == -signal.SIGKILL
    done = run(broken)
    assert done.returncode == 0, done.stderr[-2000:]
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (whole, broken)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    records = []
    for folder in (whole, broken):
        with sqlite3.connect(folder / "run.sqlite") as store:
            completions = store.execute("SELECT step, grp, idx, text, reward, advantage FROM rollouts ORDER BY 1, 2, 3").fetchall()
            failed = store.execute("SELECT step, name, value FROM scalars WHERE name GLOB 'rewards/*' ORDER BY 1, 2").fetchall()
        records.append((completions, failed, json.loads((folder / "summary.json").read_text())["reward_failures"]))
    assert records[0] == records[1]
    assert sum(records[0][2].values()) > 0
