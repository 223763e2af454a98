"""A language model small enough to enumerate: three tokens over four symbols, 64 strings, 4096 groups of two.

The gradient of each objective, averaged over sampled groups, must agree with its exact expectation over all groups (chi-square over all
84 logits). The exact side shares no code with the losses: float loops for the terms, differences for their gradient.
"""

import itertools
import math
from collections import defaultdict
from functools import cache

import pytest
import torch
from naive_objectives import Setting, aggregate, row_terms
from scipy.stats import chi2

from posttrain.losses.advantages import advantages
from posttrain.losses.policy import OBJECTIVES, PolicyOptions, policy_terms

SYMBOLS, LENGTH, GROUPS = 4, 3, 5000
STRINGS = list(itertools.product(range(SYMBOLS), repeat=LENGTH))
STATES = torch.tensor([[0, 1 + s[0], 5 + 4 * s[0] + s[1]] for s in STRINGS])  # (64, 3) which row of logits gives each token
TOKENS = torch.tensor(STRINGS)
LENGTHS = [s.index(0) + 1 if 0 in s else LENGTH for s in STRINGS]  # symbol 0 ends a completion and is trained; what follows is masked out
MASK = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
REWARDS = [0.5 * s[:n].count(1) + (s[0] == 2) - 0.3 * (n == LENGTH) for s, n in zip(STRINGS, LENGTHS, strict=True)]


def logits_of(seed, spread):
    return spread * torch.randn(21, SYMBOLS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OLD = logits_of(0, 0.5)
REF = OLD + logits_of(1, 0.3)
SHIFTED = OLD + logits_of(2, 0.3)
SETTINGS = {
    "first_update": (OLD, Setting("", beta=0.0)),
    "after_a_shift": (SHIFTED, Setting("", beta=0.1)),
    "after_a_shift_plain_k3_sequence": (SHIFTED, Setting("", beta=0.1, corrected=False, sequence=True, epsilon_high=1.3, delta=1.4)),
}


def logps_of(logits):
    """(64, 3) log-prob of each token of each string."""
    return logits.log_softmax(1)[STATES, TOKENS]


@cache
def scores_of(logits):
    """(64, 3, 84) gradient of each token's log-prob in all logits: one-hot minus softmax, in the token's state."""
    table = torch.zeros(len(STRINGS), LENGTH, 21, SYMBOLS, dtype=torch.float64)
    for i, t in itertools.product(range(len(STRINGS)), range(LENGTH)):
        table[i, t, STATES[i, t]] = -logits[STATES[i, t]].softmax(0)
        table[i, t, STATES[i, t], TOKENS[i, t]] += 1
    return table.flatten(2)


def setting_for(name, case):
    logits, base = SETTINGS[case]
    return logits, Setting(**(base.__dict__ | {"name": name}))


def exact_gradient(name, case):
    """(84,) expectation over all pairs of strings: 2 sum_ij p_i p_j weight_ij d terms_i(A_ij), for both rows play the same part."""
    logits, s = setting_for(name, case)
    new, old, ref = (logps_of(x).tolist() for x in (logits, OLD, REF))
    p = logps_of(OLD).sum(1).exp().tolist()

    def row_gradient(i, advantage):
        gradient = []
        for t in range(LENGTH):
            ends = []
            for sign in (1, -1):
                moved = list(new[i])
                moved[t] += sign * 1e-5
                ends.append(sum(row_terms(s, moved, new[i], old[i], ref[i], MASK[i].tolist(), advantage)))
            gradient.append((ends[0] - ends[1]) / 2e-5)
        return gradient

    @cache
    def weight(own, other):
        masks = [[t < own for t in range(LENGTH)], [t < other for t in range(LENGTH)]]
        return aggregate(name, [[1.0, 0, 0], [0.0, 0, 0]], masks, max_length=LENGTH, generation_tokens=own + other)

    shares: defaultdict[tuple[int, float], float] = defaultdict(float)  # of a row by its string and its advantage
    for i, j in itertools.product(range(len(STRINGS)), repeat=2):
        gap = REWARDS[i] - REWARDS[j]
        advantage = round(gap / 2 / (abs(gap) / math.sqrt(2) + 1e-4), 12)
        shares[i, advantage] += 2 * p[i] * p[j] * weight(LENGTHS[i], LENGTHS[j])
    expected = torch.zeros(len(STRINGS), LENGTH, dtype=torch.float64)
    for (i, advantage), share in shares.items():
        expected[i] += share * torch.tensor(row_gradient(i, advantage), dtype=torch.float64)
    return torch.einsum("it,itp->p", expected, scores_of(logits))


def draw_strings(logits, n, generator):
    """(n,) indices of strings, drawn token by token."""
    state, index = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    for first_state_of_next in (1, 5, 0):
        token = torch.multinomial(logits.softmax(1)[state], 1, generator=generator)[:, 0]
        index = SYMBOLS * index + token
        state = first_state_of_next + index if first_state_of_next else state
    return index


@pytest.fixture(scope="module")
def completions():
    """Groups of two sampled strings and their advantages."""
    index = draw_strings(OLD, 2 * GROUPS, torch.Generator().manual_seed(7))
    found = advantages([[REWARDS[i]] for i in index.tolist()], [2] * GROUPS)
    return index, found.advantages


def library_gradients(name, case, index, advantage):
    """(groups, 84) gradient of each group's loss."""
    logits, s = setting_for(name, case)
    options = PolicyOptions(
        epsilon_high=s.epsilon_high,
        delta=s.delta,
        importance_sampling_level="sequence" if s.sequence else "token",
        beta=s.beta,
        use_bias_correction_kl=s.corrected,
    )
    objective, leaf, mask = OBJECTIVES[name], logps_of(logits)[index].requires_grad_(), MASK[index]
    old = None if logits is OLD else logps_of(OLD)[index]
    terms = policy_terms(leaf, old, advantage, mask, objective=objective, options=options, ref_logps=logps_of(REF)[index])
    lengths = mask.sum(1).double()
    tokens = lengths.view(-1, 2).sum(1).repeat_interleave(2)
    weights = objective.row_weights(lengths, num_rows=2, num_tokens=tokens, max_completion_length=LENGTH)
    (terms.per_token * weights[:, None]).sum().backward()
    return torch.einsum("nt,ntp->np", leaf.grad, scores_of(logits)[index]).view(-1, 2, 84).sum(1)


def p_value(gradients, exact):
    """Chi-square of the mean against `exact` in the directions that vary; in the others it must agree to rounding."""
    difference = gradients.mean(0) - exact
    variances, directions = torch.linalg.eigh(torch.cov(gradients.T))
    varies = variances > 1e-9 * variances.max()
    along = directions.T @ difference
    assert along[~varies].abs().max() < 1e-7
    distance = (along[varies] ** 2 / (variances[varies] / len(gradients))).sum().item()
    return chi2.sf(distance, int(varies.sum()))


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_sampled_gradient_agrees_with_full_enumeration(name, case, completions):
    assert p_value(library_gradients(name, case, *completions), exact_gradient(name, case)) > 1e-3


def test_the_chi_square_tells_objectives_apart(completions):
    exact = exact_gradient("grpo", "first_update")
    assert p_value(library_gradients("dapo", "first_update", *completions), exact) < 1e-6
    assert p_value(library_gradients("grpo", "after_a_shift", *completions), exact_gradient("sapo", "after_a_shift")) < 1e-6


@pytest.mark.parametrize(("name", "divisor"), [("dr_grpo", LENGTH), ("luspo", 1)])
def test_without_scaling_the_expected_gradient_is_that_of_the_expected_reward(name, divisor):
    """No sampling at all: over all weighted pairs, a centred group of two has half the gradient of E[reward] per row."""
    logits = OLD.clone().requires_grad_()
    visible = torch.where(MASK, logits.log_softmax(1)[STATES, TOKENS], 0.0).sum(1)  # (64,) the rest of a string is never seen
    hidden = torch.where(MASK, 0.0, logps_of(OLD)).sum(1)
    ((visible + hidden).exp() * torch.tensor(REWARDS)).sum().backward()

    first, second = torch.cartesian_prod(torch.arange(64), torch.arange(64)).T
    index = torch.stack([first, second], 1).flatten()
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    gap = (rewards[first] - rewards[second]) / 2
    centred = torch.stack([gap, -gap], 1).flatten()
    p = logps_of(OLD).sum(1).exp()
    expected = (library_gradients(name, "first_update", index, centred) * (p[first] * p[second])[:, None]).sum(0)
    torch.testing.assert_close(expected, -logits.grad.flatten() / 2 / divisor, rtol=1e-6, atol=1e-9)
