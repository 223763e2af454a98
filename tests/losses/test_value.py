"""GAE, whitening and the value loss against plain loops, in float64."""

import math
import random

import pytest
import torch

from posttrain.losses.value import Moments, generalised_advantages, sums, token_rewards, value_loss, whitened

B, T = 5, 7


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(1)

    def draw():
        return torch.randn(B, T, generator=generator, dtype=torch.float64)

    mask = torch.zeros(B, T, dtype=torch.bool)
    for row, length in enumerate([7, 4, 1, 0, 6]):
        mask[row, :length] = True
    mask[4, 2:4] = False  # an environment spoke in between
    return draw(), draw(), mask, torch.randn(B, generator=generator, dtype=torch.float64)


def loop(rewards, values, final, gamma, lam):
    """GAE of one completion by its definition: sums of discounted residuals."""
    after = [*values[1:], final] if values else []
    deltas = [r + gamma * nxt - v for r, nxt, v in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_equal_the_sum_of_residuals(table, gamma, lam):
    rewards, values, mask, final = table
    advantages, returns = generalised_advantages(rewards, values, mask, final, gamma=gamma, lam=lam)
    for row in range(B):
        drawn = [t for t in range(T) if mask[row, t]]
        expected = loop([rewards[row, t].item() for t in drawn], [values[row, t].item() for t in drawn], final[row].item(), gamma, lam)
        for t, value in zip(drawn, expected, strict=True):
            assert advantages[row, t].item() == pytest.approx(value, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(value + values[row, t].item(), abs=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_a_cut_completion_is_worth_what_would_have_come_and_an_ended_one_is_not():
    rewards, values, mask = torch.tensor([[0.0, 1.0]] * 2), torch.zeros(2, 2), torch.ones(2, 2)
    _, returns = generalised_advantages(rewards, values, mask, torch.tensor([0.0, 5.0]), gamma=0.5, lam=1.0)
    assert returns.tolist() == [[0.5, 1.0], [1.75, 3.5]]


def test_with_lambda_one_and_no_values_the_advantage_is_the_return(table):
    rewards, _, mask, final = table
    advantages, _ = generalised_advantages(rewards, torch.zeros(B, T, dtype=torch.float64), mask, torch.zeros_like(final), gamma=1.0, lam=1.0)
    assert torch.allclose(advantages[:, 0] * mask[:, 0], (rewards * mask).sum(1), atol=1e-12)


def test_the_score_stands_at_the_last_drawn_token(table):
    kl, _, mask, scores = table
    rewards = token_rewards(scores, kl, mask, 0.1)
    for row in range(B):
        drawn = [t for t in range(T) if mask[row, t]]
        for t in range(T):
            expected = -0.1 * kl[row, t].item() * (t in drawn) + (scores[row].item() if drawn and t == drawn[-1] else 0.0)
            assert rewards[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_whitened_values_have_mean_zero_and_variance_one_over_all_parts(table):
    values, _, mask, _ = table
    halves = [sums(values[:2], mask[:2]), sums(values[2:], mask[2:])]  # as two processes would send them
    moments = Moments.of(halves)
    drawn = values[mask]
    assert moments.mean == pytest.approx(drawn.mean().item(), rel=1e-12)
    assert moments.variance == pytest.approx(drawn.var().item(), rel=1e-10)
    result = whitened(values, mask, moments)
    assert result[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert result[mask].std().item() == pytest.approx(1, rel=1e-6)
    assert whitened(values, mask, moments, shift_mean=False)[mask].mean().item() == pytest.approx(moments.mean, rel=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare_is_whitened_to_zero(count):
    values, mask = torch.full((1, 2), 3.0), torch.tensor([[True, True]]) & torch.tensor([[count > 0, False]])
    assert not whitened(values, mask, Moments.of([sums(values, mask)])).any()


def naive_value_loss(value, old, target, clip):
    held = min(max(value, old - clip), old + clip)
    return 0.5 * max((value - target) ** 2, (held - target) ** 2)


def test_value_loss_and_gradient_equal_a_loop():
    rng = random.Random(0)
    values, old, returns = (torch.tensor([[rng.uniform(-1, 1) for _ in range(T)] for _ in range(B)], dtype=torch.float64) for _ in range(3))
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > 0.3
    values.requires_grad_()
    loss, _ = value_loss(values, old, returns, mask, cliprange=0.2)
    loss.sum().backward()
    for row in range(B):
        for t in range(T):
            numbers = [tensor[row, t].item() for tensor in (values, old, returns)]
            expected = naive_value_loss(*numbers, 0.2) if mask[row, t] else 0.0
            assert loss[row, t].item() == pytest.approx(expected, abs=1e-12)
            v, o, r = numbers
            slope = (naive_value_loss(v + 1e-6, o, r, 0.2) - naive_value_loss(v - 1e-6, o, r, 0.2)) / 2e-6 if mask[row, t] else 0.0
            assert values.grad[row, t].item() == pytest.approx(slope, abs=1e-6)


def test_masked_values_may_be_anything():
    values = torch.tensor([[math.nan, 1.0]], requires_grad=True)
    loss, _ = value_loss(values, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[False, True]]), cliprange=10.0)
    loss.sum().backward()
    assert loss.tolist() == [[0.0, 0.5]]
    assert values.grad.tolist() == [[0.0, 1.0]]
