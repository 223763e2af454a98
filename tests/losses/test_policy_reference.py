"""Each objective under each setting against naive float loops: values, and gradients by central differences."""

import itertools
import random

import pytest
import torch
from naive_objectives import Setting, aggregate, row_terms

from posttrain.losses.policy import OBJECTIVES, PolicyOptions, policy_terms

T, MAX_LENGTH, GENERATION_TOKENS = 5, 9, 37
STEP = 1e-5

VARIANTS = {
    "plain": {},
    "clip_higher": {"epsilon": 0.1, "epsilon_high": 1.15},
    "delta": {"delta": 1.3},
    "sequence": {"sequence": True},
    "k3": {"beta": 0.3, "corrected": False},
    "k3_corrected": {"beta": 0.3},
    "k3_corrected_sequence": {"beta": 0.3, "sequence": True},
    "k2": {"beta": 0.3, "kl": "k2", "corrected": False},
    "k2_corrected": {"beta": 0.3, "kl": "k2"},
    "off_policy_mask": {"threshold": 0.05, "beta": 0.3},
    "everything": {"epsilon": 0.15, "epsilon_high": 1.2, "delta": 1.5, "sequence": True, "beta": 0.2, "threshold": 0.1},
    "gates": {"tau": (0.7, 1.6), "vespo": ((1.5, 2.5), (2.0, 1.0))},
}


def options_of(s: Setting) -> PolicyOptions:
    return PolicyOptions(
        epsilon=s.epsilon,
        epsilon_high=s.epsilon_high,
        delta=s.delta,
        importance_sampling_level="sequence" if s.sequence else "token",
        sapo_temperature_pos=s.tau[0],
        sapo_temperature_neg=s.tau[1],
        vespo_k_pos=s.vespo[0][0],
        vespo_lambda_pos=s.vespo[0][1],
        vespo_k_neg=s.vespo[1][0],
        vespo_lambda_neg=s.vespo[1][1],
        beta=s.beta,
        kl_estimator=s.kl,
        use_bias_correction_kl=s.corrected,
        off_policy_mask_threshold=s.threshold,
    )


def random_rows(seed):
    draw = random.Random(seed)
    lengths = [5, 3, 1, 0, 4, 2]
    masks = [[t < n for t in range(T)] for n in lengths]
    masks[4][1] = False  # a token that a tool wrote, in the middle
    logps = [[draw.uniform(-3, -0.1) for _ in range(T)] for _ in lengths]
    old = [[x + draw.gauss(0, 0.3) for x in row] for row in logps]
    ref = [[x + draw.gauss(0, 0.4) for x in row] for row in logps]
    advantages = [1.3, -0.8, 0.4, 0.7, -1.9, 0.0]
    return logps, old, ref, masks, advantages


def naive_loss(s, logps, frozen, old, ref, masks, advantages, policy_masks=None):
    policy_masks = policy_masks or [None] * len(logps)
    rows = zip(logps, frozen, old, ref, masks, advantages, policy_masks, strict=True)
    return aggregate(s.name, [row_terms(s, *row) for row in rows], masks, max_length=MAX_LENGTH, generation_tokens=GENERATION_TOKENS)


def naive_gradient(s, logps, old, ref, masks, advantages, policy_masks=None):
    gradient = [[0.0] * T for _ in logps]
    for i, t in itertools.product(range(len(logps)), range(T)):
        values = []
        for sign in (1, -1):
            moved = [list(row) for row in logps]
            moved[i][t] += sign * STEP
            values.append(naive_loss(s, moved, logps, old, ref, masks, advantages, policy_masks))
        gradient[i][t] = (values[0] - values[1]) / (2 * STEP)
    return gradient


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def measured(s, logps, old, ref, masks, advantages, policy_masks=None):
    leaf = tensor(logps).requires_grad_()
    objective, mask = OBJECTIVES[s.name], torch.tensor(masks)
    terms = policy_terms(
        leaf,
        None if old is None else tensor(old),
        tensor(advantages),
        mask,
        objective=objective,
        options=options_of(s),
        ref_logps=tensor(ref),
        policy_mask=None if policy_masks is None else torch.tensor(policy_masks),
    )
    own_tokens = int(mask.sum())
    tokens = GENERATION_TOKENS if objective.tokens_of == "generation" else own_tokens
    weights = objective.row_weights(mask.sum(1).double(), num_rows=len(logps), num_tokens=tokens, max_completion_length=MAX_LENGTH)
    loss = (terms.per_token * weights[:, None]).sum()
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_equal_the_naive_formula_away_from_the_old_policy(name, variant):
    s = Setting(name, **VARIANTS[variant])
    logps, old, ref, masks, advantages = random_rows(seed=sum(map(ord, name + variant)))
    loss, gradient = measured(s, logps, old, ref, masks, advantages)
    assert loss.item() == pytest.approx(naive_loss(s, logps, logps, old, ref, masks, advantages), abs=1e-10)
    torch.testing.assert_close(gradient, tensor(naive_gradient(s, logps, old, ref, masks, advantages)), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("variant", ["plain", "delta", "sequence", "k3", "k3_corrected", "k2_corrected"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_equal_the_naive_formula_on_the_first_update(name, variant):
    s = Setting(name, **VARIANTS[variant])
    logps, _, ref, masks, advantages = random_rows(seed=len(name))
    loss, gradient = measured(s, logps, None, ref, masks, advantages)
    assert loss.item() == pytest.approx(naive_loss(s, logps, logps, logps, ref, masks, advantages), abs=1e-10)
    torch.testing.assert_close(gradient, tensor(naive_gradient(s, logps, logps, ref, masks, advantages)), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_policy_mask_stops_the_policy_term_and_leaves_kl_and_denominators(name):
    s = Setting(name, beta=0.3)
    logps, old, ref, masks, advantages = random_rows(seed=5)
    draw = random.Random(6)
    policy_masks = [[draw.random() < 0.5 for _ in range(T)] for _ in logps]
    loss, gradient = measured(s, logps, old, ref, masks, advantages, policy_masks)
    assert loss.item() == pytest.approx(naive_loss(s, logps, logps, old, ref, masks, advantages, policy_masks), abs=1e-10)
    expected = tensor(naive_gradient(s, logps, old, ref, masks, advantages, policy_masks))
    torch.testing.assert_close(gradient, expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_random_settings_equal_the_naive_formula(seed):
    draw = random.Random(1000 + seed)
    s = Setting(
        draw.choice(list(OBJECTIVES)),
        epsilon=draw.uniform(0.05, 0.4),
        epsilon_high=draw.uniform(0.05, 1.5),
        delta=draw.choice([None, draw.uniform(1, 2)]),
        sequence=draw.random() < 0.5,
        beta=draw.choice([0.0, draw.uniform(0, 1)]),
        kl=draw.choice(["k2", "k3"]),
        corrected=draw.random() < 0.5,
        threshold=draw.choice([None, draw.uniform(-0.2, 0.2)]),
    )
    logps, old, ref, masks, advantages = random_rows(seed)
    loss, gradient = measured(s, logps, old, ref, masks, advantages)
    assert loss.item() == pytest.approx(naive_loss(s, logps, logps, old, ref, masks, advantages), abs=1e-10)
    torch.testing.assert_close(gradient, tensor(naive_gradient(s, logps, old, ref, masks, advantages)), atol=1e-8, rtol=1e-6)
