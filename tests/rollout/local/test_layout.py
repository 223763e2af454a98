import pytest
import torch

from posttrain.rollout.local.layout import attend, attend_plainly


def naive(q, k, v, scaling, visible):
    """One query of one head at a time, in float64."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    outputs, masses = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(batch, heads, queries, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for s in range(queries):
                keys, values = k[b, h // group].double()[visible[b, s]], v[b, h // group].double()[visible[b, s]]
                scores = keys @ q[b, h, s].double() * scaling
                outputs[b, h, s] = scores.softmax(0) @ values
                masses[b, h, s] = scores.logsumexp(0)
    return outputs, masses


@pytest.mark.parametrize("operator", [attend, attend_plainly])
@pytest.mark.parametrize("kind", ["all", "causal", "mask"])
@pytest.mark.parametrize("innermost", ["features", "queries"])
def test_attention_and_its_denominators_equal_plain_loops(operator, kind, innermost):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 16), torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16)
    if innermost == "queries":
        q = q.transpose(2, 3).contiguous().transpose(2, 3)
    visible = torch.ones(2, 5, 5, dtype=torch.bool)
    if kind != "all":
        visible = visible.tril()
    mask = torch.zeros(2, 1, 5, 5).masked_fill(~visible[:, None], -1e30) if kind == "mask" else None
    output, mass = operator(q, k, v, scaling=0.3, mask=mask, causal=kind == "causal")
    expected, expected_mass = naive(q, k, v, 0.3, visible)
    assert torch.allclose(output.double(), expected, atol=1e-5)
    assert torch.allclose(mass.double(), expected_mass, atol=1e-5)
