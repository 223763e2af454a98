"""How much memory a training step takes, known without the memory: the step itself, on tensors that hold nothing.

Counted are the bytes that torch would hold. An allocator's rounding and gaps, the CUDA context (about half a gigabyte)
and what kernels take for themselves come on top.
"""

from posttrain.memory.simulate.step import SimulatedStep, simulate_step

__all__ = ["SimulatedStep", "simulate_step"]
