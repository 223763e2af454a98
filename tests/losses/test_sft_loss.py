import torch

from posttrain.losses.sft import nll


def test_nll_is_the_sum_over_trained_tokens_and_only_they_get_a_gradient():
    logps = torch.tensor([[-1.0, -2.0, float("nan")], [-0.5, -4.0, -8.0]], requires_grad=True)
    loss = nll(logps, torch.tensor([[1, 1, 0], [0, 1, 0]]))
    loss.backward()
    assert loss.item() == 7.0
    assert logps.grad.tolist() == [[-1, -1, 0], [0, -1, 0]]


def test_nll_of_no_tokens_is_a_connected_zero():
    logps = torch.randn(2, 3, requires_grad=True)
    loss = nll(logps, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (logps.grad == 0).all()
