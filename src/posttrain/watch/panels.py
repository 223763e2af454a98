"""Which logged numbers make which chart. A table, so that every kind of run shows what belongs to it and nothing that
it never logged.

Names are matched whole or by one `*`. An evaluation's numbers (`eval_...`) are drawn beside the training's of the same
name. What no row names is charted too, each by itself, under "Other".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """One curve, or with a `*` in `metric` one for each name that matches."""

    metric: str
    label: str = "*"  # its `*` stands for what matched
    is_complement: bool = False  # show 1 - value
    is_detail: bool = False  # thin, and out of the picture where several runs are compared


@dataclass(frozen=True)
class Panel:
    title: str
    caption: str  # what is averaged over what, and what to look for
    lines: tuple[Line, ...]
    section: str = "Does it learn?"
    unit: str = ""  # "%" draws shares of 1 as percents
    is_stacked: bool = False


@dataclass(frozen=True)
class Curve:
    """A logged name as it stands in a panel."""

    metric: str
    label: str
    is_complement: bool = False
    is_detail: bool = False
    is_held_out: bool = False  # from an evaluation


@dataclass(frozen=True)
class Chart:
    """A panel with the curves that these runs have logged."""

    panel: Panel
    curves: tuple[Curve, ...] = field(default_factory=tuple)


LEARNS, HEALTH, COST, OTHER = SECTIONS = ("Does it learn?", "Is it healthy?", "What does it cost?", "Other")

PANELS = (
    Panel("Reward", "Mean over every completion that was drawn, also of groups that were dropped afterwards.", (Line("reward", "reward"),)),
    Panel("Reward by component", "Mean of each component, unweighted, over the completions it scored.", (Line("rewards/*/mean"),)),
    Panel("Spread by component", "Standard deviation of each component over the completions it scored.", (Line("rewards/*/std"),)),
    Panel("Solved", "Share of completions that the verifying rewards call right.", (Line("solved", "solved"),), unit="%"),
    Panel(
        "Groups with a signal",
        "Share of groups whose rewards differ. In the others every answer is as good as its siblings, and nothing can be learned.",
        (Line("frac_reward_zero_std", "with signal", is_complement=True),),
        unit="%",
    ),
    Panel("Spread within a group", "Standard deviation of the rewards of a group, mean over groups.", (Line("reward_std", "deviation"),)),
    Panel("Preferred", "Share of pairs in which the chosen completion earns more.", (Line("rewards/accuracies", "preferred"),), unit="%"),
    Panel(
        "Rewards of chosen and rejected",
        "Implicit rewards, mean over examples. The margin should grow; where both fall, the model gives up likely text.",
        (Line("rewards/chosen", "chosen"), Line("rewards/rejected", "rejected"), Line("rewards/margins", "margin")),
    ),
    Panel(
        "Log-probability of chosen and rejected",
        "Sum over a completion's tokens, mean over examples.",
        (Line("logps/chosen", "chosen"), Line("logps/rejected", "rejected")),
    ),
    Panel("Pairs in the right order", "Share of pairs in which the chosen completion is scored higher.", (Line("accuracy", "right"),), unit="%"),
    Panel(
        "Scores",
        "Of the reward model, over both completions of every pair.",
        (
            Line("mean_reward", "mean"),
            Line("margin", "margin"),
            Line("min_reward", "least", is_detail=True),
            Line("max_reward", "most", is_detail=True),
        ),
    ),
    Panel(
        "Reward minus its cost",
        "Per completion: the score, what the distance to the reference cost, and what is left.",
        (Line("objective/scores", "score"), Line("objective/non_score_reward", "KL's cost"), Line("objective/rlhf_reward", "left")),
    ),
    Panel("Next token right", "Share of trained tokens that are the model's first choice.", (Line("mean_token_accuracy", "right"),), unit="%"),
    Panel(
        "Loss",
        "Mean over what the algorithm divides by. In GRPO it is near 0 whatever happens: watch the reward instead.",
        (
            Line("loss", "loss"),
            Line("policy_loss", "policy"),
            Line("value_loss", "value"),
            Line("nll_loss", "likelihood"),
            Line("log_odds_ratio", "odds ratio"),
            Line("log_odds_chosen", "log odds", is_detail=True),
        ),
    ),
    Panel(
        "KL", "Distance from the reference, nats per token. A sudden rise means that the model is leaving what it was.", (Line("kl", "KL"),), HEALTH
    ),
    Panel("Entropy", "Nats per token. Near 0 every answer is the same and nothing new is tried.", (Line("entropy", "entropy"),), HEALTH),
    Panel(
        "Clipped tokens",
        "Share of tokens whose ratio left the trusted region, so that they push no further.",
        (
            Line("clip_ratio/region_mean", "all"),
            Line("clip_ratio/low_mean", "below"),
            Line("clip_ratio/high_mean", "above"),
            Line("clip_ratio/low_min", "below, least of a completion", is_detail=True),
            Line("clip_ratio/high_max", "above, most of a completion", is_detail=True),
            Line("cispo_clip_ratio", "capped"),
        ),
        HEALTH,
        unit="%",
    ),
    Panel(
        "Kept answers",
        "Share of tokens whose answer the policy has not yet left behind.",
        (Line("off_policy_kept", "kept"),),
        HEALTH,
        unit="%",
    ),
    Panel("Rounds of resampling", "New prompts for groups without a signal, per rollout.", (Line("resampling_rounds", "rounds"),), HEALTH),
    Panel("Value", "Of the value model, mean over tokens.", (Line("value/mean", "value"),), HEALTH),
    Panel("Ratio", "New probability over old, mean over tokens. 1 where each rollout feeds one update.", (Line("ratio", "ratio"),), HEALTH),
    Panel(
        "Length of completions",
        "Tokens. 'Ended' are those that the model ended itself.",
        (
            Line("completions/mean_length", "mean"),
            Line("completions/mean_terminated_length", "ended"),
            Line("completions/min_length", "shortest", is_detail=True),
            Line("completions/max_length", "longest", is_detail=True),
            Line("completions/min_terminated_length", "shortest that ended", is_detail=True),
            Line("completions/max_terminated_length", "longest that ended", is_detail=True),
        ),
        HEALTH,
    ),
    Panel("Cut off", "Share of completions that met the token limit.", (Line("completions/clipped_ratio", "cut"),), HEALTH, unit="%"),
    Panel(
        "Repetition",
        "Share of a completion's three-token sequences said before in it.",
        (Line("completions/repeated", "repeated"),),
        HEALTH,
        unit="%",
    ),
    Panel("Not scored", "Share of completions that have no reward.", (Line("unscored", "not scored"),), HEALTH, unit="%"),
    Panel(
        "What broke",
        "Completions since the last log whose reward or environment failed.",
        (Line("rewards/*/failed_*"), Line("rewards/*/retried", "* retried"), Line("episodes/dropped", "episodes")),
        HEALTH,
    ),
    Panel("Gradient norm", "Before clipping.", (Line("grad_norm", "norm"),), HEALTH),
    Panel(
        "Explained returns",
        "How well the value model foresees returns: 1 is all of their variance, 0 none.",
        (Line("value/explained_variance", "explained"),),
        HEALTH,
    ),
    Panel("Clipped values", "Share of values that moved too far to be moved further.", (Line("value/clip_ratio", "clipped"),), HEALTH, unit="%"),
    Panel(
        "Engine against trainer",
        "Difference of a token's log-prob between sampling and training. Anything but rounding is a fault.",
        (Line("sampling/logp_difference/mean", "mean"), Line("sampling/logp_difference/max", "largest", is_detail=True)),
        HEALTH,
    ),
    Panel("Turns", "How often the policy spoke in an episode.", (Line("env/turns", "turns"),), HEALTH),
    Panel(
        "Tool calls",
        "Per episode, and the share of them that failed.",
        (Line("tools/call_frequency", "calls"), Line("tools/failure_frequency", "failed")),
        HEALTH,
    ),
    Panel("Environment", "What it reports, mean over episodes.", (Line("env/*"),), HEALTH),
    Panel("Tokens per second", "Trained tokens over the whole time of a step.", (Line("tokens_per_second", "tokens/s"),), COST),
    Panel("Where a step's time goes", "Seconds.", (Line("time/*"),), COST, is_stacked=True),
    Panel("Seconds per step", "Everything included.", (Line("step_time", "seconds"),), COST),
    Panel(
        "Memory",
        "GiB: of the process, and the most that tensors have held on the GPU.",
        (Line("memory/process_gib", "process"), Line("memory/gpu_peak_gib", "GPU, peak")),
        COST,
    ),
    Panel("Trained tokens", "Per step.", (Line("num_tokens", "tokens"),), COST),
    Panel("Learning rate", "", (Line("learning_rate", "learning rate"),), COST),
)

# Totals of a whole run and counters that are no curves.
NO_CURVES = re.compile(
    r"epoch|total_flos|train_\w+|eval_(.+_)?(runtime|samples_per_second|steps_per_second)|(eval_(.+_)?)?completions/\w+_terminated_count"
)


def charts(names: Iterable[str]) -> list[Chart]:
    """The panels that `names` fill, in the table's order. A name goes to the first line that wants it.
    `eval_texts_mean_token_accuracy` is the token accuracy on texts and not the accuracy on something called
    `texts_mean_token`: the shorter the data set's name, the better."""
    lines = [(place, line) for place, panel in enumerate(PANELS) for line in panel.lines]
    found: dict[int, list[tuple[int, Curve]]] = {}
    unknown = []
    for name in names:
        if NO_CURVES.fullmatch(name) is not None:
            continue
        wanted = [(match, number) for number, (_, line) in enumerate(lines) if (match := _match(line, name)) is not None]
        if wanted:
            match, number = min(wanted, key=lambda one: (len(one[0][2] or ""), one[1]))
            place, line = lines[number]
            found.setdefault(place, []).append((number, _curve(line, name, match)))
        else:
            unknown.append(name)
    made = [Chart(PANELS[place], tuple(curve for _, curve in sorted(found[place], key=lambda one: one[0]))) for place in sorted(found)]
    return made + [Chart(Panel(name, "", (Line(name),), OTHER), (Curve(name, name),)) for name in unknown]


def _match(line: Line, name: str) -> re.Match[str] | None:
    """Groups: `eval_` or nothing, the data set's name or nothing, then what each `*` stands for."""
    return re.fullmatch(r"(eval_(?:(.+?)_)?)?" + "(.+)".join(re.escape(part) for part in line.metric.split("*")), name)


def _curve(line: Line, name: str, match: re.Match[str]) -> Curve:
    held_out, data_set, *parts = match.groups()
    said = ", ".join(part.replace("_", " ") for part in parts)
    label = line.label.replace("*", said) if parts else line.label
    if held_out:
        label += f" ({data_set or 'held out'})"
    return Curve(name, label, line.is_complement, line.is_detail, held_out is not None)
