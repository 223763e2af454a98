import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from posttrain.ops import offload as module
from posttrain.ops.offload import ActivationOffload, offloading

ROWS, D = 32, 16


def network(layers=6):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(layers))


def run(layers, x):
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False)
    return x.square().sum()


def inputs():
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_gradients_are_the_same_to_the_bit(monkeypatch, kept):
    monkeypatch.setattr(module, "KEPT", kept)
    layers, x = network(), inputs()
    expected = torch.autograd.grad(run(layers, x), [x, *layers.parameters()])
    hooks = ActivationOffload(smallest=0)
    with hooks:
        loss = run(layers, x)
    assert hooks.offloaded_bytes > 0
    for ours, theirs in zip(torch.autograd.grad(loss, [x, *layers.parameters()]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_all_but_the_last_leave():
    hooks = ActivationOffload(smallest=0)
    tensors = [torch.full((4, 4), float(i)) for i in range(5)]
    saved = [hooks.pack(tensor) for tensor in tensors]
    assert [record.there is None for record in saved] == [True, True, True, False, False]  # one is still on its way out
    assert [record.on_host is None for record in saved] == [False, False, False, False, True]
    assert [hooks.unpack(record)[0, 0].item() for record in reversed(saved)] == [4, 3, 2, 1, 0]


def test_the_tensor_before_is_sent_for_while_one_is_used():
    hooks = ActivationOffload(smallest=0)
    saved = [hooks.pack(torch.full((4, 4), float(i))) for i in range(6)]
    first = hooks.unpack(saved[2])
    assert saved[1].fetched is not None
    assert saved[0].fetched is None
    assert first[0, 0] == 2
    hooks.unpack(saved[1])
    assert saved[1].fetched is None  # it belongs to whoever asked
    assert saved[0].fetched is not None


def test_small_tensors_and_weights_stay():
    hooks = ActivationOffload(smallest=1000)
    small, weight = torch.zeros(10), nn.Parameter(torch.zeros(100, 100))
    for tensor in (small, weight, weight.t(), weight[:50]):
        assert hooks.pack(tensor) is tensor
    assert hooks.pack(torch.zeros(100, 100)) is not None
    assert hooks.offloaded_bytes == 0


def test_a_tensor_that_two_operators_keep_is_copied_once():
    hooks = ActivationOffload(smallest=0)
    shared = torch.ones(4, 4)
    first, second = hooks.pack(shared), hooks.pack(shared)
    assert first is second
    for i in range(4):
        hooks.pack(torch.full((4, 4), float(i)))
    assert hooks.offloaded_bytes == 4 * shared.nbytes


def test_another_tensor_at_the_same_address_is_another():
    hooks = ActivationOffload(smallest=0)
    records = []
    for i in range(20):  # freed and allocated again, mostly in the same place
        records.append(hooks.pack(torch.full((64, 64), float(i))))
    assert [hooks.unpack(record)[0, 0].item() for record in records] == list(range(20))


def test_a_tensor_changed_in_place_after_it_was_saved_is_an_error():
    hooks = ActivationOffload(smallest=0)
    tensor = torch.zeros(4, 4)
    record = hooks.pack(tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        hooks.unpack(record)


def test_on_a_cpu_nothing_is_copied():
    x = inputs()
    with offloading(torch.device("cpu")) as hooks:
        run(network(), x)
    assert hooks is None
