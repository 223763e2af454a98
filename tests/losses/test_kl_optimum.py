"""Which policy each KL estimator leads to. A four-armed bandit has closed forms; gradients are exact expectations over its arms."""

import pytest
import torch

from posttrain.losses.kl import k1_penalty
from posttrain.losses.policy import OBJECTIVES, PolicyOptions, policy_terms

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
REF = torch.full((4,), 0.25, dtype=torch.float64)


def expected_gradient(logits, options, *, beta_in_reward=0.0):
    """d/d logits of the loss, averaged over the arms with the policy's own probabilities (the sampler's, so without gradient)."""
    logits = logits.detach().requires_grad_()
    logps = logits.log_softmax(0)[:, None]  # (4, 1): one row per arm
    p, mask = logps.detach().exp(), torch.ones(4, 1, dtype=torch.bool)
    rewards = REWARDS - beta_in_reward * k1_penalty(logps, REF.log()[:, None], mask)
    advantages = rewards - (p[:, 0] * rewards).sum()
    terms = policy_terms(logps, None, advantages, mask, objective=OBJECTIVES["grpo"], options=options, ref_logps=REF.log()[:, None])
    (terms.per_token * p).sum().backward()
    return logits.grad


def optimum(options, *, beta_in_reward=0.0):
    logits = torch.zeros(4, dtype=torch.float64)
    for _ in range(1500):
        p = logits.softmax(0)
        gradient = expected_gradient(logits, options, beta_in_reward=beta_in_reward)
        logits = logits - 0.3 * gradient / p.clamp(min=1e-3)  # divided by p: natural-gradient steps, which converge fast in the corners too
        if gradient.abs().max() < 1e-12:
            break
    return logits.softmax(0)


def reverse_kl_optimum(beta):
    tilted = REF * torch.exp(REWARDS / beta)
    return tilted / tilted.sum()


def forward_kl_optimum(beta):
    """beta * ref / (c - r), with c found by bisection so that it sums to 1."""
    low, high = 1.0 + 1e-12, 1.0 + 10 * beta
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (beta * REF / (c - REWARDS)).sum() > 1 else (low, c)
    return beta * REF / (c - REWARDS)


@pytest.mark.parametrize(("beta", "best_arm"), [(0.5, 0.7112), (0.2, 0.9802)])
@pytest.mark.parametrize(("estimator", "corrected"), [("k2", False), ("k2", True), ("k3", True)])
def test_k2_and_corrected_k3_reach_the_reverse_kl_optimum(estimator, corrected, beta, best_arm):
    reached = optimum(PolicyOptions(beta=beta, kl_estimator=estimator, use_bias_correction_kl=corrected))
    torch.testing.assert_close(reached, reverse_kl_optimum(beta), atol=1e-6, rtol=0)
    assert reached[0].item() == pytest.approx(best_arm, abs=5e-5)


@pytest.mark.parametrize(("beta", "best_arm"), [(0.5, 0.7112), (0.2, 0.9802)])
def test_k1_in_the_reward_reaches_the_reverse_kl_optimum(beta, best_arm):
    reached = optimum(PolicyOptions(beta=beta, kl_estimator="k1"), beta_in_reward=beta)
    torch.testing.assert_close(reached, reverse_kl_optimum(beta), atol=1e-6, rtol=0)
    assert reached[0].item() == pytest.approx(best_arm, abs=5e-5)


@pytest.mark.parametrize(("beta", "best_arm"), [(0.5, 0.6830), (0.2, 0.8583)])
def test_plain_k3_reaches_the_forward_kl_optimum(beta, best_arm):
    reached = optimum(PolicyOptions(beta=beta, kl_estimator="k3", use_bias_correction_kl=False))
    torch.testing.assert_close(reached, forward_kl_optimum(beta), atol=1e-6, rtol=0)
    assert reached[0].item() == pytest.approx(best_arm, abs=5e-5)


def test_k1_never_enters_the_loss():
    logits = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    gradient = expected_gradient(logits, PolicyOptions(beta=0.7, kl_estimator="k1"))
    assert torch.equal(gradient, expected_gradient(logits, PolicyOptions()))


def test_k1_penalty_is_summed_over_trained_tokens_and_gets_no_gradient():
    logps = torch.tensor([[-1.0, -2.0, float("nan")], [-0.5, -0.5, -0.5]], requires_grad=True)
    penalty = k1_penalty(logps, torch.full((2, 3), -1.5), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert penalty.tolist() == [0.0, 0.0]
    penalty = k1_penalty(logps, torch.full((2, 3), -3.0), torch.tensor([[1, 1, 0], [1, 0, 1]]))
    assert penalty.tolist() == [3.0, 5.0]
    assert not penalty.requires_grad


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_logged_kl_is_measured_even_at_beta_zero(estimator):
    torch.manual_seed(0)
    logits, ref_logits = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    arms = torch.multinomial(logits.softmax(0), 200_000, replacement=True)
    logps, ref = logits.log_softmax(0)[arms, None], ref_logits.log_softmax(0)[arms, None]
    options = PolicyOptions(kl_estimator=estimator)
    terms = policy_terms(logps, None, torch.zeros(len(arms)), torch.ones_like(logps), objective=OBJECTIVES["dapo"], options=options, ref_logps=ref)
    p, q = logits.softmax(0), ref_logits.softmax(0)
    truth = {"k1": (p * (p / q).log()).sum(), "k2": (p * (p / q).log() ** 2 / 2).sum(), "k3": (p * (p / q).log()).sum()}[estimator]
    assert terms.metrics["kl"].mean == pytest.approx(truth.item(), rel=0.02)
