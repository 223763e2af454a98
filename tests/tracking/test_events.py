"""The run store: whole steps or none, whatever happens; one writer; exact numbers back; lists through an index."""

import math
import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import textwrap
import time
from decimal import Decimal

import pytest
from recorded import another_writer

from posttrain.errors import TrainingError, UserError
from posttrain.tracking import events
from posttrain.tracking.events import CollectedGroup, CompletionKey, RunStore, StepRecord, TokenDetail
from posttrain.tracking.lock import is_written
from posttrain.tracking.reader import _DETAILS, _GROUPS, _NAMES, _ROLLOUTS, _SERIES, _TOKENS, RunReader
from posttrain.types import Completion, Group, StopReason, Task

# Writes steps of 5 scalars, 2 groups of 3 rollouts, and details of every rollout, as fast as it can, from the step after `first`.
WRITER = """
import sys
from posttrain.tracking.events import CollectedGroup, CompletionKey, RunStore, StepRecord, TokenDetail
from posttrain.types import Group, Completion, StopReason, Task

def record(step):
    completions = [Completion([1], [step, 2], [True, True], [-1.0, -2.0], [-1.0, -2.0], StopReason.STOP, f"{step}/{i}", reward=float(i)) for i in range(3)]
    groups = [CollectedGroup(Group(Task(n, "p"), completions), [-1.0, 0.0, 1.0], "p") for n in range(2)]
    details = [TokenDetail(CompletionKey(step, n, i), [-1.0, -2.0], [1.0, 1.0], [0.5, 0.5], None) for n in range(2) for i in range(3)]
    return StepRecord(step, {f"m{k}": float(step) for k in range(5)}, groups, details, seconds=float(step))

if __name__ == "__main__":
    store = RunStore(sys.argv[1])
    store.truncate_after(int(sys.argv[2]))
    print("ready", flush=True)
    for step in range(int(sys.argv[2]) + 1, int(sys.argv[3]) + 1):
        store.write(record(step))
"""
ROWS_PER_STEP = {"steps": 1, "scalars": 5, "groups": 2, "rollouts": 6, "rollout_tokens": 6, "token_details": 6}


def completion(text: str = "x", reward: float | None = 1.0, length: int = 2) -> Completion:
    ids, logprobs = list(range(length)), [-0.5] * length
    return Completion([1], ids, [True] * length, logprobs, logprobs, StopReason.STOP, text, scores={"right": reward}, reward=reward, policy_version=3)


def collected(completions: list[Completion], prompt: str = "p") -> CollectedGroup:
    return CollectedGroup(Group(Task(7, prompt), completions), [0.25] * len(completions), prompt)


def open_both(tmp_path, **settings):
    store = RunStore(tmp_path / "run.sqlite", **settings)
    return store, RunReader(tmp_path)


def rows_of_each_step(path) -> dict[str, dict[int, int]]:
    with sqlite3.connect(path) as db:
        return {table: dict(db.execute(f"SELECT {column}, count(*) FROM {table} GROUP BY 1")) for table, column in events.STEP_COLUMN.items()}


def test_a_killed_writer_leaves_whole_steps_and_resuming_leaves_no_gap_and_no_double(tmp_path):
    script, path = tmp_path / "writer.py", tmp_path / "run.sqlite"
    script.write_text(textwrap.dedent(WRITER))
    rng, checkpoint, written = random.Random(0), 0, 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, str(script), str(path), str(checkpoint), "1000000"], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.15 + rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        counts = rows_of_each_step(path)
        written = max(counts["steps"])
        for table, rows in ROWS_PER_STEP.items():
            assert counts[table] == dict.fromkeys(range(1, written + 1), rows), table
        checkpoint = written - 3
    subprocess.run([sys.executable, str(script), str(path), str(checkpoint), str(written + 2)], check=True, stdout=subprocess.DEVNULL)
    counts = rows_of_each_step(path)
    for table, rows in ROWS_PER_STEP.items():
        assert counts[table] == dict.fromkeys(range(1, written + 3), rows), table
    assert [point.mean for point in RunReader(path).series("m0", max_points=10**6)] == [float(step) for step in range(1, written + 3)]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    store, reader = open_both(tmp_path)
    bad = collected([completion(), completion()])
    bad.group.completions[1].reward = object()  # type: ignore[assignment]  # SQLite cannot bind it: the error comes after rows went in
    with pytest.raises(Exception):  # noqa: B017
        store.write(StepRecord(1, {"reward": 1.0}, [bad]))
    assert reader.steps() == []
    assert reader.scalar_names() == []
    store.write(StepRecord(1, {"reward": 1.0}))
    assert reader.steps() == [1]


def test_what_was_written_is_read_back(tmp_path):
    store, reader = open_both(tmp_path)
    store.write_meta({"config": {"beta": 0.04}})
    key = CompletionKey(2, 0, 1)
    store.write(StepRecord(2, {"reward": 0.5}, [collected([completion("a", 1.0), completion("b", 3.0), completion("c", None)], "2+2=")]))
    store.write(StepRecord(3, details=[TokenDetail(key, [-1.5, -12.345678], [1.0 + 2**-20, 0.5], [0.25, 7.0], None)]))
    store.note(3, "oom", "halved")
    assert reader.meta() == {"config": {"beta": 0.04}}
    (group,) = reader.groups(2)
    assert (group.task_id, group.prompt, group.size, group.mean, group.std) == (7, "2+2=", 3, 2.0, pytest.approx(2**0.5))
    rows = reader.completions(2, 0)
    assert [(row.key, row.text, row.reward, row.stop, row.length, row.policy_version) for row in rows] == [
        (CompletionKey(2, 0, 0), "a", 1.0, "stop", 2, 3),
        (CompletionKey(2, 0, 1), "b", 3.0, "stop", 2, 3),
        (CompletionKey(2, 0, 2), "c", None, "stop", 2, 3),
    ]
    assert rows[2].scores == {"right": None}
    assert rows[0].advantage == 0.25
    tokens = reader.tokens(key)
    assert (tokens.token_ids, tokens.logps) == ([0, 1], [-0.5, -0.5])
    (update,) = tokens.updates
    assert update.step == 3
    assert update.logps == [struct.unpack("<f", struct.pack("<f", value))[0] for value in (-1.5, -12.345678)]
    assert update.ratio == [1.0 + 2**-20, 0.5]  # exact, though a float16 near 1 is blind below 1e-3
    assert (update.entropy, update.kl) == ([0.25, 7.0], None)
    assert [(note.step, note.kind, note.text) for note in reader.notes()] == [(3, "oom", "halved")]


def test_details_beyond_float16_are_kept_as_its_largest(tmp_path):
    store, reader = open_both(tmp_path)
    key = CompletionKey(1, 0, 0)
    store.write(StepRecord(1, {}, [collected([completion()])], [TokenDetail(key, [0.0, 0.0], [1e9, math.nan], None, [math.inf, 0.0])]))
    (update,) = reader.tokens(key).updates
    assert update.ratio[0] == 65505.0
    assert math.isnan(update.ratio[1])
    assert update.kl == [65504.0, 0.0]


def test_scalars_that_are_not_finite_are_empty_and_flagged(tmp_path):
    store, reader = open_both(tmp_path)
    for step, value in enumerate([1.0, math.nan, -math.inf], start=1):
        store.write(StepRecord(step, {"loss": value}))
    points = reader.series("loss")
    assert [(point.step, point.mean, point.not_finite) for point in points] == [(1, 1.0, 0), (2, None, 1), (3, None, 1)]
    with sqlite3.connect(store.path) as db:
        assert db.execute("SELECT value, flag FROM scalars ORDER BY step").fetchall() == [(1.0, None), (None, "nan"), (None, "-inf")]


def test_a_long_series_keeps_its_spikes_and_its_ends(tmp_path):
    store, reader = open_both(tmp_path)
    values = [float(step % 7) for step in range(1, 501)]
    values[333] = 1000.0
    with store._transaction() as db:
        db.executemany("INSERT INTO scalars VALUES ('loss', ?, ?, NULL)", list(enumerate(values, start=1)))
    points = reader.series("loss", max_points=10)
    assert len(points) == 10
    assert [point.step for point in points] == list(range(50, 501, 50))
    for number, point in enumerate(points):
        bucket = values[50 * number : 50 * number + 50]
        assert (point.low, point.high, point.count) == (min(bucket), max(bucket), 50)
        assert point.mean == pytest.approx(sum(bucket) / 50)


def test_scalar_names_are_each_named_once(tmp_path):
    store, reader = open_both(tmp_path)
    for step in range(1, 4):
        store.write(StepRecord(step, {"reward": 1.0, "kl": 0.0, "rewards/[b]/mean": 2.0}))
    assert reader.scalar_names() == ["kl", "reward", "rewards/[b]/mean"]


def test_truncating_forgets_later_steps_in_every_table(tmp_path):
    store, reader = open_both(tmp_path)
    key = CompletionKey(2, 0, 0)
    for step in (1, 2, 3):
        details = [TokenDetail(key, [0.0, 0.0], None, None, None)] if step >= 2 else []
        store.write(StepRecord(step, {"reward": 1.0}, [collected([completion()])], details))
        store.note(step, "mark", str(step))
    store.truncate_after(2)
    assert reader.steps() == [1, 2]
    assert reader.groups(3) == []
    assert reader.completions(3, 0) == []
    assert reader.tokens(CompletionKey(3, 0, 0)) is None
    assert [update.step for update in reader.tokens(key).updates] == [2]  # step 3 updated on step 2's rollout once more
    assert [note.step for note in reader.notes()] == [1, 2]
    assert [point.step for point in reader.series("reward")] == [1, 2]


def test_past_the_size_cap_only_sparse_steps_keep_tokens_and_a_note_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "SPARSE", 10)
    store, reader = open_both(tmp_path, max_token_bytes=3000)
    for step in range(1, 31):  # 100 tokens: 800 bytes a step
        store.write(StepRecord(step, {"reward": 1.0}, [collected([completion(length=100)])]))
    kept = [step for step in range(1, 31) if reader.tokens(CompletionKey(step, 0, 0)) is not None]
    assert kept == [1, 2, 3, 4, 10, 20, 30]
    assert [len(reader.completions(step, 0)) for step in range(1, 31)] == [1] * 30  # texts and scores stay
    (note,) = reader.notes()
    assert (note.step, note.kind) == (4, "cap")
    store.close()
    store = RunStore(tmp_path / "run.sqlite", max_token_bytes=3000)  # the cap counts what earlier processes wrote
    store.write(StepRecord(31, {}, [collected([completion(length=100)])]))
    assert reader.tokens(CompletionKey(31, 0, 0)) is None
    store.truncate_after(2)  # and gives back what was forgotten
    store.write(StepRecord(3, {}, [collected([completion(length=100)])]))
    assert reader.tokens(CompletionKey(3, 0, 0)) is not None


def test_a_reader_sees_committed_steps_only_and_does_not_hold_up_the_writer(tmp_path):
    store, reader = open_both(tmp_path)
    store.write(StepRecord(1, {"reward": 1.0}))
    with store._transaction() as db:
        db.execute("INSERT INTO scalars VALUES ('reward', 2, 2.0, NULL)")
        assert len(reader.series("reward")) == 1
    assert len(reader.series("reward")) == 2
    half_read = iter(reader._db.execute("SELECT * FROM scalars"))
    next(half_read)  # a read transaction stays open
    store.write(StepRecord(3, {"reward": 3.0}))
    assert reader._db.total_changes == 0


def test_a_reader_cannot_write(tmp_path):
    _, reader = open_both(tmp_path)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._db.execute("DELETE FROM steps")


def test_what_an_environment_says_is_kept_as_text_where_json_lacks_it(tmp_path):
    store, reader = open_both(tmp_path)
    said = completion("x")
    said.turns, said.messages = 2, [{"role": "assistant", "content": "x"}, {"role": "user", "content": Decimal("1.50")}]
    store.write(StepRecord(1, groups=[collected([said])]))
    assert reader.episode(CompletionKey(1, 0, 0)).messages[1]["content"] == "1.50"


def test_hostile_text_is_kept_letter_by_letter(tmp_path):
    store, reader = open_both(tmp_path)
    text = "\x1b[2J[bold red]\x00<script>'; DROP TABLE rollouts; --\u202e\r\n"
    store.write(StepRecord(1, {}, [collected([completion(text), completion("lone \ud800")], text)]))
    assert [row.text for row in reader.completions(1, 0)] == [text, "lone ?"]
    assert reader.groups(1)[0].prompt == text


@pytest.mark.parametrize(
    ("query", "parameters"),
    [(_GROUPS, (1,)), (_ROLLOUTS, (1, 0)), (_TOKENS, (1, 0, 0)), (_DETAILS, (1, 0, 0)), (_SERIES, (10, "reward")), (_NAMES, ())],
)
def test_every_list_is_found_through_an_index(tmp_path, query, parameters):
    _, reader = open_both(tmp_path)
    plan = [row[3] for row in reader._db.execute(f"EXPLAIN QUERY PLAN {query}", parameters)]
    touched = [step for step in plan if any(table in step for table in ("scalars", "groups", "rollouts", "rollout_tokens", "token_details"))]
    assert touched
    assert all(step.startswith("SEARCH") and ("INDEX" in step or "PRIMARY KEY" in step) for step in touched), plan


def test_a_long_run_opens_quickly(tmp_path):
    store, _ = open_both(tmp_path)
    steps, groups, members = 1000, 8, 8  # a tenth of 10,000 x 64
    with store._transaction() as db:
        keys = [(step, group, index) for step in range(1, steps + 1) for group in range(groups) for index in range(members)]
        db.executemany("INSERT INTO rollouts VALUES (?, ?, ?, 1.0, 0.0, 'stop', 0, 2, '{}', 'some text of a completion')", keys)
        db.executemany("INSERT INTO rollout_tokens VALUES (?, ?, ?, zeroblob(64), zeroblob(64))", keys)
        group_rows = [(step, group) for step in range(1, steps + 1) for group in range(groups)]
        db.executemany("INSERT INTO groups VALUES (?, ?, 0, 'p', 8, 0.0, 1.0)", group_rows)
        db.executemany("INSERT INTO steps VALUES (?, 0, 0, 0)", [(step,) for step in range(1, steps + 1)])
        scalars = [(f"m{name}", step, 1.0) for name in range(30) for step in range(1, steps + 1)]
        db.executemany("INSERT INTO scalars VALUES (?, ?, ?, NULL)", scalars)
    start = time.process_time()
    reader = RunReader(tmp_path)
    assert len(reader.steps()) == steps
    assert len(reader.scalar_names()) == 30
    assert len(reader.groups(777)) == groups
    assert len(reader.completions(777, 5)) == members
    assert len(reader.series("m7", max_points=200)) == 200
    assert time.process_time() - start < 0.5


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "run.sqlite"
    path.write_text("this is not a database, it is a love letter" * 50)
    with pytest.raises(UserError, match="choose another output_dir"):
        RunStore(path)
    with pytest.raises(UserError, match="not a run store"):
        RunReader(path)
    assert path.read_text().startswith("this is not a database")


def test_a_store_of_another_version_is_refused(tmp_path):
    RunStore(tmp_path / "run.sqlite").close()
    with sqlite3.connect(tmp_path / "run.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="schema version 99"):
        RunStore(tmp_path / "run.sqlite")
    with pytest.raises(UserError, match="schema version 99"):
        RunReader(tmp_path)


def test_reading_a_directory_without_a_run_says_so(tmp_path):
    with pytest.raises(UserError, match=r"holds no run\.sqlite"):
        RunReader(tmp_path)


def test_a_full_disk_is_a_sentence_and_leaves_the_earlier_steps(tmp_path):
    store, reader = open_both(tmp_path)
    store.write(StepRecord(1, {"reward": 1.0}))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to say: the disk ends here
    with pytest.raises(TrainingError, match="full"):
        store.write(StepRecord(2, {}, [collected([completion("long " * 10_000)])]))
    assert reader.steps() == [1]


def test_one_process_at_a_time_writes_and_a_dead_one_stands_in_nobodys_way(tmp_path):
    assert not is_written(tmp_path / "run.sqlite")
    with another_writer(tmp_path) as other:
        assert is_written(tmp_path / "run.sqlite")
        with pytest.raises(UserError, match="another training writes here"):
            RunStore(tmp_path / "run.sqlite")
        assert RunReader(tmp_path).steps() == [1]  # whoever reads is not concerned
        other.kill()
        other.wait()
    assert not is_written(tmp_path / "run.sqlite")
    store = RunStore(tmp_path / "run.sqlite")
    assert is_written(tmp_path / "run.sqlite")
    store.close()
    assert not is_written(tmp_path / "run.sqlite")


def test_within_a_process_the_newest_writer_goes_on(tmp_path):
    """As where a training broke, its store still open, and is begun again."""
    older, newer = RunStore(tmp_path / "run.sqlite"), RunStore(tmp_path / "run.sqlite")
    newer.write(StepRecord(1, {"reward": 1.0}))
    older.close()
    assert is_written(tmp_path / "run.sqlite")
    newer.close()
    assert not is_written(tmp_path / "run.sqlite")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a worker that is forked")
def test_a_worker_that_outlives_its_training_holds_nothing(tmp_path):
    program = """
import os, sys, time
from posttrain.tracking.events import RunStore
store = RunStore(sys.argv[1])
worker = os.fork()
if worker == 0:
    time.sleep(60)
print(worker, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run.sqlite")], stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        assert is_written(tmp_path / "run.sqlite")
        process.kill()
        process.wait()
        try:
            os.kill(worker, 0)  # it is still there
            RunStore(tmp_path / "run.sqlite").close()
        finally:
            os.kill(worker, signal.SIGKILL)
