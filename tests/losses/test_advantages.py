"""Advantages against closed forms and against plain loops with the statistics module."""

import math
import random
import statistics

import pytest
import torch

from posttrain.errors import UserError
from posttrain.losses.advantages import advantages
from posttrain.types import Completion, Group, StopReason, Task

EPS = 1e-4


def mean_std(values):
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def naive(scores, sizes, weights, scale, aggregation):
    """None for unscored. Exact zeros for equal groups are not this function's business: it is compared within rounding."""
    groups, start = [], 0
    for size in sizes:
        groups.append(range(start, start + size))
        start += size

    def combine(rows):
        return [None if all(x is None for x in row) else sum(w * x for w, x in zip(weights, row, strict=True) if x is not None) for row in rows]

    def centre_and_scale(values, index, divide):
        known = [values[i] for i in index if values[i] is not None]
        if not known:
            return
        m, s = mean_std(known)
        for i in index:
            if values[i] is not None:
                values[i] = (values[i] - m) / (s + EPS if divide else 1)

    if aggregation == "normalize_then_sum":
        columns = [list(column) for column in zip(*scores, strict=True)]
        for column in columns:
            for index in groups:
                centre_and_scale(column, index, True)
        values = combine(list(zip(*columns, strict=True)))
        centre_and_scale(values, range(len(values)), True)
    else:
        values = combine(scores)
        spread = mean_std([v for v in values if v is not None])[1]
        for index in groups:
            centre_and_scale(values, index, scale == "group")
        if scale == "batch":
            values = [None if v is None else v / (spread + EPS) for v in values]
    return [0.0 if v is None else v for v in values]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_random_ragged_groups_with_unscored_rewards_equal_plain_loops(scale, aggregation):
    for seed in range(25):
        draw = random.Random(seed)
        sizes = [draw.randint(1, 6) for _ in range(draw.randint(1, 5))]
        rewards = draw.randint(1, 3)
        levels = [0.0, 1.0, -3.0, 0.25] if seed % 2 else [draw.gauss(0, 2) for _ in range(20)]
        scores = [[None if draw.random() < 0.2 else draw.choice(levels) for _ in range(rewards)] for _ in range(sum(sizes))]
        if all(x is None for row in scores for x in row):
            continue
        weights = [draw.uniform(-1, 2) for _ in range(rewards)]
        found = advantages(scores, sizes, weights=weights, scale_rewards=scale, aggregation=aggregation)
        expected = torch.tensor(naive(scores, sizes, weights, scale, aggregation), dtype=torch.float64)
        torch.testing.assert_close(found.advantages, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("correct", "right", "wrong"), [(1, 2.4742, -0.3535), (4, 0.9352, -0.9352)])
def test_binary_rewards_in_groups_of_eight_have_their_closed_form(correct, right, wrong):
    found = advantages([[1.0]] * correct + [[0.0]] * (8 - correct), [8]).advantages
    assert found[0].item() == pytest.approx(right, abs=5e-5)
    assert found[-1].item() == pytest.approx(wrong, abs=5e-5)
    p = correct / 8
    std = math.sqrt(p * (1 - p) * 8 / 7)
    assert found.tolist() == pytest.approx([(1 - p) / (std + EPS)] * correct + [-p / (std + EPS)] * (8 - correct), rel=1e-12)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-9, 7.3e8, -2.7])
def test_equal_rewards_give_advantage_exactly_zero(value, scale, aggregation):
    scores = [[value]] * 7 + [[0.0], [1.0]]
    found = advantages(scores, [7, 2], scale_rewards=scale, aggregation=aggregation)
    assert (found.advantages[:7] == 0).all()
    assert (found.advantages[7:] != 0).all()
    assert found.is_zero_std.tolist() == [True, False]


def test_equal_sums_that_differ_in_their_last_bit_are_equal():
    assert 0.1 + 0.2 != 0.3
    found = advantages([[0.1, 0.2], [0.3, 0.0], [0.0, 0.3]], [3])
    assert found.advantages.tolist() == [0, 0, 0]
    assert found.is_zero_std.tolist() == [True]


@pytest.mark.parametrize(
    "rewards", [[0.1 + 0.2, 0.3, 0.3], [1.0, 1.0 + 1e-9], [None, 2.0], [None, None], [], [-5.0, -5.0], [0.0, -0.0], [None, 1.0, 2.0]]
)
def test_a_group_has_signal_where_an_advantage_is_not_zero(rewards):
    group = Group(Task(0, "?"), [Completion([1], [2], [True], [0.0], [0.0], StopReason.STOP, "", reward=reward) for reward in rewards])
    assert group.has_signal == bool((advantages([[reward] for reward in rewards], [len(rewards)]).advantages != 0).any() if rewards else False)


def test_small_differences_that_are_real_stay():
    found = advantages([[1.0], [1.0 + 1e-9]], [2], scale_rewards="none").advantages
    assert found.tolist() == pytest.approx([-5e-10, 5e-10], rel=1e-6)


def test_normalising_first_sees_trade_offs_that_a_sum_hides():
    scores = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]  # equal sums
    assert (advantages(scores, [4]).advantages == 0).all()
    gdpo = advantages(scores, [4], weights=[1.0, 2.0], aggregation="normalize_then_sum")
    assert gdpo.advantages[0] < 0 < gdpo.advantages[1]
    assert gdpo.is_zero_std.tolist() == [False]


def test_an_unscored_row_gets_zero_and_moves_nobody():
    with_gap = advantages([[1.0], [None], [0.0], [float("nan")], [0.5]], [5])
    without = advantages([[1.0], [0.0], [0.5]], [3])
    assert with_gap.advantages[[1, 3]].tolist() == [0, 0]
    torch.testing.assert_close(with_gap.advantages[[0, 2, 4]], without.advantages)
    assert with_gap.rewards.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_monitor_moves_no_advantage(scale, aggregation):
    scores = [[1.0, 5.0], [None, 7.0], [0.0, None], [0.5, -3.0], [None, 2.0], [None, 3.0]]
    settings = {"scale_rewards": scale, "aggregation": aggregation}
    found, alone = advantages(scores, [4, 2], weights=[1.0, 0.0], **settings), advantages([row[:1] for row in scores], [4, 2], **settings)
    for name, value in vars(alone).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0, equal_nan=True)


def test_monitors_alone_give_no_reward():
    found = advantages([[1.0], [2.0]], [2], weights=[0.0])
    assert found.advantages.tolist() == [0, 0]
    assert found.rewards.isnan().all()


def test_a_reward_that_could_not_be_scored_leaves_the_others():
    assert advantages([[1.0, None], [0.5, 2.0]], [2], weights=[2.0, 1.0]).rewards.tolist() == [2.0, 3.0]


def test_groups_with_fewer_than_two_scores_have_nothing_to_compare():
    found = advantages([[None], [None], [3.0], [None], [2.0]], [2, 2, 1])
    assert found.advantages.tolist() == [0] * 5
    assert found.is_zero_std.tolist() == [True] * 3


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_sum_to_zero(scale):
    scores = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    found = advantages(scores, [8, 4, 12], scale_rewards=scale).advantages
    assert [part.sum().abs().item() < 1e-12 for part in found.split([8, 4, 12])] == [True] * 3


@pytest.mark.parametrize(("size", "p"), [(8, 0.5), (8, 0.1), (8, 0.98), (16, 0.1), (4, 0.1)])
def test_the_share_of_groups_without_signal_follows_the_binomial_law(size, p):
    groups = 4000
    scores = (torch.rand(groups * size, 1, generator=torch.Generator().manual_seed(size)) < p).double()
    share = advantages(scores, [size] * groups).is_zero_std.double().mean().item()
    truth = p**size + (1 - p) ** size
    assert abs(share - truth) < 4 * math.sqrt(truth * (1 - truth) / groups)


def test_weights_of_another_length_are_refused():
    with pytest.raises(UserError, match="one weight per reward"):
        advantages([[1.0, 2.0]], [1], weights=[1.0])


def test_an_unknown_scale_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'group'"):
        advantages([[1.0]], [1], scale_rewards="groups")


def test_sizes_that_do_not_cover_the_rows_are_refused():
    with pytest.raises(ValueError, match="do not cover"):
        advantages([[1.0]] * 5, [2, 2])


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scores", [torch.zeros(0, 2), []], ids=["tensor", "list"])
def test_no_groups_at_all_are_no_error(scores, aggregation):
    found = advantages(scores, [], weights=[1.0, 2.0], aggregation=aggregation)
    assert (len(found.advantages), len(found.is_zero_std)) == (0, 0)
