"""Finding groups: every filter against a plain loop over all groups; searches that end; stores of earlier schemas."""

import random
import sqlite3

import pytest
from recorded import completion, details, group, record

from posttrain.tracking.browse import CLIPPED, FILTERS, Browser, Trust, Wanted
from posttrain.tracking.events import CompletionKey, RunStore, StepRecord

STEPS = [step for step in range(1, 61) if step % 7]  # some steps collect nothing


def random_groups(rng):
    made = []
    for _ in range(rng.randint(1, 3)):
        same = rng.random() < 0.3
        texts = [rng.choice(["Apple pie", "pear", "plum"]) for _ in range(3)]
        rewards = [rng.choice([0.0, 1.0, 1.0, None]) for _ in range(3)] if rng.random() < 0.7 else [1.0] * 3
        members = [
            completion(texts[0] if same else text, reward, stop=rng.choice(["stop"] * 5 + ["length"]))
            for text, reward in zip(texts, rewards, strict=True)
        ]
        made.append(group(rng.choice(["Which fruit?", "What?"]), members))
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(reader, {(step, group): (CollectedGroup, ratio of its tokens)})."""
    directory, rng, known = tmp_path_factory.mktemp("run"), random.Random(3), {}
    store = RunStore(directory / "run.sqlite")
    for step in STEPS:
        groups = random_groups(rng)
        ratios = [rng.choice([1.0, 1.0, 1.3, 0.6]) for _ in groups]
        per_token = [detail for number, one in enumerate(groups) for detail in details(step, number, one, ratios[number])]
        store.write(StepRecord(step, {}, groups, per_token))
        known |= {(step, number): (one, ratios[number]) for number, one in enumerate(groups)}
    return Browser(directory), known


def is_kept(kind, collected, ratio):
    """The filter's meaning in plain words."""
    members = collected.group.completions
    rewards = [member.reward for member in members]
    scored = {reward for reward in rewards if reward is not None}
    if kind == "truncated":
        return any(member.stop.value == "length" for member in members)
    if kind == "no signal":
        return len(scored) < 2
    if kind == "reward alarm":
        return None in rewards or (len({member.text for member in members}) == 1 and len(scored) > 1)
    return any((ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0) for advantage in collected.advantages)


@pytest.mark.parametrize("kind", [*FILTERS, CLIPPED])
def test_a_filter_keeps_what_a_loop_over_all_groups_keeps(run, kind):
    reader, known = run
    expected = [place for place, (collected, ratio) in sorted(known.items()) if is_kept(kind, collected, ratio)]
    assert 0 < len(expected) < len(known), "the test needs groups of both sorts"
    wanted = Wanted(frozenset([kind]), trust=Trust(0.8, 1.2))
    assert reader.matching(wanted, 1, 60) == expected
    found, at = [], 0
    while (place := reader.search(wanted, at, 1)).step is not None:
        found.append((place.step, place.group))
        at = place.step
    first_of_each_step = [place for number, place in enumerate(expected) if number == 0 or expected[number - 1][0] != place[0]]
    assert found == first_of_each_step
    assert (place.is_complete, place.read_to) == (True, STEPS[-1])


def test_a_search_backwards_finds_the_nearest_step_before(run):
    reader, known = run
    with_signal = {step for (step, _), (collected, _) in known.items() if is_kept("no signal", collected, 1.0)}
    for start in (60, 31, 2):
        found = reader.search(Wanted(frozenset(["no signal"])), start, -1)
        assert found.step == max((step for step in with_signal if step < start), default=None)


def test_words_are_looked_for_in_prompts_and_answers_whatever_their_case(run):
    reader, known = run
    by_hand = {place for place, (one, _) in known.items() if "APPLE" in (one.prompt + "".join(m.text + " " for m in one.group.completions)).upper()}
    assert set(reader.matching(Wanted(words="aPPle"), 1, 60)) == by_hand
    assert set(reader.matching(Wanted(words="which FRUIT"), 1, 60)) == {place for place, (one, _) in known.items() if one.prompt == "Which fruit?"}
    assert reader.matching(Wanted(words="100%"), 1, 60) == []  # no wildcard is read into it


def test_filters_and_words_hold_together(run):
    reader, known = run
    wanted = Wanted(frozenset(["truncated", "reward alarm"]), words="pear")
    by_hand = [
        place
        for place, (one, ratio) in sorted(known.items())
        if is_kept("truncated", one, ratio) and is_kept("reward alarm", one, ratio) and any("pear" in m.text for m in one.group.completions)
    ]
    assert by_hand
    assert reader.matching(wanted, 1, 60) == by_hand


def test_a_search_whose_time_is_up_says_how_far_it_read(run):
    reader, _ = run
    found = reader.search(Wanted(words="nowhere"), 0, 1, budget=0.0)
    assert (found.step, found.is_complete) == (None, False)
    assert 1 <= found.read_to < STEPS[-1]
    rest = reader.search(Wanted(words="nowhere"), found.read_to, 1)
    assert (rest.step, rest.is_complete) == (None, True)


def test_steps_without_groups_are_stepped_over(run):
    reader, _ = run
    assert reader.first_and_last() == (1, 60)
    assert (reader.neighbour(6, 1), reader.neighbour(8, -1)) == (8, 6)
    assert (reader.neighbour(60, 1), reader.neighbour(1, -1)) == (None, None)
    assert reader.nearest(30) == 30
    assert reader.nearest(28) in (27, 29)
    assert reader.nearest(1000) == 60


def test_marks_say_what_is_in_a_group(run):
    reader, known = run
    for step in STEPS[:20]:
        for mark in reader.marks(step):
            collected, ratio = known[step, mark.group]
            rewards = collected.group.rewards
            assert (mark.truncated > 0, mark.unscored) == (is_kept("truncated", collected, ratio), rewards.count(None))
            assert mark.has_signal == collected.group.has_signal
            assert mark.is_alarming == is_kept("reward alarm", collected, ratio)


# The schemas of earlier versions, as they stood.
VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE steps (step INTEGER PRIMARY KEY, at REAL NOT NULL, seconds REAL NOT NULL, token_bytes INTEGER NOT NULL);
CREATE TABLE scalars (name TEXT, step INTEGER, value REAL, flag TEXT, PRIMARY KEY (name, step)) WITHOUT ROWID;
CREATE TABLE notes (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE groups (
    step INTEGER, grp INTEGER, task_id INTEGER, prompt TEXT, size INTEGER, mean REAL, std REAL, PRIMARY KEY (step, grp)) WITHOUT ROWID;
CREATE TABLE rollouts (
    step INTEGER, grp INTEGER, idx INTEGER, reward REAL, advantage REAL, stop TEXT, policy_version INTEGER, length INTEGER, scores TEXT, text TEXT,
    PRIMARY KEY (step, grp, idx));
CREATE TABLE rollout_tokens (step INTEGER, grp INTEGER, idx INTEGER, token_ids BLOB, logprobs BLOB, PRIMARY KEY (step, grp, idx));
CREATE TABLE token_details (
    step INTEGER, grp INTEGER, idx INTEGER, updated_at INTEGER, logps BLOB, ratio BLOB, entropy BLOB, kl BLOB,
    PRIMARY KEY (step, grp, idx, updated_at));
"""
VERSION_2 = (
    VERSION_1
    + "CREATE TABLE episodes (step INTEGER, grp INTEGER, idx INTEGER, turns INTEGER, info TEXT, messages TEXT, PRIMARY KEY (step, grp, idx));"
)
ROWS = """
INSERT INTO steps VALUES (1, 5.0, 1.0, 0);
INSERT INTO scalars VALUES ('reward', 1, 0.5, NULL);
INSERT INTO groups VALUES (1, 0, 7, 'p', 1, 0.5, NULL);
INSERT INTO rollouts VALUES (1, 0, 0, 0.5, 0.0, 'stop', 0, 1, '{}', 'x');
INSERT INTO rollout_tokens VALUES (1, 0, 0, x'05000000', x'000000bf');
INSERT INTO token_details VALUES (1, 0, 0, 1, x'000000bf', x'0000', NULL, NULL);
"""


@pytest.fixture(params=[1, 2])
def old_run(request, tmp_path):
    with sqlite3.connect(tmp_path / "run.sqlite") as db:
        db.executescript({1: VERSION_1, 2: VERSION_2}[request.param] + ROWS)
        if request.param == 2:
            db.execute("INSERT INTO episodes VALUES (1, 0, 0, 2, '{}', 'null')")
        db.execute(f"PRAGMA user_version = {request.param}")
    return tmp_path


def check_old_rows(reader):
    key = CompletionKey(1, 0, 0)
    assert reader.series("reward")[0].mean == 0.5
    assert [row.text for row in reader.completions(1, 0)] == ["x"]
    (update,) = reader.tokens(key).updates
    assert (update.ratio, update.entropy, update.advantage) == ([1.0], None, None)
    assert reader.vocabulary([5]) == {}
    assert reader.matching(Wanted(frozenset([CLIPPED])), 1, 1) == []


def test_a_run_of_an_earlier_version_opens(old_run):
    reader = Browser(old_run)
    check_old_rows(reader)
    episode = reader.episode(CompletionKey(1, 0, 0))
    assert episode is None or (episode.turns, episode.runs) == (2, None)


def test_a_run_of_an_earlier_version_is_resumed_and_keeps_what_it_had(old_run):
    store = RunStore(old_run / "run.sqlite")
    answered = completion("ab", 1.0, sampled=[True, False], turns=2)
    store.write(record(2, [group("q", [answered, completion("c", 0.0)])]))
    reader = Browser(old_run)
    check_old_rows(reader)
    assert reader.vocabulary([ord("a"), ord("c"), 9]) == {ord("a"): "a", ord("c"): "c"}
    assert reader.episode(CompletionKey(2, 0, 0)).runs == [1, 1]
    store.close()
    RunStore(old_run / "run.sqlite").close()  # and once more, as the newest version


def test_who_wrote_each_token_of_an_episode_is_kept(tmp_path):
    store = RunStore(tmp_path / "run.sqlite")
    masks = {"abcde": [True, True, False, False, True], "xy": [False, True], "z": [True]}
    store.write(record(1, [group("q", [completion(text, 1.0, sampled=mask, turns=2) for text, mask in masks.items()])]))
    reader = Browser(tmp_path)
    for index, mask in enumerate(masks.values()):
        runs = reader.episode(CompletionKey(1, 0, index)).runs
        assert [number % 2 == 0 for number, length in enumerate(runs) for _ in range(length)] == mask
