"""Which numbers make which chart: every trainer's are known, and none is lost."""

import pytest

from posttrain.watch.panels import NO_CURVES, OTHER, charts

ONLINE = """reward reward_std rewards/right/mean rewards/right/std rewards/a/b/mean unscored solved frac_reward_zero_std completions/mean_length completions/min_length
completions/max_length completions/clipped_ratio completions/repeated completions/mean_terminated_length
completions/min_terminated_length completions/max_terminated_length clip_ratio/low_min clip_ratio/high_max entropy ratio clip_ratio/low_mean
clip_ratio/high_mean clip_ratio/region_mean kl sampling/logp_difference/mean sampling/logp_difference/max resampling_rounds num_tokens time/collect time/reward
time/logps time/update step_time tokens_per_second loss grad_norm learning_rate rewards/right/failed_raised rewards/right/retried memory/process_gib"""
KEYS = {
    "grpo": ONLINE
    + " cispo_clip_ratio off_policy_kept env/turns env/out_of_turns tools/call_frequency tools/failure_frequency eval_reward eval_rewards/right/mean",
    "ppo": ONLINE
    + " policy_loss value_loss value/mean value/explained_variance value/clip_ratio objective/scores objective/non_score_reward objective/rlhf_reward",
    "dpo": "loss entropy mean_token_accuracy rewards/chosen rewards/rejected logps/chosen logps/rejected rewards/accuracies rewards/margins time/reference num_tokens",
    "kto": "loss kl rewards/chosen rewards/rejected logps/chosen logps/rejected rewards/margins time/kl eval_loss eval_kl",
    "orpo": "loss nll_loss log_odds_ratio log_odds_chosen rewards/chosen rewards/accuracies",
    "reward model": "loss accuracy margin mean_reward min_reward max_reward eval_accuracy eval_mean_reward eval_min_reward eval_max_reward eval_margin eval_loss",
    "sft": "loss entropy mean_token_accuracy grad_norm learning_rate eval_loss eval_mean_token_accuracy eval_sums_loss eval_texts_mean_token_accuracy",
}


def places(names):
    return {curve.metric: (chart.panel.title, curve) for chart in charts(names) for curve in chart.curves}


@pytest.mark.parametrize("kind", KEYS)
def test_what_a_trainer_logs_has_its_panel(kind):
    shown = charts(KEYS[kind].split())
    assert [chart.panel.title for chart in shown if chart.panel.section == OTHER] == []
    assert sorted(curve.metric for chart in shown for curve in chart.curves) == sorted(KEYS[kind].split())


def test_a_run_shows_no_panel_of_another_method():
    assert {chart.panel.title for chart in charts(KEYS["sft"].split())} == {"Loss", "Next token right", "Entropy", "Gradient norm", "Learning rate"}


def test_an_unknown_number_is_charted_by_itself():
    (chart,) = charts(["my/own metric"])
    assert (chart.panel.section, chart.panel.title, chart.curves[0].metric) == (OTHER, "my/own metric", "my/own metric")


def test_evaluations_stand_beside_the_training_and_say_what_they_are():
    found = places(["reward", "eval_reward", "eval_hard_reward", "mean_reward", "eval_mean_reward"])
    assert {name: (title, curve.label) for name, (title, curve) in found.items()} == {
        "reward": ("Reward", "reward"),
        "eval_reward": ("Reward", "reward (held out)"),
        "eval_hard_reward": ("Reward", "reward (hard)"),
        "mean_reward": ("Scores", "mean"),
        "eval_mean_reward": ("Scores", "mean (held out)"),  # not the reward of a data set that is called `mean`
    }
    assert [found[name][1].is_held_out for name in ("reward", "eval_reward")] == [False, True]


def test_a_data_set_may_have_any_name():
    names = [f"eval_math-500_{name}" for name in ("reward", "rewards/right/mean", "completions/mean_length", "solved", "loss")]
    found = places([*names, "eval_math-500_runtime", "eval_math-500_completions/mean_terminated_count"])
    assert [found[name][0] for name in names] == ["Reward", "Reward by component", "Length of completions", "Solved", "Loss"]
    assert {curve.label.rpartition("(")[2] for _, curve in found.values()} == {"math-500)"}
    assert found.keys() == set(names)


def test_components_are_called_by_their_names():
    assert [curve.label for curve in charts(["rewards/right_number/mean", "rewards/form/mean"])[0].curves] == ["right number", "form"]


def test_totals_of_a_run_are_no_curves():
    for name in ("epoch", "total_flos", "train_runtime", "train_loss", "eval_runtime", "eval_sums_runtime", "eval_samples_per_second"):
        assert NO_CURVES.fullmatch(name), name
    assert charts(["epoch", "eval_runtime", "total_flos"]) == []
