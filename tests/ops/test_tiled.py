import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from posttrain.ops.tiled import TiledRows

L, D, F = 11, 6, 10


class MLP(nn.Module):
    """What transformers' models have, counting its calls."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(D, F, bias=False), nn.Linear(D, F), nn.Linear(F, D)
        self.to(dtype)
        self.calls, self.dtypes = [], []

    def forward(self, x):
        self.calls.append(x.shape[1])
        hidden = self.gate(x)
        self.dtypes.append(hidden.dtype)
        return self.down(nn.functional.silu(hidden) * self.up(x))


def inputs(dtype=torch.float64, shape=(1, L, D)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()


def gradients(module, parameters, x):
    out = module(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weights).sum(), [x, *parameters])


@pytest.mark.parametrize("rows", [1, 3, 4, 10, 11, 50])
def test_output_and_gradients_are_those_of_the_module(rows):
    module, x = MLP(), inputs()
    expected, expected_grads = gradients(module, list(module.parameters()), x)
    got, grads = gradients(TiledRows(module, rows), list(module.parameters()), x)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_rows_of_a_batch_are_counted_together():
    """Eight rows of 20 tokens in tiles of 50 are four tiles, the last of ten: none is larger than a tile."""
    module = MLP()
    x = inputs(shape=(8, 20, D))
    expected, expected_grads = gradients(module, list(module.parameters()), x)
    module.calls.clear()
    tiled = TiledRows(module, 50)
    out = tiled(x)
    assert module.calls == [1, 50, 50, 50, 10]  # one row tells the shape of the answer
    assert torch.allclose(out, expected)
    _, grads = gradients(tiled, list(module.parameters()), x)
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(grads, expected_grads, strict=True))


def test_inputs_with_more_axes_keep_them():
    norm = nn.RMSNorm(D, dtype=torch.float64)
    x = inputs(shape=(1, L, 4, D))
    expected, expected_grads = gradients(norm, list(norm.parameters()), x)
    got, grads = gradients(TiledRows(norm, 3), list(norm.parameters()), x)
    assert got.shape == x.shape
    assert torch.allclose(got, expected)
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(grads, expected_grads, strict=True))


def test_frozen_weights_get_no_gradient():
    module = MLP()
    module.gate.requires_grad_(False)
    TiledRows(module, 4)(inputs()).sum().backward()
    assert module.gate.weight.grad is None
    assert module.down.weight.grad is not None


def test_an_input_without_a_gradient_still_trains_the_weights():
    module, x = MLP(), inputs().detach()
    module(x).sum().backward()
    expected = module.down.weight.grad.clone()
    module.zero_grad()
    TiledRows(module, 4)(x).sum().backward()
    assert torch.allclose(module.down.weight.grad, expected)


def test_only_the_input_is_kept_for_the_backward():
    module, kept = MLP(), []
    x = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        TiledRows(module, 4)(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_a_checkpointed_layer_that_ends_in_it_is_not_computed_to_the_end_again():
    module = MLP()
    tiled = TiledRows(module, 4)
    x = inputs()
    expected = torch.autograd.grad((x * 2 + module(x * 2)).sum(), x)[0]
    tiled(x)  # so that the shape of the answer is known
    module.calls.clear()
    out = checkpoint(lambda x: x * 2 + tiled(x * 2), x, use_reentrant=False)
    assert module.calls == [4, 4, 3]
    module.calls.clear()
    assert torch.allclose(torch.autograd.grad(out.sum(), x)[0], expected)
    assert module.calls == [4, 4, 3]  # by the backward of each tile; the recompute of the layer ended before


def test_the_backward_drops_what_the_forward_dropped():
    torch.manual_seed(3)
    tiled = TiledRows(nn.Dropout(0.5), 4)
    x = inputs()
    out = tiled(x)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(x.grad, (out != 0) * 2.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_backward_computes_in_the_precision_of_the_forward():
    module, x = MLP(torch.float32), inputs(torch.float32)
    tiled = TiledRows(module, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = tiled(x)
    assert out.dtype == torch.bfloat16
    module.dtypes.clear()
    out.float().sum().backward()
    assert module.dtypes == [torch.bfloat16] * 3
    assert x.grad.dtype == torch.float32


def test_gradients_of_half_precision_weights_are_summed_in_float32():
    """1,000 tiles whose gradients are 1 each: bf16 sums would stop at 256."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    TiledRows(module, 1)(torch.ones(1, 1000, 1, dtype=torch.bfloat16)).sum().backward()
    assert module.weight.grad.item() == 1000
