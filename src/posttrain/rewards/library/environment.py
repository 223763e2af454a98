"""The reward that an environment gave for a whole episode: `completion.info["reward"]`. Without it an episode is not
scored."""

from __future__ import annotations

from posttrain.rewards.reward import reward
from posttrain.types import Group


@reward
def environment(group: Group) -> list[float | None]:
    """The sum of the rewards of `step`, or what else the environment reports as its reward."""
    return [completion.info.get("reward") for completion in group.completions]
