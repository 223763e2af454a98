"""A group in words and as coloured tokens: its own numbers, no formula that does not give them, and nothing hidden."""

from statistics import fmean, stdev

import pytest
from recorded import completion, group, plain_groups, record, write_run

from posttrain.tracking.browse import Trust
from posttrain.tracking.events import RunStore, StepRecord
from posttrain.watch.curves import WatchedRun
from posttrain.watch.figures import table
from posttrain.watch.story import tell, trust_of
from posttrain.watch.tokens import LIMIT, MODES, pieces

REWARDS = [3.0, -1.0, 0.5, -1.0]


def story_of(directory, groups, number=0, *, meta=None, ratio=1.0):
    directory.mkdir(exist_ok=True)
    write_run(directory, 1, groups=lambda step: groups, meta=meta, ratio=ratio).close()
    run = WatchedRun("r", directory)
    run.refresh()
    return run, tell(run, run.browser, 1, run.browser.groups(1)[number])


def members(rewards=tuple(REWARDS)):
    return [completion(f"answer {place}", reward) for place, reward in enumerate(rewards)]


def text_of(story, title):
    return next(stage.text for stage in story.stages if stage.title == title)


def test_the_five_steps_are_told_in_their_order(tmp_path):
    _, story = story_of(tmp_path, [group("q", members())])
    assert [stage.title for stage in story.stages] == ["Sample", "Score", "Compare within the group", "Clipped update", "No value model"]
    assert "answered 4 times" in text_of(story, "Sample")
    assert "-1.00 to 3.00" in text_of(story, "Score")
    assert f"{fmean(REWARDS):.2f}" in text_of(story, "No value model") or f"{fmean(REWARDS):.3g}" in text_of(story, "No value model")
    assert [completion.row.reward for completion in story.completions] == [3.0, 0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("advantages", "told"),
    [
        (None, "(3.00 - 0.38) / 1.89 = +1.39"),
        ([reward - fmean(REWARDS) for reward in REWARDS], "3.00 - 0.38 = +2.62"),
        ([reward - (sum(REWARDS) - reward) / 3 for reward in REWARDS], "3.00 - (-0.50), the mean of the others, = +3.50"),
        ([7.25, 0.0, 0.0, 0.0], "+7.25, after this run's own scaling"),
    ],
)
def test_a_formula_is_shown_only_if_it_gives_the_recorded_advantage(tmp_path, advantages, told):
    assert (fmean(REWARDS), round(stdev(REWARDS), 2)) == (0.375, 1.89)
    _, story = story_of(tmp_path, [group("q", members(), advantages)])
    assert told in text_of(story, "Compare within the group")


def test_equal_rewards_are_said_to_teach_nothing(tmp_path):
    _, story = story_of(tmp_path, [group("q", members([0.5] * 4))])
    assert "every advantage is 0 and this prompt teaches nothing" in text_of(story, "Compare within the group")


def test_what_could_not_be_scored_takes_no_part_and_is_said(tmp_path):
    _, story = story_of(tmp_path, [group("q", [*members([1.0, 0.0]), completion("broken", None)])])
    assert "1 could not be scored" in text_of(story, "Score")
    assert story.completions[-1].row.reward is None
    assert table(story)[-1][-4:-2] == ["–", "+0.00"]


def test_clipped_tokens_are_counted_on_the_side_that_stops_them(tmp_path):
    run, story = story_of(tmp_path, [group("q", members(), [1.0, -1.0, 0.5, -0.5])], ratio=1.3)
    lengths = {completion.row.key.completion: completion.row.length for completion in story.completions}
    assert trust_of(run) == Trust(0.8, 1.2)
    told = text_of(story, "Clipped update")
    assert f"Ratios of {sum(lengths.values())} tokens" in told
    assert f"{lengths[0] + lengths[2]} of them were clipped" in told


@pytest.mark.parametrize("settings", [{"loss_type": "gspo"}, {"importance_sampling_level": "sequence"}])
def test_where_whole_answers_are_clipped_no_token_is_said_to_be(tmp_path, settings):
    _, story = story_of(tmp_path, [group("q", members())], meta={"config": settings}, ratio=1.3)
    told = text_of(story, "Clipped update")
    assert "An answer that as a whole" in told
    assert "were clipped" not in told


def test_one_update_a_rollout_has_no_clipping_and_that_is_said(tmp_path):
    _, story = story_of(tmp_path, [group("q", members())])
    assert "every ratio was exactly 1" in text_of(story, "Clipped update")


def test_ppo_has_a_value_model_and_its_clip_has_another_name(tmp_path):
    meta = {"method": "PPO", "config": {"cliprange": 0.1}}
    run, story = story_of(tmp_path, [group("q", members())], meta=meta)
    assert [stage.title for stage in story.stages] == ["Sample", "Score", "Compare with the value model", "Clipped update"]
    assert (trust_of(run).low, trust_of(run).high) == (0.9, 1.1)


def test_what_the_record_did_not_keep_is_said_with_the_rule(tmp_path):
    store = RunStore(tmp_path / "run.sqlite", max_token_bytes=1)
    store.write_meta({"config": {"record_tokens_of": 1}})
    store.write(record(1, plain_groups(1)))  # the cap is reached here
    store.write(StepRecord(2, {}, plain_groups(2)))
    run = WatchedRun("r", tmp_path)
    run.refresh()
    first, second = (tell(run, run.browser, step, run.browser.groups(step)[0]) for step in (1, 2))
    assert first.kept.startswith("Per-token numbers were kept")
    assert second.kept.startswith("Per-token numbers of this group were not kept (from step 1 on")
    assert "only every 50th step keeps them" in second.kept
    (piece,) = pieces(second.completions[0], "ratio", {}, Trust(0.8, 1.2))
    assert (piece.text, piece.tint) == (second.completions[0].row.text, "")


# Tokens


def shown(directory, text, mode="log-prob", *, ratio=1.0, advantages=(1.0, -1.0), **more):
    run, story = story_of(directory, [group("q", [completion(text, 1.0, **more), completion("b", 0.0)], list(advantages))], ratio=ratio)
    told = next(completion for completion in story.completions if completion.row.key.completion == 0)
    return pieces(told, mode, run.browser.vocabulary(told.tokens.token_ids), trust_of(run))


def test_pieces_are_the_tokens_and_add_up_to_the_text(tmp_path):
    text = "Say <b>hi</b> & \"bye\" 'now'\t!"
    found = shown(tmp_path, text)
    assert [piece.text for piece in found] == list(text)


def test_characters_that_hide_or_reorder_are_written_out(tmp_path):
    found = shown(tmp_path, "a\u202eb\x1bc\n")
    assert [piece.text for piece in found] == ["a", "\\u202e", "b", "\\x1b", "c", "↵\n"]


def test_a_tint_grows_with_what_it_stands_for(tmp_path):
    def strength(tint):
        return float(tint.rpartition(",")[2].rstrip(")")) if tint else 0.0

    for mode, values in {
        "log-prob": [0.0, -0.5, -2.0, -9.0],
        "entropy": [0.0, 1.0, 2.0],
        "KL": [0.0, 0.1, 0.4],
        "ratio": [1.0, 1.1, 1.29],
        "advantage": [0.0, 0.5, 1.5],
    }.items():
        strengths = [strength(MODES[mode].tint(value)) for value in values]
        assert strengths == sorted(strengths), mode
        assert strengths[0] == 0.0 < strengths[1]
    assert MODES["ratio"].tint(1.2).rpartition(",")[0] != MODES["ratio"].tint(0.8).rpartition(",")[0]  # two colours
    assert strength(MODES["ratio"].tint(1.25)) == pytest.approx(strength(MODES["ratio"].tint(1 / 1.25)), abs=0.01)


def test_titles_hold_the_numbers_and_say_what_was_clipped(tmp_path):
    found = shown(tmp_path, "abc", "ratio", ratio=1.5)
    assert [piece.title for piece in found][1] == "token 1, id 98: advantage 1, ratio 1.5, log-prob -0.1, entropy 0.7, KL 0.01, clipped"
    assert "clipped" not in shown(tmp_path / "other", "abc", "ratio", ratio=1.5, advantages=(-1.0, 1.0))[0].title


def test_what_an_environment_wrote_is_marked_and_has_no_tint(tmp_path):
    found = shown(tmp_path, "abcd", "advantage", sampled=[True, False, False, True], turns=2)
    assert [piece.is_given for piece in found] == [False, True, True, False]
    assert [bool(piece.tint) for piece in found] == [True, False, False, True]


def test_a_very_long_completion_is_cut_and_says_by_how_much(tmp_path):
    found = shown(tmp_path, "x" * (LIMIT + 30))
    assert len(found) == LIMIT + 1
    assert found[-1].text == " … 30 more tokens"
