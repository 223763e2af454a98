"""Curves in bounded memory: what they show is what was logged, while a run grows, is resumed, or is begun anew."""

import math
import random
import sqlite3

import pytest
from recorded import CONFIG, record, write_run

from posttrain.tracking.events import RunStore, StepRecord
from posttrain.tracking.reader import Point
from posttrain.watch import curves
from posttrain.watch.curves import WatchedRun, merged
from posttrain.watch.figures import status


def no_groups(step):
    return []


def check_curve(points, values):
    """Points are means, least and most of the consecutive values that they stand for. `values`: step -> value."""
    steps, at = sorted(values), 0
    for point in points:
        part = [values[step] for step in steps[at : at + point.count]]
        at += point.count
        assert steps[at - 1] == point.step
        assert point.mean == pytest.approx(sum(part) / len(part))
        assert (point.low, point.high) == (min(part), max(part))
    assert at == len(steps)


def test_a_growing_curve_stays_short_and_stays_true(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "POINTS", 8)
    rng, values = random.Random(0), {}
    store, run = RunStore(tmp_path / "run.sqlite"), WatchedRun("r", tmp_path)
    for step in range(1, 101):
        if step % 3 == 0:
            continue
        values[step] = 1000.0 if step == 50 else rng.random()
        store.write(StepRecord(step, {"reward": values[step]}))
        if step > 20 and rng.random() < 0.4:  # first a long look, then many short ones
            run.refresh()
            check_curve(run.curve("reward"), {known: value for known, value in values.items() if known <= step})
            assert len(run.curve("reward")) <= 16
    run.refresh()
    check_curve(run.curve("reward"), values)
    assert max(point.high for point in run.curve("reward")) == 1000.0


def test_nothing_is_read_twice_and_nothing_new_is_nothing(tmp_path):
    store, run = RunStore(tmp_path / "run.sqlite"), WatchedRun("r", tmp_path)
    store.write(StepRecord(1, {"reward": 1.0}))
    assert run.refresh()
    assert not run.refresh()
    store.write(StepRecord(2, {"reward": 2.0, "late": 5.0}))
    assert run.refresh()
    assert [point.mean for point in run.curve("reward")] == [1.0, 2.0]
    assert [point.mean for point in run.curve("late")] == [5.0]
    assert run.step == 2


def test_values_that_are_not_finite_are_counted_and_weigh_nothing():
    points = [Point(1, 2.0, 2.0, 2.0, 1, 0), Point(2, None, None, None, 1, 1), Point(5, 5.0, 4.0, 6.0, 3, 1)]
    whole = merged(points)
    assert (whole.step, whole.low, whole.high, whole.count, whole.not_finite) == (5, 2.0, 6.0, 5, 2)
    assert whole.mean == pytest.approx((2.0 + 2 * 5.0) / 3)
    assert merged([points[1], points[1]]).mean is None


def test_a_run_that_has_not_begun_appears_when_it_begins(tmp_path):
    directory = tmp_path / "later"
    run = WatchedRun("r", directory)
    assert not run.refresh()
    assert run.reader is None
    directory.mkdir()
    assert not run.refresh()
    sqlite3.connect(directory / "run.sqlite").execute("PRAGMA journal_mode=WAL")  # the file is there, its first transaction is not
    assert not run.refresh()
    assert run.reader is None
    store = write_run(directory, 3, groups=no_groups)
    assert run.refresh()
    assert (run.step, run.method, run.max_steps, run.has_ended) == (3, "GRPO", 100, False)
    store.close()


def test_a_run_that_ended_before_its_last_step_was_stopped(tmp_path):
    store, run = write_run(tmp_path, 40, groups=no_groups), WatchedRun("r", tmp_path)
    run.refresh()
    assert status(run).endswith(" s ago")
    (tmp_path / "summary.json").write_text("{}")
    run.refresh()
    assert status(run) == "GRPO · step 40 of 100 · 1:12 · stopped"
    for step in range(41, 101):
        store.write(record(step, []))
    run.refresh()
    assert status(run).endswith("step 100 of 100 · 3:00 · finished")
    (tmp_path / "summary.json").unlink()  # as a training does when it begins
    run.refresh()
    assert status(run).endswith(" s ago")
    store.close()


def test_a_run_that_is_resumed_from_an_earlier_step_forgets_what_it_took_back(tmp_path):
    store, run = write_run(tmp_path, 10, groups=no_groups), WatchedRun("r", tmp_path)
    run.refresh()
    store.truncate_after(4)
    store.write_meta({"started_at": 2.0})
    store.write(StepRecord(5, {"reward": 77.0}))
    run.refresh()
    assert [point.step for point in run.curve("reward")] == [1, 2, 3, 4, 5]
    assert run.curve("reward")[-1].mean == 77.0


def test_a_run_that_is_begun_anew_in_its_directory_is_followed(tmp_path):
    store, run = write_run(tmp_path, 10, groups=no_groups), WatchedRun("r", tmp_path)
    run.refresh()
    store.clear()
    store.write_meta({"config": CONFIG, "started_at": 9.0})
    for step in range(1, 13):  # further than before, between two looks
        store.write(StepRecord(step, {"other": float(step)}))
    run.refresh()
    assert run.names == ["other"]
    store.close()
    for path in tmp_path.glob("run.sqlite*"):  # --overwrite
        path.unlink()
    store = RunStore(tmp_path / "run.sqlite")
    store.write(StepRecord(1, {"third": 1.0}))
    assert run.refresh()
    assert (run.names, run.step) == (["third"], 1)


def test_old_runs_tell_their_method_by_their_settings(tmp_path):
    store = RunStore(tmp_path / "run.sqlite")
    store.write_meta({"config": {"num_ppo_epochs": 4, "max_steps": 7}})
    store.write(record(1, []))
    run = WatchedRun("r", tmp_path)
    run.refresh()
    assert (run.method, run.max_steps) == ("PPO", 7)
    assert math.isclose(run.last("reward"), -0.96)
