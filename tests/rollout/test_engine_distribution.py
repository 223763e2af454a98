"""The local engine on a transformer over four symbols: three tokens after a prompt, so that all 64 completions can be enumerated.

What the engine draws must follow the enumerated probabilities (chi-square), and a policy gradient from its completions and its log-probs
must agree with the exact expectation over all groups of two. Enumeration is a plain forward over padded-free rows, without the engine.
"""

import itertools

import pytest
import torch
from scipy.stats import chi2
from transformers import Qwen3Config, Qwen3ForCausalLM

from posttrain.losses.advantages import advantages
from posttrain.losses.policy import OBJECTIVES, PolicyOptions, policy_terms
from posttrain.rollout.local.engine import LocalEngine
from posttrain.types import Request, Sampling

SYMBOLS, LENGTH, GROUPS, PROMPT = 4, 3, 1000, (2, 1)
STRINGS = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))  # (64, 3)
REWARDS = ((STRINGS == 1).sum(1) + 0.5 * (STRINGS[:, 0] == 3)).double()


def build():
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=SYMBOLS,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.35)
    return model


def logits_of(model):
    """(64, 3, 4) the model's next-token logits along every string."""
    rows = torch.cat([torch.tensor(PROMPT).expand(len(STRINGS), -1), STRINGS], 1)
    return model(input_ids=rows).logits[:, len(PROMPT) - 1 : -1]


def logps_of(model):
    return logits_of(model).log_softmax(-1).gather(2, STRINGS[:, :, None])[:, :, 0]  # (64, 3)


def truncated(p, sampling):
    """The probabilities of one step after top-k, or after top-p: the most likely symbols, one after the other."""
    order = sorted(range(SYMBOLS), key=lambda symbol: -p[symbol])
    kept, mass = [], 0.0
    for symbol in order:
        if (sampling.top_k and len(kept) == sampling.top_k) or mass >= sampling.top_p:
            break
        kept.append(symbol)
        mass += p[symbol]
    return [p[symbol] / mass if symbol in kept else 0.0 for symbol in range(SYMBOLS)]


def enumerated(model, sampling):
    """(64,) probability of each string under `sampling`."""
    with torch.no_grad():
        steps = (logits_of(model).double() / sampling.temperature).softmax(-1).tolist()
    probabilities = []
    for string, row in zip(STRINGS.tolist(), steps, strict=True):
        product = 1.0
        for token, p in zip(string, row, strict=True):
            product *= truncated(p, sampling)[token]
        probabilities.append(product)
    return torch.tensor(probabilities, dtype=torch.float64)


def drawn(model, sampling, n, max_slots=400):
    """(n,) index of each completion's string, and its log-probs (n, 3), in order of request."""
    engine, done = LocalEngine(max_slots=max_slots), []
    with engine.serving(model, version=0):
        for i in range(n):
            engine.submit(Request(i, PROMPT, sampling, key=(11, 0, i // 2, i % 2, 0)))
        while len(done) < n:
            done += engine.step()
    done.sort(key=lambda completion: completion.request_id)
    tokens = torch.tensor([completion.token_ids for completion in done])
    index = (tokens * torch.tensor([16, 4, 1])).sum(1)
    return index, torch.tensor([completion.logps for completion in done])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(LENGTH),
        Sampling(LENGTH, temperature=0.6),
        Sampling(LENGTH, temperature=1.8),
        Sampling(LENGTH, top_k=2),
        Sampling(LENGTH, temperature=1.3, top_p=0.8),
    ],
    ids=["plain", "cold", "hot", "top_k", "top_p"],
)
def test_completions_are_drawn_with_their_enumerated_probabilities(sampling):
    model = build()
    n = 2 * GROUPS
    index, _ = drawn(model, sampling, n)
    expected, counts = n * enumerated(model, sampling), torch.bincount(index, minlength=64).double()
    assert (counts[expected == 0] == 0).all()
    rare = expected < 5  # the chi-square law needs a handful per cell: the rare ones share one
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    keep = expected > 0
    distance = ((counts - expected)[keep] ** 2 / expected[keep]).sum().item()
    assert chi2.sf(distance, int(keep.sum()) - 1) > 1e-3


def test_the_chi_square_would_notice_another_temperature():
    model = build()
    index, _ = drawn(model, Sampling(LENGTH, temperature=1.2), 2 * GROUPS)
    expected = 2 * GROUPS * enumerated(model, Sampling(LENGTH))
    counts = torch.bincount(index, minlength=64).double()
    assert chi2.sf(((counts - expected) ** 2 / expected).sum().item(), 63) < 1e-6


@pytest.fixture(scope="module")
def updated():
    """Groups of two from the engine; then the model moves a little. Returns samples, the engine's log-probs, and both policies enumerated."""
    model = build()
    index, engine_logps = drawn(model, Sampling(LENGTH), 2 * GROUPS)
    old = logps_of(model).detach()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    new = logps_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    jacobian = []
    for logp in new.flatten():
        jacobian.append(torch.cat([g.flatten() for g in torch.autograd.grad(logp, parameters, retain_graph=True)]))
    jacobian = torch.stack(jacobian).double().view(64, LENGTH, -1)  # (64, 3, parameters)
    directions = torch.randn(jacobian.shape[-1], 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return index, engine_logps.double(), old.double(), new.detach().double(), jacobian @ directions


def gains(index):
    return advantages(REWARDS[index][:, None], [2] * (len(index) // 2)).advantages


@pytest.fixture(scope="module")
def pairs():
    """Every group of two (4096, 2), and the advantages of its rows."""
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    return pairs, gains(pairs.flatten())


@pytest.fixture(scope="module")
def sampled_gains(updated):
    return gains(updated[0])


def group_gradients(name, index, gain, old, new, along):
    """(groups, 30) each group's gradient in the model's parameters, along 30 random directions."""
    leaf, mask = new[index].requires_grad_(), torch.ones(len(index), LENGTH, dtype=torch.bool)
    terms = policy_terms(leaf, old, gain, mask, objective=OBJECTIVES[name], options=PolicyOptions(epsilon=0.1))
    weights = OBJECTIVES[name].row_weights(mask.sum(1).double(), num_rows=2, num_tokens=2 * LENGTH, max_completion_length=LENGTH)
    (terms.per_token * weights[:, None]).sum().backward()
    return torch.einsum("nt,ntk->nk", leaf.grad, along[index]).view(-1, 2, along.shape[-1]).sum(1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_policy_gradient_from_the_engine_agrees_with_full_enumeration(name, updated, sampled_gains, pairs):
    index, engine_logps, old, new, along = updated
    sampled = group_gradients(name, index, sampled_gains, engine_logps, new, along)
    pairs, pair_gains = pairs
    p = old.sum(1).exp()
    exact = (group_gradients(name, pairs.flatten(), pair_gains, old[pairs.flatten()], new, along) * p[pairs].prod(1)[:, None]).sum(0)
    difference = sampled.mean(0) - exact
    distance = difference @ torch.linalg.solve(torch.cov(sampled.T) / len(sampled), difference)
    assert chi2.sf(distance.item(), len(difference)) > 1e-3


def test_the_engines_log_probs_are_the_enumerated_ones(updated):
    index, engine_logps, old, _, _ = updated
    torch.testing.assert_close(engine_logps, old[index], atol=1e-5, rtol=0)
