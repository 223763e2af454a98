"""The probe: can RL work here? Some prompts are sampled with the very rubric, template and engine of a run, before the
run is paid for.

If the chance of a right answer is 0, no amount of reinforcement finds one; if all completions of a prompt earn the
same, a group has nothing to compare. Both are estimated without bias for the group size of the run, with intervals over
prompts. Trains nothing, and imports no trainer's arithmetic.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from posttrain.errors import UserError
from posttrain.evaluate import PROBE_STEP, answers
from posttrain.evaluation import Estimate, bootstrap, chance_of, chance_of_zero_variance, clopper_pearson, forecast, pass_at_k
from posttrain.probe.advice import Check, Setting, checks
from posttrain.rewards import Rubric
from posttrain.types import Completion, Engine, Group, Sampling, Task

WORKS, HOPELESS, SOLVED = 0, 1, 3  # exit codes of the command; 2 is input that cannot work, as everywhere
WEAK = 0.1  # below this share of groups with signal a run learns slowly
ENOUGH = 0.5  # a group size is suggested from which on so many groups carry signal
PROMPTS, COMPLETIONS = 32, 16


@dataclass(frozen=True)
class Component:
    """What one reward gave, unweighted; None where it scored nothing."""

    name: str
    weight: float
    low: float | None
    high: float | None
    mean: float | None
    std: float | None
    full: float | None  # share of the scored completions with full marks; None: its range is not declared
    unscored: float  # share of all completions


@dataclass(frozen=True)
class Probe:
    """What `n` prompts with `k` completions each showed, and what a run with groups of `num_generations` may expect."""

    n: int
    k: int
    num_generations: int
    right: int | None  # completions that were right; None: no reward decides that
    pass_at: dict[int, Estimate]  # k -> chance that one of k completions is right; empty where nothing decides
    signal: dict[int, Estimate]  # G -> share of groups whose rewards are not all equal
    all_right: Estimate | None  # share of groups of num_generations that are right throughout
    all_wrong: Estimate | None
    groups_per_rollout: int
    signal_per_rollout: Estimate  # share of the groups of one rollout that will carry signal: the interval is of a single rollout
    suggested: int | None  # the smallest group size at which half of the groups carry signal; None: none up to k does
    truncated: Estimate  # share of completions that were cut at the token limit
    ended: Estimate  # share that ended with a stop token
    form: Estimate | None  # share with full marks from every reward of a declared range that decides nothing
    reward: Component  # the weighted total
    components: list[Component]
    scored: int  # completions with a reward
    prompt_tokens: float  # means
    completion_tokens: float
    tokens_per_rollout: int
    seconds: float  # for sampling and scoring all of it
    rollout_seconds: float  # at the same pace for the completions of one rollout; the update comes on top
    checks: list[Check]

    @property
    def exit_code(self) -> int:
        if self.right == self.n * self.k:
            return SOLVED
        return HOPELESS if self.right == 0 or not self.scored or self.signal[self.num_generations].value == 0 else WORKS

    @property
    def can_work(self) -> bool:
        return self.exit_code == WORKS

    @property
    def verdict(self) -> str:
        """One sentence."""
        total, share = self.n * self.k, self.signal[self.num_generations]
        groups = f"{share.value:.0%} of groups of {self.num_generations} will carry signal"
        if not self.scored:
            return f"RL will not work here: none of {total} completions could be scored; check the rewards first (posttrain reward check)"
        if self.right == total:
            return f"RL has nothing to learn here: all {total} completions were right; take harder prompts"
        if self.right == 0:
            form = f" (the rewards still differ in {share.value:.0%} of groups, but not by being right)" if share.value else ""
            return f"RL will not work here: no completion of {total} was right{form}; SFT first, easier prompts, or a larger model"
        if share.value == 0:
            return f"RL will not work here: all completions of a prompt earned the same reward, for every one of {self.n} prompts; there is nothing to compare"
        if share.value < WEAK:
            return f"RL can work, but slowly: only {groups}; easier prompts, a larger num_generations or SFT first would help"
        return f"RL can work: {groups}"


def probe(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    rubric: Rubric,
    sampling: Sampling,
    *,
    num_generations: int,
    prompts: int = PROMPTS,
    completions: int | None = None,
    groups_per_rollout: int = 1,
    max_steps: int | None = None,
    seed: int = 0,
    engine: Engine | None = None,
    on_groups: Callable[[list[Group]], None] | None = None,
    **played: Any,
) -> Probe:
    """Sample `completions` (default: 16, or a group if that is more) for each of `prompts` tasks, drawn by `seed`, as a
    step of training would.

    sampling: with the run's temperature, token limit and stop tokens. groups_per_rollout, max_steps: of the planned
    run; max_steps None: not known. on_groups: called with everything that was sampled. played: what `evaluate.answers`
    takes (environment, max_turns, reward_policy, the template's keywords). Raises UserError where there is nothing to
    compare.
    """
    if num_generations < 2 or prompts < 1 or not tasks:
        raise UserError(f"{min(prompts, len(tasks))} prompts with groups of {num_generations}: a probe compares two or more completions of a prompt")
    k = max(completions or max(COMPLETIONS, num_generations), num_generations)
    chosen = sorted(random.Random(f"{seed}/probe").sample(range(len(tasks)), min(prompts, len(tasks))))
    asked = [tasks[index] for index in chosen]
    started = time.perf_counter()
    groups = answers(model, tokenizer, asked, rubric, sampling, num_generations=k, seed=seed, step=PROBE_STEP, engine=engine, **played)
    seconds = time.perf_counter() - started
    if on_groups is not None:
        on_groups(groups)
    setting = Setting(len(tasks), max_steps, model, tokenizer, [task.prompt for task in asked], sampling.max_new_tokens, rubric.names)
    return judged(groups, rubric, sampling, num_generations, groups_per_rollout, seconds, setting)


def judged(
    groups: list[Group], rubric: Rubric, sampling: Sampling, num_generations: int, groups_per_rollout: int, seconds: float, setting: Setting
) -> Probe:
    """The probe of groups that were sampled and scored, all with equally many completions."""
    n, k = len(groups), len(groups[0].completions)
    completions = [completion for group in groups for completion in group.completions]
    verdicts = [[rubric.is_right(completion) is True for completion in group.completions] for group in groups]
    right = [sum(given) for given in verdicts] if rubric.can_decide() else None
    sizes = _sizes(k, num_generations)
    speaking = {size: [1 - chance_of_zero_variance(group.rewards, size) for group in groups] for size in sizes if size > 1}
    truncated = _share(groups, lambda completion: completion.is_truncated)
    ended = _share(
        groups, lambda completion: not completion.is_truncated and completion.token_ids[-1:] in [[stop] for stop in sampling.stop_token_ids]
    )
    prompt_tokens, completion_tokens = fmean(len(group.completions[0].prompt_ids) for group in groups), fmean(len(r.token_ids) for r in completions)
    rewards = [completion.reward for completion in completions]
    signal = {size: _over_prompts(values) for size, values in speaking.items()}
    components = [
        component(name, weight, [completion.scores[name] for completion in completions], reward.range)
        for name, weight, reward in zip(rubric.names, rubric.weights, rubric.rewards, strict=True)
    ]
    return Probe(
        n=n,
        k=k,
        num_generations=num_generations,
        right=None if right is None else sum(right),
        pass_at={} if right is None else {size: _over_prompts([pass_at_k(k, count, size) for count in right]) for size in sizes},
        signal=signal,
        all_right=None if right is None else _over_prompts([chance_of(count, k, num_generations) for count in right]),
        all_wrong=None if right is None else _over_prompts([chance_of(k - count, k, num_generations) for count in right]),
        groups_per_rollout=groups_per_rollout,
        signal_per_rollout=forecast(speaking[num_generations], groups_per_rollout),
        suggested=next((size for size in sizes if size >= min(4, k) and signal[size].value >= ENOUGH), None),
        truncated=truncated,
        ended=ended,
        form=_form(groups, rubric),
        reward=component("reward", 1.0, rewards, rubric.range),
        components=components,
        scored=sum(reward is not None for reward in rewards),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        tokens_per_rollout=round(groups_per_rollout * (prompt_tokens + num_generations * completion_tokens)),
        seconds=seconds,
        rollout_seconds=seconds * groups_per_rollout * num_generations / (n * k),
        checks=checks(setting, truncated.value, ended.value, fmean(reward is None for reward in rewards)),
    )


def component(name: str, weight: float, scores: Sequence[float | None], ends: tuple[float, float] | None) -> Component:
    """Least, most, mean and standard deviation of what one reward gave. ends: its declared range."""
    given = [score for score in scores if score is not None]
    unscored = 1 - len(given) / len(scores)
    if not given:
        return Component(name, weight, None, None, None, None, None, unscored)
    full = None if ends is None else fmean(score == ends[1] for score in given)
    return Component(name, weight, min(given), max(given), fmean(given), pstdev(given), full, unscored)


def _sizes(k: int, num_generations: int) -> list[int]:
    """1, 2, 4, ... up to k, with k and the run's own group size."""
    return sorted({1, k, num_generations} | {2**power for power in range(k.bit_length()) if 2**power <= k})


def _share(groups: list[Group], holds: Callable[[Completion], bool]) -> Estimate:
    """The share of completions for which something holds."""
    return _over_prompts([fmean(holds(completion) for completion in group.completions) for group in groups])


def _over_prompts(values: list[float]) -> Estimate:
    """Exact where every prompt says yes or no; otherwise prompts are drawn again."""
    if set(values) <= {0.0, 1.0}:
        exact = clopper_pearson(round(sum(values)), len(values))
        return Estimate(exact.value, exact.low, exact.high)
    return bootstrap(values)


def _form(groups: list[Group], rubric: Rubric) -> Estimate | None:
    tops = {
        name: reward.range[1] for name, reward in zip(rubric.names, rubric.rewards, strict=True) if reward.range is not None and not reward.decides
    }
    return _share(groups, lambda completion: all(completion.scores[name] == top for name, top in tops.items())) if tops else None
