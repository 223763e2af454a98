"""What an environment paid for a whole episode: `rollout.info["reward"]`. Nobody scored where it said nothing."""

from __future__ import annotations

from posttrain.rewards.reward import reward
from posttrain.types import Group


@reward
def environment(group: Group) -> list[float | None]:
    """The sum of what `step` paid, or whatever else the environment reports as its reward."""
    return [rollout.info.get("reward") for rollout in group.rollouts]
