import pytest
import torch
from torch import nn

from posttrain.memory.simulate.stand_ins import EightBitAdam, FourBitLinear
from posttrain.sizes import nf4_bytes

bitsandbytes = pytest.importorskip("bitsandbytes")


def bytes_of_state(state):
    tensors = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (128, 320), (4096, 1024)])
def test_a_4bit_linear_has_the_bytes_of_the_real_one(inputs, outputs):
    real = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
    real = real.to("cpu")
    real(torch.zeros(1, inputs, dtype=torch.bfloat16))  # quantised by now
    assert real.weight.dtype == torch.uint8
    stand_in = FourBitLinear(nn.Linear(inputs, outputs, bias=False), torch.bfloat16)
    assert stand_in.weight.nbytes == real.weight.nbytes + bytes_of_state(real.weight.quant_state)
    assert stand_in.weight.nbytes == nf4_bytes(inputs * outputs)


def test_a_4bit_linear_takes_and_gives_what_the_real_one_does():
    real = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    stand_in = FourBitLinear(nn.Linear(64, 32, bias=False), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        outs = []
        for linear in (real, stand_in):
            x = torch.zeros(1, 5, 64, dtype=dtype, requires_grad=True)
            out = linear(x)
            out.sum().backward()
            outs.append((out.shape, x.grad.dtype))
            assert linear.weight.grad is None
        assert outs[0] == outs[1]


@pytest.mark.parametrize("elements", [100, 4096, 65536 + 3])
def test_the_state_of_8bit_adam_has_the_bytes_of_the_real_one(elements):
    parameter = nn.Parameter(torch.zeros(elements))
    assert sum(moment.nbytes for moment in EightBitAdam([parameter]).state) == real_adam_bytes(parameter)


def real_adam_bytes(parameter):
    """What bitsandbytes makes for a parameter before its first step, without the two tables that all parameters share."""
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    state = optimizer.state[parameter]
    return sum(value.nbytes for name, value in state.items() if isinstance(value, torch.Tensor) and not name.startswith("qmap"))
