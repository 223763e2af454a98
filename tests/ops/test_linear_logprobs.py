"""`linear_logprobs` against the whole (N, V) matrix in float64, with tiles far smaller than N and V."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import posttrain.ops._linear_logprobs_torch as tiled
from posttrain.ops import linear_logprobs

HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.25, "temperature": 1.3},
    "softcap": {"softcap": 3.0},
    "all": {"softcap": 2.0, "scale": 1.7, "temperature": 0.6},
}
USES = {"logps": (1, 0), "entropy": (0, 1), "both": (1, 1)}
# Largest error in logps and entropy, and relative error of gradients, against float64: a few roundings of the dtype's matmul.
TOLERANCE = {torch.float64: (1e-13, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-2, 4e-2)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(tiled.LOGIT_ROWS, "cpu", 5)
    monkeypatch.setitem(tiled.LOGIT_ELEMENTS, "cpu", 5 * 64)
    monkeypatch.setattr(tiled, "WHOLE_ROWS", 5)


def naive(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, scale=1.0):
    """Row by row, in the plainest words."""
    logps, entropy = [], []
    for row, target in zip(hidden, targets, strict=True):
        z = weight @ row if bias is None else weight @ row + bias
        z = scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)
        z = z / temperature
        log_p = z - torch.logsumexp(z, 0)
        logps.append(log_p[target])
        entropy.append(-sum(log_p.exp() * log_p))
    return torch.stack(logps), torch.stack(entropy)


def inputs(n, v=150, d=6, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, d), (v, d), (v,))]
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in tensors)
    return hidden, weight, bias, torch.randint(v, (n,), generator=g)


def as_float64(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def combine(logps, entropy, use):
    """A loss that weights every row and output differently."""
    a, b = USES[use]
    rows = torch.arange(1, len(logps) + 1, dtype=logps.dtype)
    return (a * logps * rows.sin()).sum() + (b * entropy * rows.cos()).sum() if a and b else ((logps if a else entropy) * rows.sin()).sum()


def relative(x, y):
    return ((x.double() - y).norm() / y.norm()).item()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("n", "v"), [(1, 3), (5, 64), (7, 150), (12, 129)])
def test_values_and_gradients_equal_the_whole_matrix(n, v, head, use):
    hidden, weight, bias, targets = inputs(n, v)
    ours = linear_logprobs(hidden, weight, targets, bias=bias, **HEADS[head])
    theirs = naive(hidden, weight, targets, bias, **HEADS[head])
    for x, y in zip(ours, theirs, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(combine(ours.logps, ours.entropy, use), (hidden, weight, bias))
    expected = torch.autograd.grad(combine(*theirs, use), (hidden, weight, bias))
    for x, y in zip(grads, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


WEIGHTS = {"frozen head": None, "as foreseen": 1.0, "a multiple of what was foreseen": -3.0, "otherwise": None}


def one_pass(way, hidden, weight, targets, bias=None, **head):
    """Log-probs by the ways that make a tile once, a loss of them alone, and what its gradients are taken of."""
    g = torch.arange(1, len(targets) + 1, dtype=hidden.dtype, device=hidden.device).sin()
    if way == "frozen head":
        frozen = [None if x is None else x.detach() for x in (weight, bias)]
        out = linear_logprobs(hidden, frozen[0], targets, bias=frozen[1], entropy_grad=False, **head)
        return out, (out.logps * g).sum(), (hidden,)
    forecast = g.cos() if way == "otherwise" else g / WEIGHTS[way]
    out = linear_logprobs(hidden, weight, targets, bias=bias, entropy_grad=False, known_grad=forecast, **head)
    return out, (out.logps * g).sum(), tuple(x for x in (hidden, weight, bias) if x is not None)


@pytest.mark.parametrize("way", WEIGHTS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("n", "v"), [(1, 3), (5, 64), (7, 150), (12, 129)])
def test_one_pass_equals_the_whole_matrix(n, v, head, way):
    hidden, weight, bias, targets = inputs(n, v)
    out, loss, wanted = one_pass(way, hidden, weight, targets, bias, want_argmax=True, want_sum_p2=True, **HEADS[head])
    logps, entropy = naive(hidden, weight, targets, bias, **HEADS[head])
    torch.testing.assert_close(out.logps, logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-12, atol=1e-12)
    assert not out.entropy.requires_grad
    twice = linear_logprobs(hidden, weight, targets, bias=bias, want_argmax=True, want_sum_p2=True, **HEADS[head])
    assert torch.equal(out.argmax, twice.argmax)
    torch.testing.assert_close(out.sum_p2, twice.sum_p2)
    g = torch.arange(1, n + 1, dtype=torch.float64).sin()
    expected = torch.autograd.grad((logps * g).sum(), wanted)
    for _ in range(2):  # a second backward no longer has what the forward made
        for x, y in zip(torch.autograd.grad(loss, wanted, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_a_head_is_passed_once_where_that_will_do(monkeypatch):
    products = []
    real = tiled.Head.logits
    monkeypatch.setattr(tiled.Head, "logits", lambda self, hidden, *rest: products.append(len(hidden)) or real(self, hidden, *rest))
    hidden, weight, _, targets = inputs(5, 64)
    counts = {}
    for way in WEIGHTS:
        products.clear()
        _, loss, wanted = one_pass(way, hidden, weight, targets)
        torch.autograd.grad(loss, wanted)
        counts[way] = sum(products) / 5
    assert counts == {"frozen head": 1, "as foreseen": 1, "a multiple of what was foreseen": 1, "otherwise": 2}


@pytest.mark.parametrize("native", [True, False])
def test_a_confident_token_keeps_its_small_gradient_in_bf16(native, monkeypatch):
    """At p = 0.998 the gradient is the difference of two almost equal means of the weight; in bf16 either is rounded by more than that."""
    monkeypatch.setattr(tiled, "multiplies_natively", lambda *_: native)
    weight = torch.eye(4, 3).bfloat16()
    hidden = torch.tensor([[8.0, 0.5, 0.25]]).bfloat16().requires_grad_()
    targets = torch.tensor([0])
    (ours,) = torch.autograd.grad(linear_logprobs(hidden, weight, targets, entropy_grad=False).logps.sum(), hidden)
    (h64,) = as_float64(hidden)
    (theirs,) = torch.autograd.grad(naive(h64, weight.double(), targets)[0].sum(), h64)
    assert theirs.abs().max() < 3e-3
    assert relative(ours, theirs) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_a_frozen_heads_gradient_stays_within_the_dtypes_tolerance(dtype, native, monkeypatch):
    monkeypatch.setattr(tiled, "multiplies_natively", lambda *_: native)
    hidden, weight, _, targets = inputs(13, 200, d=32, dtype=dtype)
    _, loss, wanted = one_pass("frozen head", hidden, weight / 6, targets, temperature=0.8)
    (h64,), w64 = as_float64(hidden), (weight / 6).detach().double()
    g = torch.arange(1, 14, dtype=torch.float64).sin()
    expected = torch.autograd.grad((naive(h64, w64, targets, temperature=0.8)[0] * g).sum(), h64)
    assert relative(*torch.autograd.grad(loss, wanted), *expected) < (1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_what_a_forecast_is_asked_of():
    """A frozen trunk, a frozen weight with a bias that is trained, tied weights, and a factor that is not exact in binary."""
    hidden, weight, bias, targets = inputs(7)
    g = torch.arange(1, 8, dtype=torch.float64).sin()

    def grads(wanted, forecast, **kwargs):
        out = linear_logprobs(kwargs.pop("hidden", hidden), kwargs.pop("weight", weight), targets, bias=bias, entropy_grad=False, known_grad=forecast)
        return torch.autograd.grad((out.logps * g).sum(), wanted)

    cases = [
        ((weight, bias), {"hidden": hidden.detach()}),
        ((hidden, bias), {"weight": weight.detach()}),
        ((weight,), {"hidden": weight[:7].tanh()}),
        ((hidden, weight, bias), {}),
    ]
    for wanted, kwargs in cases:
        expected = torch.autograd.grad((naive(kwargs.get("hidden", hidden), kwargs.get("weight", weight), targets, bias)[0] * g).sum(), wanted)
        again = {key: weight[:7].tanh() if len(wanted) == 1 else value for key, value in kwargs.items()}
        for x, y in zip(grads(wanted, g / 3, **again), expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("way", WEIGHTS)
def test_a_masked_target_outside_the_vocabulary_harms_no_gradient(way):
    hidden, weight, _, targets = inputs(7)
    masked = targets.clone()
    masked[[1, 4]] = torch.tensor([-100, 150])
    keep = torch.ones(7).index_fill(0, torch.tensor([1, 4]), 0)
    head = weight.detach() if way == "frozen head" else weight
    wanted = (hidden,) if way == "frozen head" else (hidden, weight)
    grads = []
    for chosen in (masked, targets):
        out = linear_logprobs(hidden, head, chosen, entropy_grad=False, known_grad=None if way == "frozen head" else keep.double())
        grads.append(torch.autograd.grad(torch.where(keep.bool(), out.logps, 0.0).sum(), wanted))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("way", WEIGHTS)
def test_extreme_logits_in_one_pass(way):
    hidden, weight, _, targets = inputs(7, dtype=torch.float32)
    out, loss, wanted = one_pass(way, hidden, weight, targets, scale=1e30)
    assert torch.isfinite(out.logps).all()
    assert not any(torch.isnan(x).any() for x in torch.autograd.grad(loss, wanted))
    out, loss, wanted = one_pass(way, *inputs(0)[:2], inputs(0)[3])
    assert out.logps.shape == (0,)
    assert all(x.abs().sum() == 0 for x in torch.autograd.grad(loss, wanted, allow_unused=True) if x is not None)
    hidden, weight, bias, targets = inputs(7)
    with torch.no_grad():
        bias[[0, 1, *range(64, 128)]] = float("-inf")
    targets = targets.masked_fill((targets < 2) | ((targets >= 64) & (targets < 128)), 5)
    _, loss, wanted = one_pass(way, hidden, weight, targets, bias)
    kept = torch.tensor([i for i in range(150) if torch.isfinite(bias[i])])
    places = torch.tensor([kept.tolist().index(target) for target in targets.tolist()])
    g = torch.arange(1, 8, dtype=torch.float64).sin()
    expected = torch.autograd.grad((naive(hidden, weight[kept], places, bias[kept])[0] * g).sum(), wanted)
    for x, y in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("head", ["plain", "all"])
def test_gradcheck(head):
    hidden, weight, bias, targets = inputs(6, 70, d=3)
    torch.autograd.gradcheck(lambda h, w, b: linear_logprobs(h, w, targets, bias=b, **HEADS[head])[:2], (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_error_stays_within_the_dtypes_tolerance(dtype, autocast):
    hidden, weight, _, targets = inputs(13, 200, d=32, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = linear_logprobs(hidden, weight / 6, targets, temperature=0.8)
    used = dtype if dtype is torch.float64 or not autocast else torch.bfloat16
    values, gradients = TOLERANCE[used]
    assert ours.logps.dtype == ours.entropy.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    h64, w64 = as_float64(hidden, weight)
    theirs = naive(h64, w64 / 6, targets, temperature=0.8)
    for x, y in zip(ours, theirs, strict=False):
        assert (x.double() - y).abs().max() < values
    grads = torch.autograd.grad(combine(ours.logps, ours.entropy, "both"), (hidden, weight))
    expected = torch.autograd.grad(combine(*theirs, "both"), (h64, w64))
    for x, y in zip(grads, expected, strict=True):
        assert x.dtype == dtype
        assert relative(x, y) < gradients


def test_bf16_operands_are_rounded_before_they_are_multiplied():
    hidden, weight, _, targets = inputs(9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_logprobs(hidden, weight, targets).logps
    rounded = [x.detach().bfloat16().double() for x in (hidden, weight)]
    assert (ours - naive(*rounded, targets)[0]).abs().max() < (1e-5 if not tiled.multiplies_natively(torch.bfloat16, "cpu") else 4e-2)


def test_backward_is_the_same_inside_and_outside_autocast():
    hidden, weight, _, targets = inputs(9, dtype=torch.float32)
    grads = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_logprobs(hidden, weight, targets).logps.sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            grads.append(torch.autograd.grad(loss, (hidden, weight)))
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("native", [True, False])
def test_both_ways_to_multiply_bf16_agree(native, monkeypatch):
    monkeypatch.setattr(tiled, "multiplies_natively", lambda *_: native)
    hidden, weight, bias, targets = inputs(9, dtype=torch.bfloat16)
    h64, w64, b64 = as_float64(hidden, weight, bias)
    ours, theirs = linear_logprobs(hidden, weight, targets, bias=bias), naive(h64, w64, targets, b64)
    assert (ours.logps.double() - theirs[0]).abs().max() < (6e-2 if native else 1e-5)
    grads = torch.autograd.grad(combine(ours.logps, ours.entropy, "both"), (hidden, weight, bias))
    for x, y in zip(grads, torch.autograd.grad(combine(*theirs, "both"), (h64, w64, b64)), strict=True):
        assert relative(x, y) < 2e-2


def test_confident_tokens_keep_their_small_log_prob():
    """At p = 1 - 3e-7 the log-prob is far below the rounding of the logits, which would eat it in lse - logit."""
    out = linear_logprobs(torch.tensor([[15.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0]))
    expected = -torch.log1p(torch.tensor(-15.0, dtype=torch.float64).exp())
    assert out.logps.item() == pytest.approx(expected.item(), rel=0.2)


def test_argmax_and_sum_p2_on_request_only():
    hidden, weight, bias, targets = inputs(11)
    assert linear_logprobs(hidden, weight, targets)[2:] == (None, None)
    out = linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.5, want_argmax=True, want_sum_p2=True)
    p = torch.softmax(linear(hidden, weight, bias) / 0.5, -1)
    assert torch.equal(out.argmax, p.argmax(-1))
    torch.testing.assert_close(out.sum_p2, p.square().sum(-1))
    assert not out.argmax.requires_grad
    assert not out.sum_p2.requires_grad


@pytest.mark.parametrize("use", USES)
def test_gradients_scale_with_the_loss(use):
    hidden, weight, _, targets = inputs(7)
    out = linear_logprobs(hidden, weight, targets)
    once, thrice = (torch.autograd.grad(factor * combine(out.logps, out.entropy, use), (hidden, weight), retain_graph=True) for factor in (1, -3))
    for x, y in zip(once, thrice, strict=True):
        torch.testing.assert_close(-3 * x, y)


@pytest.mark.parametrize("use", USES)
def test_huge_logits_stay_finite(use):
    hidden, weight, _, targets = inputs(7, dtype=torch.float32)
    out = linear_logprobs(hidden, weight, targets, scale=1e30)
    grads = torch.autograd.grad(combine(out.logps, out.entropy, use), (hidden, weight))
    assert all(torch.isfinite(x).all() for x in (out.logps, out.entropy))
    assert not any(torch.isnan(x).any() for x in grads)


@pytest.mark.parametrize("use", USES)
def test_a_bias_of_minus_infinity_removes_a_token(use):
    hidden, weight, bias, _ = inputs(7, 150)
    banned = torch.arange(0, 149, 2)
    banned = torch.cat([torch.arange(64), banned[banned > 64]])  # a whole tile, and every other token after it
    kept = torch.tensor([i for i in range(150) if i not in set(banned.tolist())])
    targets = kept[torch.arange(7)]
    with torch.no_grad():
        bias[banned] = float("-inf")
    ours = linear_logprobs(hidden, weight, targets, bias=bias)
    theirs = naive(hidden, weight[kept], torch.arange(7), bias[kept])
    grads = torch.autograd.grad(combine(ours.logps, ours.entropy, use), (hidden, weight, bias))
    for x, y in zip(grads, torch.autograd.grad(combine(*theirs, use), (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(x, y)
    assert linear_logprobs(hidden, weight, banned[:7], bias=bias).logps.tolist() == [float("-inf")] * 7


def test_a_target_outside_the_vocabulary_is_nan():
    hidden, weight, _, _ = inputs(3)
    assert linear_logprobs(hidden, weight, torch.tensor([-100, 150, 149])).logps.isnan().tolist() == [True, True, False]


def test_no_rows_is_a_connected_zero():
    hidden, weight, bias, targets = inputs(0)
    out = linear_logprobs(hidden, weight, targets, bias=bias, want_argmax=True, want_sum_p2=True)
    assert [x.shape for x in out] == [(0,)] * 4
    (out.logps.sum() + out.entropy.sum()).backward()
    assert [x.grad.abs().sum().item() for x in (hidden, weight, bias)] == [0, 0, 0]


class Sizes(TorchDispatchMode):
    """Records the shape of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out

    @property
    def largest(self):
        return max(torch.Size(shape).numel() for shape in self.shapes)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_rows_by_vocabulary_ever_exists(dtype, use):
    hidden, weight, bias, targets = inputs(40, 400, d=4, dtype=dtype)
    with Sizes() as seen:
        out = linear_logprobs(hidden, weight, targets, bias=bias, softcap=3.0, want_argmax=True, want_sum_p2=True)
        combine(out.logps, out.entropy, use).backward()
    assert seen.largest <= 400 * 4  # the weight; a tile (with its twin) is 640, the matrix would be 16,000


@pytest.mark.parametrize("way", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_rows_by_vocabulary_exists_in_one_pass(dtype, way):
    hidden, weight, bias, targets = inputs(40, 400, d=4, dtype=dtype)
    with Sizes() as seen:
        one_pass(way, hidden, weight, targets, bias, softcap=3.0)[1].backward()
    assert seen.largest <= 2 * 5 * 400  # five rows, twice; the matrix would be 16,000


@pytest.mark.parametrize("entropy_grad", [True, False])
def test_a_frozen_head_gets_no_gradient_and_no_memory_for_one(entropy_grad):
    hidden, weight, bias, targets = inputs(40, 1000, d=4, dtype=torch.float32)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    out = linear_logprobs(hidden, weight, targets, bias=bias, entropy_grad=entropy_grad)
    with Sizes() as seen:
        out.logps.sum().backward()
    assert hidden.grad is not None
    assert not {(1000, 4), (1000,)} & seen.shapes
    assert seen.largest <= 2 * 5 * 64


def test_a_frozen_trunk_still_trains_the_head():
    hidden, weight, _, targets = inputs(7)
    expected = torch.autograd.grad(naive(hidden, weight, targets)[0].sum(), weight)[0]
    linear_logprobs(hidden.detach(), weight, targets).logps.sum().backward()
    torch.testing.assert_close(weight.grad, expected)


def test_tied_weights_add_both_gradients():
    _, weight, _, targets = inputs(7)
    ids = torch.tensor([3, 3, 100, 7, 0, 149, 3])
    linear_logprobs(weight[ids].tanh(), weight, targets).logps.sum().backward()
    (expected,) = torch.autograd.grad(naive(weight[ids].tanh(), weight, targets)[0].sum(), weight)
    torch.testing.assert_close(weight.grad, expected)


def test_a_checkpoint_recomputes_the_same_gradients():
    hidden, weight, _, targets = inputs(7, dtype=torch.float32)

    def loss(h):
        out = linear_logprobs(h.sin(), weight, targets)
        return out.logps.sum() + out.entropy.sum()

    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.autograd.grad(loss(hidden), (hidden, weight))
        again = torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def test_runs_on_fake_tensors():
    with FakeTensorMode():
        hidden, weight = torch.empty(40, 8, requires_grad=True), torch.empty(300, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = linear_logprobs(hidden, weight, torch.empty(40, dtype=torch.long), want_argmax=True, want_sum_p2=True)
        (out.logps.sum() + out.entropy.sum()).backward()
        linear_logprobs(hidden, weight.detach(), torch.empty(40, dtype=torch.long), entropy_grad=False).logps.sum().backward()
        assert hidden.grad.shape == (40, 8)
        assert weight.grad.shape == (300, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets \(3,\)"),
        ({"targets": torch.zeros(7)}, "token ids"),
        ({"bias": torch.zeros(7)}, r"bias \(V,\)"),
        ({"weight": torch.zeros(150, 6)}, "cast one of them"),
        ({"temperature": 0.0}, "must be positive"),
        ({"known_grad": torch.zeros(8)}, r"known_grad goes with the targets, \(N,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    hidden, weight, _, targets = inputs(7)
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{"hidden": hidden, "weight": weight, "targets": targets, **change})
