"""What a job will need, known before it is started: bytes by formula, in milliseconds and without torch.

docs/plan.md has the formulas, and how far they are from posttrain's own step on tensors that hold nothing.
"""

from posttrain.memory.estimate import Plan, plan
from posttrain.memory.job import TrainingJob
from posttrain.memory.shapes import find_shape, shape_of

__all__ = ["Plan", "TrainingJob", "find_shape", "plan", "shape_of"]
