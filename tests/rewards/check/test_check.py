"""The checks of rewards: sound rewards pass, and each known weakness is found by the check that is named after it."""

import random
import re
import time

import pytest

from posttrain.errors import UserError
from posttrain.rewards import Rubric, reward, verifier
from posttrain.rewards.check import CHECKS, check_reward
from posttrain.rewards.check.texts import HOSTILE, SAMPLES
from posttrain.rewards.library.arithmetic import last_number


def failed(*rewards, **settings):
    return check_reward(Rubric(*rewards), **settings).failed


@pytest.mark.parametrize("preset", ["arithmetic", "gsm8k", "deepseek-r1", "email", "qwen3-proximity"])
def test_presets_pass(preset):
    report = check_reward(Rubric(preset))
    assert report.failed == []
    assert [finding.name for finding in report.findings] == list(CHECKS)


@pytest.mark.parametrize("name", ["exact_answer", "numeric_answer", "proximity", "cosine_length", "right_number", "correctness"])
def test_rewards_that_read_the_answer_pass(name):
    assert failed(name) == []


@pytest.mark.parametrize("name", ["soft_format", "strict_format"])
def test_the_popular_formats_of_gsm8k_are_found_and_the_repaired_ones_pass(name):
    popular = Rubric.from_config([{"reward": name, "legacy": True}])
    assert "reasoning in lines" in check_reward(popular).failed
    assert failed(name) == []


def test_the_popular_rubric_of_gsm8k_cannot_be_earned_in_full():
    report = check_reward(Rubric.from_config([{"reward": "gsm8k", "legacy": True}]))
    assert report.failed == ["gold answers", "reasoning in lines", "last line break"]
    assert "soft_format 0 of 0.5" in report.findings[0].detail


def soft_format_reward_func(completions, **kwargs):
    """Written against conversations, as the popular notebooks do."""
    return [0.5 if re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", c[0]["content"]) else 0.0 for c in completions]


def test_functions_that_read_conversations_are_given_conversations():
    assert "reasoning in lines" in failed(soft_format_reward_func, patience=1.0)


def test_the_form_is_the_one_in_which_gold_answers_earn_most():
    assert check_reward(Rubric("gsm8k")).form.startswith("<reasoning>\n")
    assert check_reward(Rubric("gsm8k"), form="<answer>{answer}</answer>").failed[0] == "gold answers"


def says(completion, answer):
    return float(completion.rpartition("\n")[2] == answer)


def contains(completion, answer):
    return float(answer in completion)


def length_of_match(completion, answer):
    return len(answer) / len(completion) if answer in completion else 0.0


def error_in_floats(completion, answer):
    """Any error that is not above the limit is fine, and nan is never above."""
    try:
        return 0.0 if abs(float(completion) - float(answer)) > 1e-9 else 1.0
    except ValueError:
        return 0.0


def generous(completion, answer):
    """Gives a third to every number that it cannot compare."""
    try:
        return 1 / 3 if abs(float(completion)) == float("inf") else float(float(completion) == float(answer))
    except ValueError:
        return 0.0


def any_number_is_right(completion, answer):
    return float(answer in re.findall(r"-?\d+", completion))


def judged_by_words(completion, answer):
    return 1.0 if says(completion, answer) or "correct" in completion else 0.0


def long_is_right(completion, answer):
    return 1.0 if says(completion, answer) or len(completion) > 1000 else 0.0


def empty_is_right(completion, answer):
    return 1.0 if says(completion, answer) or not completion else 0.0


def prompt_is_right(completion, prompt, answer):
    return 1.0 if says(completion, answer) or prompt in completion else 0.0


def four_is_right(completion, answer):
    return 1.0 if says(completion, answer) or completion == "42" else 0.0


def all_tags_are_read(completion, answer):
    return float(answer in re.findall("<answer>([^<]*)</answer>", completion))


def form_is_enough(completion, answer):
    inside = re.fullmatch("<answer>(.*?)</answer>", completion)
    return 0.0 if inside is None else 1.0 if inside[1] in ("", answer) else 0.2


def reads_the_reasoning(completion, answer):
    return float(completion.startswith("<think>") and re.search(rf"(?<![\w-]){re.escape(answer)}(?!\w)", completion) is not None)


def raises_on_words(completion, answer):
    return float(float(completion) == float(answer))


def nan_on_words(completion, answer):
    return 1.0 if says(completion, answer) else float("nan") if completion == "Solution" else 0.0


def noisy(completion, answer):
    return says(completion, answer) - random.random() / 10


def relative_to_the_batch(completions, answer, **kwargs):
    right = [float(says(text, gold)) for text, gold in zip(completions, answer, strict=True)]
    return [score - sum(right) / len(right) for score in right]


def first_of_the_batch(completions, answer, **kwargs):
    return [float(says(text, gold)) + (index == 0) / 2 for index, (text, gold) in enumerate(zip(completions, answer, strict=True))]


def special_token_is_right(completion, answer):
    return 1.0 if says(completion, answer) or "<|im_end|>" in completion else 0.0


def slow(completion, answer):
    if len(completion) == 100_000 and completion.startswith("a"):
        time.sleep(0.6)
    return float(says(completion, answer))


def runs_away(completion, answer):
    re.match(r"(a|a)*$", completion)
    return float(says(completion, answer))


def never_right(completion, answer):
    return 0.0 if completion else -1.0


def last_number_is_big(completion, answer):
    number = last_number(completion[:10_000])
    return 1.0 if says(completion, answer) or (number is not None and abs(number) > 10**50) else 0.0


def anything_goes(completion, answer):
    return 1.0 if completion else 0.0


@pytest.mark.parametrize(
    ("function", "check"),
    [
        (anything_goes, "inf and nan"),
        (contains, "substrings"),
        (contains, "list of all answers"),
        (contains, "two answers"),
        (length_of_match, "substrings"),
        (error_in_floats, "inf and nan"),
        (generous, "inf and nan"),
        (any_number_is_right, "list of all answers"),
        (judged_by_words, "judge injection"),
        (long_is_right, "wrong answers"),
        (empty_is_right, "constant answers"),
        (prompt_is_right, "echo of the prompt"),
        (four_is_right, "constant answers"),
        (all_tags_are_read, "list of all answers"),
        (form_is_enough, "form without content"),
        (reads_the_reasoning, "answer in the reasoning"),
        (raises_on_words, "exceptions"),
        (nan_on_words, "exceptions"),
        (noisy, "the same twice"),
        (relative_to_the_batch, "order and company"),
        (first_of_the_batch, "order and company"),
        (special_token_is_right, "injected tags"),
        (last_number_is_big, "huge numbers"),
    ],
)
def test_a_weakness_is_found_by_its_check(function, check):
    assert check in failed(function, rows=list(SAMPLES[0][:4]), patience=3.0)


def test_slowness_is_found(monkeypatch):
    monkeypatch.setattr("posttrain.rewards.check.checks.SLOW", 0.5)
    assert "any text, quickly" in failed(slow, rows=list(SAMPLES[0][:4]), patience=3.0)


def test_a_sound_function_has_none_of_them():
    assert failed(says) == []


def test_a_call_that_never_ends_is_given_up():
    report = check_reward(Rubric(runs_away), patience=0.5)
    assert "exceptions" in report.failed
    assert "no answer after 0.5 s" in report.findings[-1].detail


def test_a_verifier_that_nothing_satisfies_fails():
    assert failed(verifier(lambda completion, answer: False)) == ["gold answers", "wrong answers"]


def test_the_maximum_is_the_declared_one():
    half = reward(range=(0.0, 1.0))(lambda completion, answer: 0.5 * says(completion, answer))
    assert failed(half) == ["gold answers"]
    assert failed(half.function) == []


def test_gold_answers_that_cannot_be_scored_fail():
    report = check_reward(Rubric(lambda completion, answer: None if answer == "42" else float(says(completion, answer))))
    assert "could not be scored" in report.findings[0].detail
    assert "gold answers" in report.failed


def test_rewards_of_the_form_alone_are_told_from_those_of_the_answer():
    report = check_reward(Rubric("think_format"))
    assert report.passed
    verdicts = {finding.name: finding for finding in report.findings}
    assert verdicts["wrong answers"].verdict == "note"
    assert "judges the form" in verdicts["wrong answers"].detail


def test_rows_of_the_user_are_asked_about():
    rows = [
        {"prompt": f"capital of {land}?", "answer": city, "hint": city[0]}
        for land, city in [("France", "Paris"), ("Peru", "Lima"), ("Chad", "N'Djamena")]
    ]
    assert failed("exact_answer", rows=rows) == []
    assert "substrings" in failed(contains, rows=rows)
    assert "any text, quickly" in failed(lambda completion, answer, hint: float(says(completion, answer) or len(completion) > 9000), rows=rows)


def test_coincidences_are_no_faults():
    """Gold answers that occur in the checks' own texts, or in the prompt."""
    rows = [{"prompt": f"Which is more, 1 or {answer}?", "answer": str(answer)} for answer in (10, 2, 100, 42, 7)]
    rows += [{"prompt": f"What is {answer} - 1?", "answer": str(answer - 1)} for answer in range(20, 45)]
    assert failed("right_number", rows=rows) == []
    assert failed("exact_answer", rows=[{"prompt": "Is it?", "answer": answer} for answer in ("yes", "no", "A", "True")]) == []


@pytest.mark.parametrize("answer", ["1,080", "3.50", "-7", "0", "1e3", "½", "a" * 500, "<b>", "\\frac{1}{2}", "{reasoning}", "\x00"])
def test_any_gold_answer_can_be_asked_about(answer):
    check_reward(Rubric("exact_answer"), [{"prompt": "?", "answer": answer}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": []}, "no rows"),
        ({"rows": [{"prompt": "?"}]}, "asks for the column 'answer'"),
        ({"rows": [{"answer": "4"}]}, "row 0 needs `prompt` and `answer`"),
        ({"rows": [{"prompt": "?", "answer": "  "}]}, "no gold answer could be scored"),
        ({"form": "no place"}, "does not say where"),
    ],
)
def test_what_cannot_be_asked_is_said(arguments, message):
    with pytest.raises(UserError, match=message):
        check_reward(Rubric("exact_answer"), **arguments)


def test_columns_that_nobody_has_are_asked_for():
    with pytest.raises(UserError, match="it reads the columns tests; give rows"):
        check_reward(Rubric(lambda completion, tests: 1.0))


def test_a_reward_that_always_raises_is_a_sentence():
    def broken(completion):
        raise ZeroDivisionError("by zero")

    with pytest.raises(UserError, match=r"no gold answer could be scored.*ZeroDivisionError: by zero"):
        check_reward(Rubric(broken))


def test_no_prompt_of_ours_contains_its_answer():
    for rows in SAMPLES:
        for row in rows:
            assert not re.search(rf"(?<!\w){re.escape(row['answer'])}(?!\w)", row["prompt"])


@pytest.mark.parametrize(
    "form_only", ["json_valid", "soft_format", "number_detected", "tag_count", lambda completions, **kwargs: [1.0] * len(completions)]
)
def test_what_does_not_say_that_it_judges_answers_is_not_asked_about_inf(form_only):
    report = check_reward(Rubric(form_only))
    assert "inf and nan" not in report.failed


def test_a_reward_that_breaks_is_found_also_where_its_policy_is_to_drop():
    kept = reward(name="kept", on_error="drop")(raises_on_words)
    report = check_reward(Rubric(kept), rows=list(SAMPLES[0][:4]))
    assert "exceptions" in report.failed
    assert "ValueError" in report.findings[-1].detail


def test_hostile_texts_are_long_and_strange():
    made = {name: make() for name, make in HOSTILE.items()}
    assert max(map(len, made.values())) >= 100_000
    assert "" in made.values()


class TestReasoningGym:
    """Scorers that are in wide use, with weaknesses that anybody can read in their source."""

    @pytest.fixture(scope="class")
    def gym(self):
        return pytest.importorskip("reasoning_gym")

    def report(self, gym, task, wanted=lambda entry: True, rows=8, patience=10.0, **settings):
        dataset = gym.create_dataset(task, size=40, seed=1, **settings)
        rows = [{"prompt": entry["question"], "answer": entry["answer"], "entry": entry} for entry in dataset if wanted(entry)][:rows]

        def score(completion, entry):
            return dataset.score_answer(completion, entry)

        return {finding.name: finding for finding in check_reward(Rubric(score), rows, patience=patience).findings}

    def test_fourteen_for_four(self, gym):
        found = self.report(gym, "chain_sum", lambda entry: entry["answer"] == "4", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
        assert found["substrings"].verdict == "FAIL"
        assert "'14' for '4' earns 0.5" in found["substrings"].detail or "'41' for '4' earns 0.5" in found["substrings"].detail

    def test_nan_where_a_complex_number_is_asked_for(self, gym):
        found = self.report(gym, "complex_arithmetic")["inf and nan"]
        assert found.verdict == "FAIL"
        assert "earns 1 " in found.detail

    def test_inf_and_anything_else_where_a_truth_value_is_asked_for(self, gym):
        """Its scorer takes the truth value of the text, which is true unless the text is empty."""
        found = self.report(gym, "game_of_life_halting", rows=40)
        assert found["wrong answers"].verdict == "FAIL"
        assert found["inf and nan"].verdict == "FAIL"
        assert "earns 1, as the gold answer" in found["inf and nan"].detail

    def test_a_number_too_large_for_a_float(self, gym):
        found = self.report(gym, "coin_flip", rows=1, patience=1.0)  # it also takes for ever to write a number of 10^21 digits
        assert "OverflowError" in found["exceptions"].detail

    def test_two_answers_at_once(self, gym):
        assert self.report(gym, "gcd")["two answers"].verdict == "FAIL"
