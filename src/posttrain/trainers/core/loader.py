"""Which prompts a micro-step gets: one list of tasks per micro-step, empty where a rollout is still being trained on.

The length, and so epochs and learning-rate schedules, is what TRL's would be. Every process iterates the same lists.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Sampler

from posttrain.errors import UserError


class PromptSampler(Sampler[list[int]]):
    """Batches of dataset positions. The epoch is derived from the optimizer step when iteration starts: nobody has to
    announce it."""

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


def prompt_loader(tasks: Sequence[Any], sampler: PromptSampler) -> DataLoader:
    """A DataLoader that transformers can measure, skip into and iterate."""
    return DataLoader(tasks, batch_sampler=sampler, collate_fn=list)  # type: ignore[arg-type]


SHUFFLED_WITHIN = 1000  # rows of a stream that are held to be drawn from


class EndlessBatches(IterableDataset):
    """Batches of a stream of rows, which is read anew when it ends. Skipping into it reads what is skipped."""

    def __init__(self, read: Callable[[], Iterable[Any]], *, size: int, seed: int, shuffle: bool) -> None:
        self.read, self.size, self.seed, self.shuffle = read, size, seed, shuffle

    def __iter__(self) -> Iterator[list[Any]]:
        for epoch in itertools.count():
            rows = _shuffled(self.read(), random.Random(f"{self.seed}/{epoch}")) if self.shuffle else iter(self.read())
            batch = list(itertools.islice(rows, self.size))
            if not batch:
                raise UserError("the stream of training data has no rows")
            while batch:
                yield batch
                batch = list(itertools.islice(rows, self.size))


def stream_loader(batches: EndlessBatches) -> DataLoader:
    """As `prompt_loader`, without a length."""
    return DataLoader(batches, batch_size=None, collate_fn=list)


def _shuffled(rows: Iterable[Any], draw: random.Random) -> Iterator[Any]:
    held: list[Any] = []
    for row in rows:
        if len(held) < SHUFFLED_WITHIN:
            held.append(row)
            continue
        place = draw.randrange(SHUFFLED_WITHIN)
        yield held[place]
        held[place] = row
    draw.shuffle(held)
    yield from held


def example_loader(examples: Sequence[Any], args: Any, step: Callable[[], int], *, shuffle: bool) -> DataLoader:
    """Batches of `per_device_train_batch_size` examples for each process, all of them, in an order drawn from (seed,
    epoch).

    `step` tells the optimizer step, from which the epoch is derived.
    """
    sampler = PromptSampler(
        len(examples),
        prompts=args.per_device_train_batch_size * args.world_size,
        every=1,
        epoch=lambda: step() // max(-(-len(sampler) // args.gradient_accumulation_steps), 1),
        seed=args.data_seed if args.data_seed is not None else args.seed,
        shuffle=shuffle,
        keep_rest=True,
    )
    return prompt_loader(examples, sampler)
