"""Which prompts a micro-step gets: one list of tasks per micro-step, empty where a rollout is still being trained on.

The length, and so epochs and learning-rate schedules, is what TRL's would be. Every process iterates the same lists.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from torch.utils.data import DataLoader, Sampler

from posttrain.types import Task


class PromptSampler(Sampler[list[int]]):
    """Batches of dataset positions. The epoch is derived from the optimizer step when iteration starts: nobody has to announce it."""

    def __init__(self, size: int, *, prompts: int, every: int, epoch: Callable[[], int], seed: int, shuffle: bool, keep_rest: bool = False) -> None:
        self.prompts, self.every = prompts, every  # `prompts` new ones every `every` micro-steps
        self.size = size
        self.used = size if keep_rest else size // prompts * prompts  # an incomplete last rollout is left out, as in TRL
        self.epoch, self.seed, self.shuffle = epoch, seed, shuffle

    def __len__(self) -> int:
        return -(-self.used // self.prompts) * self.every

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.size))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch()}").shuffle(order)
        for start in range(0, self.used, self.prompts):
            yield order[start : min(start + self.prompts, self.used)]
            yield from ([] for _ in range(self.every - 1))


def prompt_loader(tasks: Sequence[Task], sampler: PromptSampler) -> DataLoader:
    """A DataLoader that transformers can measure, skip into and iterate."""
    return DataLoader(tasks, batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
