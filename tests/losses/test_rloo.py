"""RLOO's baseline and its sequence-level clip against plain loops, and the expected gradient on a bandit."""

import math
import random

import pytest
import torch

from posttrain.losses.policy import RLOO, PolicyOptions, policy_terms
from posttrain.losses.rloo import leave_one_out


def naive(groups):
    """One list of rewards per group, None where not scored."""
    out = []
    for group in groups:
        for i, reward in enumerate(group):
            others = [other for j, other in enumerate(group) if j != i and other is not None]
            out.append(0.0 if reward is None or not others else reward - sum(others) / len(others))
    return out


def as_tensor(groups):
    return torch.tensor([math.nan if r is None else r for group in groups for r in group], dtype=torch.float64)


GROUPS = [[1.0, 0.0, 0.5], [2.0, None, -1.0, 3.5], [None, 4.0], [0.1 + 0.2, 0.3, 0.3], [None, None]]


def test_the_baseline_leaves_the_completion_itself_out():
    found = leave_one_out(as_tensor(GROUPS), [len(group) for group in GROUPS])
    assert found.tolist() == pytest.approx(naive(GROUPS), abs=1e-12)


def test_equal_rewards_give_exactly_nothing():
    found = leave_one_out(as_tensor([[0.1 + 0.2, 0.3, 0.3]]), [3])
    assert found.tolist() == [0.0, 0.0, 0.0]
    normalised = leave_one_out(as_tensor([[0.3, 0.3], [0.1, 0.7, 0.3], [1.9, 0.2, 0.05]]), [2, 3, 3], normalize=True)
    assert normalised[:2].tolist() == [0.0, 0.0]
    assert (normalised[2:] != 0).all()


def test_normalised_advantages_are_standardised_over_the_scored_ones():
    found = leave_one_out(as_tensor(GROUPS), [len(group) for group in GROUPS], normalize=True)
    plain = [a for a, r in zip(naive(GROUPS), as_tensor(GROUPS).tolist(), strict=True) if not math.isnan(r)]
    mean = sum(plain) / len(plain)
    deviation = (sum((a - mean) ** 2 for a in plain) / (len(plain) - 1)) ** 0.5
    expected = iter([(a - mean) / (deviation + 1e-4) for a in plain])
    assert found.tolist() == pytest.approx([0.0 if math.isnan(r) else next(expected) for r in as_tensor(GROUPS).tolist()], abs=1e-9)


def test_loss_and_gradient_equal_a_loop_over_completions():
    rng = random.Random(3)
    lengths, T = [3, 1, 4, 0], 4
    new, old = (torch.tensor([[rng.uniform(-2, 0) for _ in range(T)] for _ in lengths], dtype=torch.float64) for _ in range(2))
    old = new + (old - new) * 0.15  # ratios on both sides of the clip
    advantages = torch.tensor([1.3, -0.4, -2.0, 0.7], dtype=torch.float64)
    mask = torch.tensor([[t < length for t in range(T)] for length in lengths])

    def loop(logps):
        total = 0.0
        for i, length in enumerate(lengths):
            ratio = math.exp(sum(logps[i][t] - old[i, t].item() for t in range(length)))
            a = advantages[i].item()
            total -= min(ratio * a, min(max(ratio, 0.8), 1.25) * a) if length else 0.0
        return total / len(lengths)

    leaf = new.clone().requires_grad_()
    terms = policy_terms(leaf, old, advantages, mask, objective=RLOO, options=PolicyOptions(epsilon=0.2, epsilon_high=0.25))
    weights = RLOO.row_weights(torch.tensor(lengths, dtype=torch.float64), num_rows=len(lengths), num_tokens=sum(lengths), max_completion_length=T)
    loss = (terms.per_token * weights[:, None]).sum()
    loss.backward()
    assert loss.item() == pytest.approx(loop(new.tolist()), rel=1e-10)
    for i in range(len(lengths)):
        for t in range(T):
            up, down = new.tolist(), new.tolist()
            up[i][t] += 1e-6
            down[i][t] -= 1e-6
            assert leaf.grad[i, t].item() == pytest.approx((loop(up) - loop(down)) / 2e-6, abs=1e-7)


def test_the_expected_gradient_is_the_policy_gradient_itself():
    """Over all pairs of draws from a bandit: leaving a completion out of its baseline keeps the gradient of the expected reward unbiased."""
    logits = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.2, -0.6], dtype=torch.float64)
    exact = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)[0]
    total = torch.zeros(3, dtype=torch.float64)
    p = logits.softmax(0).detach()
    for i in range(3):
        for j in range(3):
            a = leave_one_out(rewards[[i, j]], [2])
            logps = logits.log_softmax(0)[[i, j]][:, None]
            terms = policy_terms(logps, None, a, torch.ones(2, 1), objective=RLOO, options=PolicyOptions())
            total += p[i] * p[j] * torch.autograd.grad(-terms.per_token.sum() / 2, logits)[0]
    assert torch.allclose(total, exact, atol=1e-12)
