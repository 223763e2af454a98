"""A recorded group in words: what was sampled, scored, compared and updated, with the group's own numbers.

For somebody who sees it for the first time. A formula is shown only where it gives the advantages that were recorded;
every number comes from the record, none is computed by the page in the trainer's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from posttrain.characters import visible
from posttrain.tracking.browse import Browser, Trust
from posttrain.tracking.lines import number
from posttrain.tracking.reader import CompletionRow, EpisodeRow, GroupRow, Tokens
from posttrain.watch.curves import WatchedRun

EPSILON = 1e-4  # what trainers add to a deviation before they divide by it
CHARACTERS = 8 * 2**20  # of all texts of a group that are told
BYTES = 12 * 2**20  # of the tokens and messages of a group: beyond, its further completions are told without
FARTHEST = 1e100  # larger rewards count as this one in what is computed here


@dataclass(frozen=True)
class ToldCompletion:
    row: CompletionRow
    episode: EpisodeRow | None
    tokens: Tokens | None  # None: the record kept none, see `Story.kept`

    @property
    def is_truncated(self) -> bool:
        return self.row.stop == "length"


@dataclass(frozen=True)
class StoryStep:
    """One of the steps of an update: what happens, and what happened here."""

    title: str
    text: str


@dataclass(frozen=True)
class Story:
    group: GroupRow
    completions: list[ToldCompletion]  # best first
    stages: list[StoryStep]
    kept: str  # which per-token numbers the record has, in a sentence

    @property
    def components(self) -> list[str]:
        return list(dict.fromkeys(name for completion in self.completions for name in completion.row.scores))


def tell(run: WatchedRun, reader: Browser, step: int, group: GroupRow) -> Story:
    rows = reader.completions(step, group.group, CHARACTERS)
    rows.sort(key=lambda row: (-math.inf if row.reward is None else row.reward, row.advantage), reverse=True)
    completions, left = [], BYTES
    for row in rows:
        left -= reader.size(row.key)
        completions.append(ToldCompletion(row, reader.episode(row.key), reader.tokens(row.key)) if left >= 0 else ToldCompletion(row, None, None))
    stages = [_sample(run, group, completions), _score(completions), *_STAGES.get(run.method, _compared)(run, group, completions)]
    return Story(group, completions, stages, _kept(run, completions))


def trust_of(run: WatchedRun) -> Trust:
    """The clip of the run's own settings, under whichever name its algorithm has for it."""
    cliprange, epsilon = run.number("cliprange"), run.number("epsilon")
    low = cliprange if cliprange is not None else 0.2 if epsilon is None else epsilon
    high = cliprange if cliprange is not None else run.number("epsilon_high") or low
    return Trust(1 - low, 1 + high)


def _sample(run: WatchedRun, group: GroupRow, completions: list[ToldCompletion]) -> StoryStep:
    lengths = [completion.row.length for completion in completions]
    cut = sum(completion.is_truncated for completion in completions)
    text = f"The model was asked this once and answered {_times(len(completions))}, each time by chance"
    temperature = run.number("temperature")
    text += f" (temperature {number(temperature)})" if temperature is not None else ""
    text += f": {min(lengths)} to {max(lengths)} tokens" if len(set(lengths)) > 1 else f": {lengths[0]} tokens each" if lengths else ""
    turns = max((completion.episode.turns for completion in completions if completion.episode is not None), default=1)
    text += f" in up to {turns} turns" if turns > 1 else ""
    text += f", {cut} of them cut at the limit." if cut else ", all of them ended by the model itself."
    return StoryStep("Sample", text)


def _score(completions: list[ToldCompletion]) -> StoryStep:
    names = list(dict.fromkeys(name for completion in completions for name in completion.row.scores))
    rewards = _scored(completions)
    text = (
        f"{len(names)} rewards looked at every answer"
        if len(names) > 1
        else f"The reward {visible(names[0])} looked at every answer"
        if names
        else "Scores"
    )
    if rewards:
        text += (
            f"; the totals go from {number(min(rewards))} to {number(max(rewards))}."
            if min(rewards) != max(rewards)
            else f"; each earned {number(rewards[0])}."
        )
    else:
        text += " and could score none."
    unscored = len(completions) - len(rewards)
    if unscored and rewards:
        text += f" {unscored} could not be scored and take no part."
    return StoryStep("Score", text)


def _compared(run: WatchedRun, group: GroupRow, completions: list[ToldCompletion]) -> list[StoryStep]:
    """GRPO and its relatives: the group is its own measure."""
    baseline = "" if group.mean is None else f"The measure of this group, {number(group.mean)}, was read off its own answers."
    text = f"{baseline} PPO trains a second network to guess that number before the answer is known; here there is none to train, to store or to be wrong."
    return [_compare(run, group, completions), _update(run, completions), StoryStep("No value model", text.strip())]


def _compare(run: WatchedRun, group: GroupRow, completions: list[ToldCompletion]) -> StoryStep:
    title = "Compare within the group"
    rewards = _scored(completions)
    if len(rewards) < 2:
        return StoryStep(title, "There are not two scored answers, so there is nothing to compare.")
    if min(rewards) == max(rewards):
        return StoryStep(
            title,
            f"All earned the same, {number(rewards[0])}. Nobody is better than the group: every advantage is 0 and this prompt teaches nothing.",
        )
    best = next(completion.row for completion in completions if completion.row.reward is not None)
    assert best.reward is not None
    spread = f"mean {number(fmean(rewards))}, deviation {number(stdev(rewards))}"
    text = f"Of the group's rewards ({spread}) only the differences count. "
    for formula in _FORMULAS:
        told = formula(best.reward, rewards)
        if told is not None and math.isclose(told[0], best.advantage, rel_tol=2e-3, abs_tol=2e-3):
            return StoryStep(
                title, text + f"The best answer's advantage is {told[1]} = {best.advantage:+.2f}. Above the mean is pushed up, below it down."
            )
    return StoryStep(
        title, text + f"The best answer's advantage is {best.advantage:+.2f}, after this run's own scaling. Above 0 is pushed up, below it down."
    )


def _by_deviation(reward: float, rewards: Sequence[float]) -> tuple[float, str] | None:
    mean, deviation = fmean(rewards), stdev(rewards)
    return (reward - mean) / (deviation + EPSILON), f"({number(reward)} - {_signed(mean)}) / {number(deviation)}"


def _by_mean(reward: float, rewards: Sequence[float]) -> tuple[float, str] | None:
    mean = fmean(rewards)
    return reward - mean, f"{number(reward)} - {_signed(mean)}"


def _by_others(reward: float, rewards: Sequence[float]) -> tuple[float, str] | None:
    others = (sum(rewards) - reward) / (len(rewards) - 1)
    return reward - others, f"{number(reward)} - {_signed(others)}, the mean of the others,"


_FORMULAS: tuple[Callable[[float, Sequence[float]], tuple[float, str] | None], ...] = (_by_deviation, _by_mean, _by_others)


def _update(run: WatchedRun, completions: list[ToldCompletion]) -> StoryStep:
    text = "Every token of an answer with a positive advantage becomes likelier, of one with a negative advantage less likely. "
    trust = trust_of(run)
    loss = run.setting("loss_type")
    if loss in _SOFT:
        text += f"How much a token that has already moved may still pull is bounded in {loss}'s own way. "
    elif run.method == "RLOO" or loss == "gspo" or run.setting("importance_sampling_level") == "sequence":
        text += f"An answer that as a whole has moved out of [{trust.low:.2f}, {trust.high:.2f}] times its old probability pushes no further. "
    else:
        text += f"A token that has already moved out of [{trust.low:.2f}, {trust.high:.2f}] times its old probability pushes no further. "
    return StoryStep("Clipped update", text + _moved(completions, trust if "A token" in text else None))


def _moved(completions: list[ToldCompletion], trust: Trust | None) -> str:
    """`trust`: where single tokens are clipped; None: they are not."""
    ratios = [
        (ratio, advantage)
        for completion in completions
        for update in (completion.tokens.updates if completion.tokens else ())
        for ratio, advantage in zip(update.ratio or (), update.advantage or [completion.row.advantage] * len(update.ratio or ()), strict=True)
    ]
    if not ratios:
        return "How far the tokens of this group moved was not kept."
    if all(ratio == 1.0 for ratio, _ in ratios):
        return "This rollout fed one update only, so every ratio was exactly 1 and nothing could be clipped."
    text = f"Ratios of {len(ratios):,} tokens were recorded here, from {min(ratios)[0]:.3f} to {max(ratios)[0]:.3f}"
    return text + (f"; {sum(trust.is_clipped(*pair) for pair in ratios):,} of them were clipped." if trust is not None else ".")


def _credited(run: WatchedRun, group: GroupRow, completions: list[ToldCompletion]) -> list[StoryStep]:
    """PPO: a value model is the measure, token by token."""
    text = "A second output of the network guesses, at every token, what the answer will earn. A token's advantage is how much better things went from there on"
    text += " than it had guessed: colour the tokens by advantage to see where. The figure beside an answer is the mean over its tokens."
    return [StoryStep("Compare with the value model", text), _update(run, completions)]


_STAGES = {"PPO": _credited}
_SOFT = ("cispo", "sapo", "vespo")  # losses without a clip in the strict sense


def _kept(run: WatchedRun, completions: list[ToldCompletion]) -> str:
    with_tokens = [completion for completion in completions if completion.tokens is not None]
    with_updates = [completion for completion in with_tokens if completion.tokens and completion.tokens.updates]
    cap = next((note for note in run.notes if note.kind == "cap"), None)
    if not with_tokens:
        why = f" (from step {cap.step} on: {visible(cap.text)})" if cap is not None else ""
        return f"Per-token numbers of this group were not kept{why}."
    first = run.number("record_tokens_of") or 4
    rule = f"the record keeps them of the first {first} groups of each step (record_tokens_of)"
    if not with_updates:
        return f"Of this group the log-probs of the sampler were kept; ratio, entropy and KL were not: {rule}."
    if len(with_updates) < len(completions):
        return f"Ratio, entropy and KL were kept of {len(with_updates)} of {len(completions)} answers: those without an advantage are left out of the update."
    return f"Per-token numbers were kept; {rule}."


def _scored(completions: list[ToldCompletion]) -> list[float]:
    return [min(max(completion.row.reward, -FARTHEST), FARTHEST) for completion in completions if completion.row.reward is not None]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _signed(value: float) -> str:
    return f"({number(value)})" if value < 0 else number(value)
