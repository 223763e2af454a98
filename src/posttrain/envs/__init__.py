"""Environments: what answers the policy between its turns. `types.Env` is the protocol; a class of yours may stand
beside these.

`Environment` is what a trainer is given: how an episode is made, and what the chat template must know of it.
"""

from posttrain.envs.environment import Environment
from posttrain.envs.single import Single

__all__ = ["Environment", "Single"]
