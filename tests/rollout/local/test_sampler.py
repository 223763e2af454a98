import math

import pytest
import torch
from scipy import stats

from posttrain.rollout.local.sampler import Uniforms, draw, inverse_cdf
from posttrain.types import Sampling

CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "k-then-p": {"top_k": 3, "top_p": 0.5},
}


def truncated(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=None):
    """The distribution by plain loops over tokens in float64, each filter on what the one before left."""
    weights = [math.exp(x / temperature) for x in logits.double().tolist()]
    alive = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k:
        alive = alive[:top_k]
    if top_p < 1:
        total, gathered, nucleus = sum(weights[i] for i in alive), 0.0, []
        for i in alive:
            nucleus.append(i)
            gathered += weights[i]
            if gathered >= top_p * total:
                break
        alive = nucleus
    if min_p:
        alive = [i for i in alive if weights[i] >= min_p * weights[alive[0]]]
    total = sum(weights[i] for i in alive)
    return [weights[i] / total if i in set(alive) else 0.0 for i in range(len(weights))]


def grid(n):
    return [(i + 0.5) / n for i in range(n)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocabulary", [37, 256, 600])
def test_frequencies_follow_the_distribution(case, vocabulary):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    expected = truncated(logits, **CASES[case])
    n = 4000
    uniforms = [Uniforms((1, i))[0] for i in range(n)]
    drawn = draw(logits.expand(n, -1), [Sampling(max_new_tokens=1, **CASES[case])] * n, uniforms)
    counts = torch.bincount(drawn.token_ids, minlength=vocabulary).double()
    assert all(counts[i] == 0 for i in range(vocabulary) if expected[i] == 0)
    common = [i for i in range(vocabulary) if expected[i] * n >= 5]
    observed = [counts[i].item() for i in common] + [counts.sum().item() - sum(counts[i].item() for i in common)]
    wanted = [expected[i] * n for i in common] + [n - sum(expected[i] * n for i in common)]
    if wanted[-1] < 1:
        observed, wanted = observed[:-1], [w * sum(observed[:-1]) / sum(wanted[:-1]) for w in wanted[:-1]]
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_log_probs_are_of_the_full_and_of_the_truncated_distribution(case):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)) * 2
    drawn = draw(logits, [Sampling(max_new_tokens=1, **CASES[case])] * 5, grid(5))
    full = (logits.double() / CASES[case].get("temperature", 1.0)).log_softmax(-1)
    for row, token in enumerate(drawn.token_ids.tolist()):
        assert drawn.logps[row].item() == pytest.approx(full[row, token].item(), abs=1e-5)
        assert drawn.sampled_logps[row].item() == pytest.approx(math.log(truncated(logits[row], **CASES[case])[token]), abs=1e-5)


def test_rows_of_one_batch_have_their_own_settings():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(4)) * 2
    settings = [Sampling(max_new_tokens=1, **case) for case in CASES.values()] + [Sampling(max_new_tokens=1, temperature=0.0)]
    uniforms = grid(len(settings))
    together = draw(logits.expand(len(settings), -1), settings, uniforms)
    for row, setting in enumerate(settings):
        alone = draw(logits[None], [setting], uniforms[row : row + 1])
        assert [x[row].item() for x in together] == pytest.approx([x[0].item() for x in alone], abs=1e-6)


def test_greedy_takes_the_best_token_for_certain():
    logits = torch.randn(3, 300)
    drawn = draw(logits, [Sampling(max_new_tokens=1, temperature=0.0, top_k=5)] * 3, [0.999] * 3)
    assert drawn.token_ids.tolist() == logits.argmax(-1).tolist()
    assert drawn.sampled_logps.tolist() == [0.0] * 3
    assert torch.allclose(drawn.logps, logits.log_softmax(-1).amax(-1), atol=1e-5)


def test_top_p_looks_beyond_its_candidates_when_the_distribution_is_flat():
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(5)) * 0.01
    expected = truncated(logits, top_p=0.9)
    drawn = draw(logits.expand(64, -1), [Sampling(max_new_tokens=1, top_p=0.9)] * 64, grid(64))
    assert all(expected[token] > 0 for token in drawn.token_ids.tolist())
    assert math.exp(drawn.logps[0] - drawn.sampled_logps[0]) == pytest.approx(0.9, abs=1e-3)


def test_equal_logits_stay_or_go_together():
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -3.0]])
    drawn = draw(logits.expand(40, -1), [Sampling(max_new_tokens=1, top_k=2)] * 40, grid(40))
    assert set(drawn.token_ids.tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("vocabulary", [5, 256, 1000, 150_001])
def test_a_token_of_zero_probability_is_never_drawn(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(1, vocabulary, generator=generator) * (torch.rand(1, vocabulary, generator=generator) < 0.3)
    weights[0, vocabulary // 2] = 0.5
    uniforms = torch.tensor([0.0, 2.0**-53, *grid(200), 1 - 2.0**-30, 1 - 2.0**-53], dtype=torch.float64)
    drawn = inverse_cdf(weights.expand(len(uniforms), -1), uniforms)
    assert (weights[0, drawn] > 0).all()
    positive = weights[0].nonzero()[:, 0]
    assert drawn[0] == positive[0]
    assert drawn[-1] == positive[-1]


def test_tails_are_as_likely_as_they_should_be():
    """150,000 equal weights: the rank of the token is the uniform number itself, which float32 sums would blur."""
    vocabulary = 150_000
    uniforms = torch.tensor(grid(1000), dtype=torch.float64)
    drawn = inverse_cdf(torch.full((1, vocabulary), 1 / vocabulary).expand(1000, -1), uniforms)
    assert (drawn - (uniforms * vocabulary).floor().long()).abs().max() <= 1


def test_uniform_numbers_are_uniform_and_depend_on_key_and_position_alone():
    numbers = [Uniforms((seed, 0, 3))[position] for seed in range(50) for position in range(40)]
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert len(set(numbers)) == len(numbers)
    numbers_of_one = Uniforms((7, 0, 3))
    assert [numbers_of_one[i] for i in (9, 0, 9, 17)] == [Uniforms((7, 0, 3))[i] for i in (9, 0, 9, 17)]
    assert Uniforms((1, 23))[0] != Uniforms((12, 3))[0]
