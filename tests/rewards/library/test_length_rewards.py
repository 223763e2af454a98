"""Length, repetition, language."""

import math

import pytest

from posttrain.errors import UserError
from posttrain.rewards.library.language import language
from posttrain.rewards.library.length import brevity, cosine_length, soft_overlong
from posttrain.rewards.library.repetition import repetition


def tokens(count):
    return list(range(count))


@pytest.mark.parametrize(("length", "score"), [(0, 0.0), (75, 0.0), (76, -0.04), (80, -0.2), (87, -0.48), (100, -1.0), (101, -1.0), (5000, -1.0)])
def test_soft_overlong_falls_over_the_cache(length, score):
    assert soft_overlong(max_tokens=100, cache=25)(completion_ids=tokens(length), completion="x") == pytest.approx(score)


@pytest.mark.parametrize(("length", "score"), [(1, 1.0), (10, 1.0), (15, 0.5), (20, 0.0), (999, 0.0)])
def test_brevity_falls_from_target_to_limit(length, score):
    assert brevity(target=10, limit=20)(completion_ids=tokens(length), completion="x") == pytest.approx(score)


def test_silence_is_not_brevity():
    assert brevity()(completion_ids=[], completion=" \n") == 0.0


def test_cosine_length_prefers_short_right_and_long_wrong_answers():
    score = cosine_length(max_tokens=100)

    def at(length, text):
        return score(completion=text, completion_ids=tokens(length), answer="4")

    assert [at(n, "4") for n in (0, 50, 100, 300)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert [at(n, "5") for n in (0, 50, 100, 300)] == pytest.approx([-1.0, -0.75, -0.5, -0.5])
    assert at(25, "4") == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 4)))
    assert score(completion="4", completion_ids=[1], answer=None) is None
    assert score.range == (-1.0, 1.0)


def test_cosine_length_takes_another_verdict():
    score = cosine_length(max_tokens=10, verdict=lambda completion, answer: "yes" in completion)
    assert score(completion="yes", completion_ids=[], answer=None) == 1.0
    assert score(completion="no", completion_ids=[], answer=None) == -1.0


@pytest.mark.parametrize(
    ("token_ids", "score"),
    [([], 0.0), ([1, 2], 0.0), ([1, 2, 3], 0.0), ([1] * 6, -0.75), ([1] * 100, -97 / 98), ([1, 2, 3, 1, 2, 3], -0.25), (list(range(50)), 0.0)],
)
def test_repetition_is_the_fraction_of_trigrams_said_before(token_ids, score):
    assert repetition()(completion="x", completion_ids=token_ids) == pytest.approx(score)


def test_repetition_agrees_with_a_plain_count():
    import random

    rng = random.Random(0)
    for _ in range(200):
        ids, n = [rng.randrange(3) for _ in range(rng.randrange(12))], rng.randrange(1, 4)
        seen, repeats, total = [], 0, 0
        for start in range(len(ids) - n + 1):
            total += 1
            repeats += ids[start : start + n] in seen
            seen.append(ids[start : start + n])
        assert repetition(n, -2.0)(completion="x", completion_ids=ids) == pytest.approx(-2.0 * repeats / total if total else 0.0)


@pytest.mark.parametrize(
    ("code", "text", "score"),
    [
        ("en", "Two plus two is four.", 1.0),
        ("en", "Two плюс two 等于 four", 0.6),
        ("en", "naïve café", 1.0),
        ("en", "2 + 2 = 4", 1.0),
        ("en", "", 1.0),
        ("en", "the angle α is π", 1.0),
        ("en", "pаy", 0.0),
        ("zh", "答案是四", 1.0),
        ("ja", "答えはヨンです", 1.0),
        ("ru", "два and два", 2 / 3),
    ],
)
def test_language_is_the_fraction_of_words_in_its_script(code, text, score):
    assert language(code)(text) == pytest.approx(score)


@pytest.mark.parametrize(
    "maker",
    [
        lambda: soft_overlong(10, 11),
        lambda: soft_overlong(10, 0),
        lambda: brevity(10, 10),
        lambda: cosine_length(0),
        lambda: cosine_length(right=(1.0, 0.5)),
        lambda: cosine_length(verdict="right_number"),
        lambda: repetition(0),
        lambda: repetition(max_penalty=0.5),
        lambda: language("xx"),
    ],
)
def test_settings_that_cannot_work_are_refused(maker):
    with pytest.raises(UserError):
        maker()
