"""The reward model's loss against loops, and on a bandit: it recovers the rewards behind the preferences, up to a constant."""

import math

import pytest
import torch

from posttrain.losses.reward import bradley_terry, centring, is_ordered


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, generator=generator, dtype=torch.float64).mul(3).requires_grad_() for _ in range(2)]


def test_values_and_gradients_equal_a_loop(scores):
    chosen, rejected = scores
    margin = torch.linspace(0, 1, 7, dtype=torch.float64)
    (bradley_terry(chosen, rejected, margin) + 0.01 * centring(chosen, rejected)).sum().backward()
    for i in range(7):
        c, r, m = chosen[i].item(), rejected[i].item(), margin[i].item()
        wrong = 1 / (1 + math.exp(c - r - m))  # probability of the other order
        assert bradley_terry(chosen, rejected, margin)[i].item() == pytest.approx(math.log1p(math.exp(-(c - r - m))), rel=1e-12)
        assert chosen.grad[i].item() == pytest.approx(-wrong + 0.02 * (c + r), rel=1e-10)
        assert rejected.grad[i].item() == pytest.approx(wrong + 0.02 * (c + r), rel=1e-10)


def test_huge_differences_stay_finite():
    far = torch.tensor([1e4, -1e4], dtype=torch.float64)
    assert torch.isfinite(bradley_terry(far, -far)).all()


def test_equal_scores_are_not_in_order():
    assert not is_ordered(torch.zeros(2), torch.zeros(2)).any()


@pytest.mark.parametrize("centred", [False, True])
def test_rewards_of_a_bandit_come_back_up_to_a_constant(centred):
    """Expected loss under Bradley-Terry labels of known rewards: the minimiser is those rewards plus a constant. Centring chooses the constant
    (and shrinks, so its weight must be small)."""
    truth = torch.tensor([1.5, 0.3, -0.7, 0.0, 2.2], dtype=torch.float64)
    learned = torch.full_like(truth, 3.0).requires_grad_()
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    first, second = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    preferred = torch.sigmoid(truth[first] - truth[second])  # probability that the first one is chosen
    optimizer = torch.optim.LBFGS([learned], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (preferred * bradley_terry(learned[first], learned[second])).sum()
        if centred:
            loss = loss + 1e-6 * centring(learned[first], learned[second]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = learned.detach()
    assert torch.allclose(found - found.mean(), truth - truth.mean(), atol=1e-4 if centred else 1e-6)
    if centred:
        assert abs(found.mean().item()) < 1e-2
