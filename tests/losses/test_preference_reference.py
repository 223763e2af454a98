"""Each preference loss against plain floats: values, and gradients by central differences."""

import itertools
import random

import naive_preferences as naive
import pytest
import torch

from posttrain.losses import kto as kto_losses
from posttrain.losses.preference import (
    DIVERGENCES,
    DIVERGENT,
    LOSSES,
    SMOOTHED,
    TRANSPORTED,
    Pairs,
    PreferenceOptions,
    discounted_tails,
    on_policy_weights,
    preference_loss,
)
from posttrain.losses.reference_free import CPO_LOSSES, CPOOptions, log1mexp, orpo, shaped_rewards
from posttrain.losses.transport import Transport

CLOSE = {"rtol": 1e-6, "atol": 1e-8}
OPTIONS = {"beta": 0.3, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.4}


def random_pairs(seed, n=6):
    draw = random.Random(seed)
    pairs = []
    for _ in range(n):
        c, r = draw.uniform(-9, -1), draw.uniform(-9, -1)
        pairs.append({"c": c, "r": r, "rc": c + draw.gauss(0, 1), "rr": r + draw.gauss(0, 1), "nc": draw.randint(1, 9), "nr": draw.randint(1, 9)})
    for pair in pairs:
        pair["nll"] = -pair["c"]
        pair["mean_nc"] = sum(p["nc"] for p in pairs) / n
    return pairs


def as_tensors(pairs, chosen, rejected, transport=None):
    def column(name):
        return torch.tensor([pair[name] for pair in pairs], dtype=torch.float64)

    return Pairs(chosen, rejected, column("rc"), column("rr"), column("nc"), column("nr"), -chosen, pairs[0]["mean_nc"], transport)


def leaves(pairs):
    return [torch.tensor([pair[name] for pair in pairs], dtype=torch.float64, requires_grad=True) for name in ("c", "r")]


def ours(name, pairs, options):
    chosen, rejected = leaves(pairs)
    plain = as_tensors(pairs, chosen, rejected)
    transport = Transport.between(chosen.detach(), rejected.detach(), plain.ref_chosen, plain.ref_rejected)
    loss = LOSSES[name](as_tensors(pairs, chosen, rejected, transport), PreferenceOptions(**options)).sum()
    gradients = torch.autograd.grad(loss, [chosen, rejected], materialize_grads=True)  # sft does not read the rejected
    return loss.item(), torch.cat(gradients).tolist()


def naive_sum(name, pairs, options):
    def of(values):
        half = len(values) // 2
        moved = [pair | {"c": c, "r": r, "nll": -c} for pair, c, r in zip(pairs, values[:half], values[half:], strict=True)]
        return naive.all_pairs(name, moved, options)

    start = [pair["c"] for pair in pairs] + [pair["r"] for pair in pairs]
    return of(start), naive.slopes(of, start)


SETTINGS = [
    *((name, {}) for name in LOSSES if name != "exo_pair"),
    *((name, {"label_smoothing": 0.1}) for name in SMOOTHED),
    *((name, {"f_divergence_type": kind, "label_smoothing": 0.1}) for name, kind in itertools.product(DIVERGENT, DIVERGENCES)),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    ("ipo", {"beta": 2.0, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7}),
]


@pytest.mark.parametrize(("name", "changes"), SETTINGS, ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value.values())))
@pytest.mark.parametrize("seed", [0, 1])
def test_a_loss_and_its_gradient_are_those_of_plain_floats(name, changes, seed):
    pairs, options = random_pairs(seed), OPTIONS | changes
    value, gradient = ours(name, pairs, options)
    naive_value, naive_gradient = naive_sum(name, pairs, options)
    assert value == pytest.approx(naive_value, rel=1e-9, abs=1e-12)
    assert torch.allclose(torch.tensor(gradient), torch.tensor(naive_gradient), **CLOSE)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "exo_pair"])
def test_a_loss_is_the_same_for_every_split_and_order(name):
    pairs = random_pairs(3, n=7)
    whole, gradient = ours(name, pairs, OPTIONS)
    chosen, rejected = leaves(pairs)
    plain = as_tensors(pairs, chosen, rejected)
    transport = Transport.between(chosen.detach(), rejected.detach(), plain.ref_chosen, plain.ref_rejected)
    total = torch.zeros((), dtype=torch.float64)
    for places in ([6, 0], [3], [5, 1, 4, 2]):
        part = as_tensors([pairs[place] for place in places], chosen[places], rejected[places], transport.of(torch.tensor(places)))
        total = total + LOSSES[name](part, PreferenceOptions(**OPTIONS)).sum()
    gradients = torch.autograd.grad(total, [chosen, rejected], materialize_grads=True)
    assert total.item() == pytest.approx(whole, rel=1e-12)
    assert torch.allclose(torch.cat(gradients), torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("sft", "ipo", "sppo_hard", "exo_pair", *TRANSPORTED)])
def test_every_loss_prefers_the_chosen(name):
    pairs = [pair | {"rc": pair["c"], "rr": pair["r"]} for pair in random_pairs(4)]  # the policy is the reference
    _, gradient = ours(name, pairs, OPTIONS)
    n = len(pairs)
    assert all(up - down < 0 for up, down in zip(gradient[:n], gradient[n:], strict=True))


def test_the_first_loss_is_log_two():
    pairs = [pair | {"rc": pair["c"], "rr": pair["r"]} for pair in random_pairs(5)]
    assert ours("sigmoid", pairs, OPTIONS)[0] / len(pairs) == pytest.approx(0.6931471805599453, rel=1e-12)


def test_several_losses_are_added_with_their_weights():
    pairs = random_pairs(6)
    chosen, rejected = leaves(pairs)
    total = preference_loss(as_tensors(pairs, chosen, rejected), PreferenceOptions(**OPTIONS), {"sigmoid": 0.7, "sft": 2.0, "hinge": 0.1})
    expected = [sum(w * naive.one_pair(n, p, OPTIONS) for n, w in (("sigmoid", 0.7), ("sft", 2.0), ("hinge", 0.1))) for p in pairs]
    assert torch.allclose(total, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "sigmoid_norm", "discopop"])
def test_log_ratios_of_hundreds_stay_finite(name):
    """A long completion under a policy that has left its reference."""
    pairs = [pair | {"rc": pair["c"] + 600, "rr": pair["r"] - 600} for pair in random_pairs(7)]
    value, gradient = ours(name, pairs, OPTIONS | {"beta": 0.1, "label_smoothing": 0.1})
    assert all(map(torch.isfinite, torch.tensor([value, *gradient])))


@pytest.mark.parametrize("log_ratios", [(-600.0, 600.0), (600.0, -600.0), (-600.0, -600.0), (-100.0, 0.0), (0.0, -100.0)], ids=str)
@pytest.mark.parametrize(("name", "divergence"), [*itertools.product(["sigmoid", "hinge", "robust"], DIVERGENCES), ("discopop", "reverse_kl")])
def test_what_float32_cannot_hold_leaves_values_and_gradients_finite(name, divergence, log_ratios):
    """A finite loss with a gradient that is not would pass every check and end the model."""
    chosen, rejected = (torch.tensor([value], requires_grad=True) for value in log_ratios)
    nothing, length = torch.zeros(1), torch.full((1,), 9.0)
    pairs = Pairs(chosen, rejected, nothing, nothing, length, length, -chosen, 9.0)
    options = PreferenceOptions(beta=0.5, label_smoothing=0.1, f_divergence_type=divergence)
    loss = LOSSES[name](pairs, options).sum()
    assert loss.isfinite()
    assert all(gradient.isfinite() for gradient in torch.autograd.grad(loss, [chosen, rejected]))


@pytest.mark.parametrize("name", list(kto_losses.LOSSES))
@pytest.mark.parametrize("kl", [0.0, 1.3])
def test_kto_is_that_of_plain_floats(name, kl):
    draw = random.Random(0)
    ratios, labels = [draw.gauss(0, 3) for _ in range(8)], [draw.random() < 0.5 for _ in range(8)]
    ratio = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    distance = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    losses = kto_losses.LOSSES[name](ratio, torch.tensor(labels), distance, 0.4)
    losses.sum().backward()

    def of(values):
        return sum(getattr(naive, name)(x, good, kl, 0.4) for x, good in zip(values, labels, strict=True))

    assert losses.sum().item() == pytest.approx(of(ratios), rel=1e-12)
    assert torch.allclose(ratio.grad, torch.tensor(naive.slopes(of, ratios), dtype=torch.float64), **CLOSE)
    assert distance.grad is None, "z carries no gradient"


def test_the_estimated_kl_is_a_mean_that_is_never_negative():
    assert kto_losses.estimated_kl(6.0, 4) == 1.5
    assert kto_losses.estimated_kl(-6.0, 4) == 0.0


def test_orpo_is_that_of_plain_floats():
    draw = random.Random(0)
    chosen, rejected = ([draw.uniform(-4, -0.01) for _ in range(8)] for _ in range(2))
    tensors = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (chosen, rejected)]
    loss = orpo(*tensors)
    loss.sum().backward()

    def of(values):
        return sum(map(naive.odds_ratio, values[:8], values[8:]))

    assert loss.sum().item() == pytest.approx(of(chosen + rejected), rel=1e-9)
    slopes = torch.tensor(naive.slopes(of, chosen + rejected, step=1e-6), dtype=torch.float64)
    assert torch.allclose(torch.cat([t.grad for t in tensors]), slopes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_is_finite_for_completions_that_are_certain_or_impossible(dtype):
    chosen = torch.tensor([0.0, -1e-9, -1e-3, -80.0, -500.0], dtype=dtype, requires_grad=True)
    orpo(chosen, torch.full_like(chosen, -0.5).detach()).sum().backward()
    assert torch.isfinite(chosen.grad).all()
    exact = torch.log(-torch.expm1(torch.tensor([-1e-3, -5.0], dtype=torch.float64)))
    assert torch.allclose(log1mexp(torch.tensor([-1e-3, -5.0], dtype=dtype)).double(), exact, rtol=1e-6)


@pytest.mark.parametrize("name", list(CPO_LOSSES))
@pytest.mark.parametrize(("alpha", "smoothing"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.1)])
def test_cpo_is_that_of_plain_floats(name, alpha, smoothing):
    draw = random.Random(1)
    chosen, rejected = ([draw.uniform(-4, -0.1) for _ in range(6)] for _ in range(2))
    leaf = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    rewards = shaped_rewards(leaf, alpha)
    loss = CPO_LOSSES[name](rewards[0] - rewards[1], CPOOptions(beta=1.7, label_smoothing=smoothing, simpo_gamma=0.6)).sum()
    loss.backward()

    def of(values):
        settings = {"beta": 1.7, "smoothing": smoothing, "gamma": 0.6, "alpha": alpha}
        return sum(naive.cpo(name, c, r, **settings) for c, r in zip(values[:6], values[6:], strict=True))

    assert loss.item() == pytest.approx(of(chosen + rejected), rel=1e-9)
    assert torch.allclose(leaf.grad.flatten(), torch.tensor(naive.slopes(of, chosen + rejected), dtype=torch.float64), **CLOSE)


def test_tails_beyond_the_shorter_completion_are_discounted():
    weights = discounted_tails([(3, 1), (2, 2)], 3, 0.25, torch.zeros(1))
    assert weights.tolist() == [[1, 0.25, 0.25], [1, 0.25, 0.25], [1, 1, 0.25], [1, 1, 0.25]]  # beyond a row's end there is nothing to weigh


def test_the_weight_of_a_pair_is_how_likely_its_tokens_are_beside_a_draw():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64)
    sum_p2 = probabilities.square().sum(dim=1)  # of two tokens
    logps = torch.stack([probabilities[:, 0].log(), probabilities[:, 2].log()])  # (2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    chosen = ((0.5 / sum_p2[0]) * (0.1 / sum_p2[1])) ** 0.5
    rejected = 0.25 / sum_p2[0]
    weight = on_policy_weights(logps.requires_grad_(), torch.stack([sum_p2, sum_p2 * mask[1]]), mask)
    assert weight.tolist() == pytest.approx([float(chosen * rejected)], rel=1e-12)
    assert not weight.requires_grad
