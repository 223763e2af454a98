"""The view: what it says, what it never lets through."""

import io

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from posttrain.characters import shown, visible
from posttrain.tracking.advice import ZERO_VARIANCE_LOGS, Advisor
from posttrain.tracking.lines import duration, line, number, plain_name
from posttrain.tracking.terminal import TerminalView
from posttrain.types import Completion, StopReason

LOGS = {
    "loss": 1e-9,
    "reward": 3.71,
    "rewards/right/mean": 2.9,
    "rewards/has_number/mean": 0.81,
    "rewards/right/std": 0.5,
    "frac_reward_zero_std": 0.69,
    "completions/mean_length": 11.2,
    "completions/clipped_ratio": 0.05,
    "entropy": 0.11,
    "kl": 0.00213,
    "grad_norm": 0.31,
    "tokens_per_second": 1940.4,
    "step_time": 2.0,
    "time/collect": 1.2,
    "time/reward": 0.04,
    "time/update": 0.7,
}


def show(logs_per_step, *, terminal: bool = False, main: bool = True, before=lambda view: None) -> str:
    """What a run of so many steps prints."""
    screen = io.StringIO()
    view = TerminalView(Console(file=screen, force_terminal=terminal, highlight=False, width=200))
    args, control = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=150, is_world_process_zero=main)
    view.on_train_begin(args, state, control)
    before(view)
    for step, logs in enumerate(logs_per_step, start=1):
        state.global_step = step
        view.on_step_end(args, state, control)
        view.on_log(args, state, control, logs=logs)
    view.on_train_end(args, state, control)
    return screen.getvalue()


def completion(text: str, reward: float | None, stop: StopReason = StopReason.STOP) -> Completion:
    return Completion([1], [2], [True], [0.0], [0.0], stop, text, reward=reward)


def test_without_a_terminal_each_log_is_one_plain_line():
    lines = show([LOGS, LOGS]).splitlines()
    assert len(lines) == 3  # two steps and the end
    assert lines[1].startswith(
        "step 2/150  reward 3.71  right 2.90  has_number 0.81  signal 31 %  len 11.20  cut 5 %  entropy 0.11  kl 0.00213  grad 0.31  "
        "loss 1e-09  1,940 tok/s  2.00 s/step  (collect 60 %, reward 2 %, update 35 %)  eta "
    )
    assert "\x1b" not in "".join(lines)


def test_on_a_terminal_the_panel_redraws_and_gives_the_cursor_back():
    screen = show([LOGS, LOGS], terminal=True)
    assert "step 2/150" in screen
    assert screen.count("\x1b[?25l") == 1  # hidden once,
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l")  # and shown again


def test_closing_after_a_failure_gives_the_terminal_back():
    screen = io.StringIO()
    view = TerminalView(Console(file=screen, force_terminal=True))
    view.on_train_begin(TrainingArguments(output_dir="unused", report_to=[], use_cpu=True), TrainerState(max_steps=3), TrainerControl())
    view.close()
    view.close()
    assert screen.getvalue().count("\x1b[?25h") == 1


def test_supervised_training_shows_what_it_has():
    (text, _) = show([{"loss": 0.5123, "mean_token_accuracy": 0.871, "tokens_per_second": 12000.0}]).splitlines()
    assert text.startswith("step 1/150  accuracy 87 %  loss 0.51  12,000 tok/s  eta ")


def test_an_evaluation_is_a_line_of_its_own():
    assert "eval after step 1  reward 2.50" in show([{"eval_reward": 2.5, "eval_runtime": 1.0}])


def test_data_sets_of_an_evaluation_have_a_line_each():
    logs = {
        "eval_easy_reward": 2.5,
        "eval_easy_solved": 0.5,
        "eval_math-500_reward": 1.0,
        "eval_math-500_rewards/right/mean": 0.25,
        "eval_math-500_runtime": 1.0,
    }
    lines = show([logs]).splitlines()
    assert lines[:2] == ["eval of easy after step 1  reward 2.50  solved 50 %", "eval of math-500 after step 1  reward 1.00  right 0.25"]


@pytest.mark.parametrize(
    ("name", "data_set", "metric"),
    [
        ("reward", "", "reward"),
        ("eval_reward", "", "reward"),
        ("eval_easy_reward", "easy", "reward"),
        ("eval_gsm8k_test_rewards/a_b/mean", "gsm8k_test", "rewards/a_b/mean"),
        ("eval_math-500_completions/mean_length", "math-500", "completions/mean_length"),
        ("eval_mean_reward", "", "mean_reward"),  # a reward model's, and not that of a data set `mean`
        ("eval_texts_mean_token_accuracy", "texts", "mean_token_accuracy"),
        ("eval_texts_nll_loss", "texts", "nll_loss"),
        ("eval_my/own", "", "my/own"),
    ],
)
def test_the_name_of_a_data_set_is_told_from_the_metric(name, data_set, metric):
    assert plain_name(name) == (data_set, metric)


def test_the_name_of_a_data_set_is_no_control_character():
    screen = show([{"eval_a\x1b[2J_reward": 1.0}])
    assert "\x1b" not in screen
    assert "eval of a\\x1b[2J after step 1" in screen


def test_logs_without_anything_known_print_nothing():
    (end,) = show([{"train_runtime": 3.0, "epoch": 1.0}]).splitlines()
    assert end.startswith("1 steps in")


def test_other_processes_print_nothing():
    assert show([LOGS], main=False) == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_no_completion_reaches_the_terminal_as_markup_or_control(terminal):
    hostile = "\x1b]0;owned\x07\x1b[2J[bold red]hi[/] :boom: \x9b31m\u202egnp.exe\r\nsecond \u2028 \x00 [link=http://x]y[/link]"
    screen = show([], terminal=terminal, before=lambda view: (view.plan(hostile), view.samples(hostile, [completion(hostile, 1.0)])))
    for bad in ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\u202e", "\u2028", "\x00", "\r\nsecond"):
        assert bad not in screen
    assert screen.count("[bold red]hi[/] :boom: ") == 3  # in letters, thrice
    assert screen.count("\\x1b[2J") == 3
    assert screen.count("[link=http://x]y[/link]") == 3


def test_reward_names_are_no_markup_either():
    assert "[red]x\\x1b[0m 0.50" in show([{"reward": 1.0, "rewards/[red]x\x1b[0m/mean": 0.5}])


def test_samples_come_best_first_and_say_when_they_were_cut():
    completions = [completion("bad", -1.0), completion("unknown", None), completion("good", 3.0), completion("long " * 200, 0.0, StopReason.LENGTH)]
    lines = show([], before=lambda view: view.samples("2+2=", completions)).splitlines()
    assert [text.split()[:2] for text in lines[:5]] == [
        ["prompt", "2+2="],
        ["+3.00", "good"],
        ["+0.00", "long"],
        ["-1.00", "bad"],
        ["n/a", "unknown"],
    ]
    assert lines[2].endswith("...  [cut]")


def test_cut_completions_are_named_once_with_the_setting_to_change():
    advisor = Advisor(max_completion_length=64)
    (sentence,) = advisor.read({"completions/clipped_ratio": 0.94})
    assert sentence.startswith("94 % of completions were truncated at max_completion_length=64;")
    assert sentence.endswith("Try 256.")
    assert advisor.read({"completions/clipped_ratio": 0.99}) == []


def test_no_signal_is_named_after_several_logs_in_a_row_only():
    advisor = Advisor()
    without, some = {"frac_reward_zero_std": 1.0}, {"frac_reward_zero_std": 0.9}
    said = [advisor.read(logs) for logs in [without] * (ZERO_VARIANCE_LOGS - 1) + [some] + [without] * ZERO_VARIANCE_LOGS + [without]]
    assert [len(sentences) for sentences in said] == [0] * (2 * ZERO_VARIANCE_LOGS - 1) + [1, 0]


def test_logs_of_other_things_do_not_break_the_row_of_silent_ones():
    advisor = Advisor()
    for _ in range(ZERO_VARIANCE_LOGS - 1):
        assert advisor.read({"frac_reward_zero_std": 1.0}) == []
        assert advisor.read({"train_runtime": 1.0}) == []
    assert len(advisor.read({"frac_reward_zero_std": 1.0})) == 1


def test_the_view_prints_the_warning_below_its_line():
    lines = show([{"reward": -1.0, "frac_reward_zero_std": 1.0}] * ZERO_VARIANCE_LOGS).splitlines()
    assert lines[ZERO_VARIANCE_LOGS].startswith("warning: in the last 5 logs no group had a signal")


@pytest.mark.parametrize(("value", "text"), [(0.00213, "0.00213"), (0.11, "0.11"), (3.714, "3.71"), (-3.0, "-3.00"), (1234.5, "1,234"), (0.0, "0")])
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(12, "0:12"), (151, "2:31"), (3_723, "1:02:03")])
def test_durations_are_clock_readings(seconds, text):
    assert duration(seconds) == text


def test_text_of_several_lines_is_shown_as_such_and_moves_no_cursor():
    assert shown("a\n\tb\x1b[2J\r\u202e") == "a\n\tb\\x1b[2J\\r\\u202e"


def test_visible_text_keeps_letters_of_every_script():
    assert visible("naïve 日本語 😀 −½") == "naïve 日本語 😀 −½"


def test_a_line_without_speed_has_no_empty_parts():
    assert line({"reward": 1.0}, "step 1/2") == "step 1/2  reward 1.00"


def test_a_warning_is_shown_and_goes_into_the_record_too():
    noted = []
    screen = io.StringIO()
    view = TerminalView(Console(file=screen, width=200), note=lambda kind, text: noted.append((kind, text)))
    args, control, state = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True), TrainerControl(), TrainerState(max_steps=99)
    view.on_train_begin(args, state, control)
    for step in range(40):
        view.on_log(args, state, control, logs={**LOGS, "completions/repeated": 0.1 if step < 20 else 0.8})
    [(kind, text)] = noted
    assert kind == "warning"
    assert "have said before" in text
    assert f"warning: {text}" in screen.getvalue()


def test_evaluations_are_heard_by_the_alarms():
    steps = [{**LOGS, "reward": 1.0 if step < 20 else 3.0} for step in range(40)]
    evaluated = [part for index, log in enumerate(steps) for part in (({"eval_reward": 1.0, "eval_solved": 0.3}, log) if index % 10 == 0 else (log,))]
    assert "held-out prompts solved went from 30 % to 30 %" in show(evaluated)


def test_evaluations_of_named_data_sets_are_heard_by_the_alarms():
    steps = [{**LOGS, "reward": 1.0 if step < 20 else 3.0} for step in range(40)]
    held_out = {"eval_hard_solved": 0.3, "eval_easy_solved": 0.5}
    evaluated = [part for index, log in enumerate(steps) for part in ((held_out, log) if index % 10 == 0 else (log,))]
    assert "held-out prompts solved went from 40 % to 40 %" in show(evaluated)


@pytest.mark.parametrize(
    "name", ["eval_rewards/judge/failed_timed_out", "eval_math-500_rewards/judge/failed_timed_out", "eval_hard_episodes/dropped"]
)
def test_what_breaks_in_an_evaluation_is_a_warning(name):
    assert f"warning: completions were dropped because a reward or an environment broke over them: 3 {name}." in show([{name: 3.0}])
