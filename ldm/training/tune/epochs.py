"""Which pictures each micro-batch is of, told by its number alone.

An epoch shows every picture as often as it is repeated. A batch holds pictures of one size, so those of one bucket.
Whoever is asked for batch n of a run answers the same: nothing is stored to resume, and it is of no matter how many
processes share the work.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Epochs:
    """An endless row of batches.

    groups: of each bucket the pictures in it, by number, each as often as an epoch shows it
    """

    groups: tuple[tuple[int, ...], ...]
    batch: int
    seed: int

    def __len__(self) -> int:
        """Batches of an epoch."""
        return sum(-(-len(group) // self.batch) for group in self.groups)

    @property
    def shown(self) -> int:
        """Pictures of an epoch, repeats counted."""
        return sum(map(len, self.groups))

    def pictures(self, number: int) -> tuple[int, ...]:
        """The pictures of batch `number`, 0-based. The last batch of a bucket is filled up from its beginning."""
        epoch, position = divmod(number, len(self))
        return _order(self, epoch)[position]


@lru_cache(maxsize=4)
def _order(epochs: Epochs, epoch: int) -> tuple[tuple[int, ...], ...]:
    """All batches of an epoch, buckets mixed."""
    generator = torch.Generator().manual_seed((epochs.seed * 1_000_003 + epoch) % 2**63)

    def shuffled(items: Sequence[int]) -> list[int]:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    batches = []
    for group in epochs.groups:
        order = shuffled(group)
        for start in range(0, len(order), epochs.batch):
            batches.append(tuple(order[i % len(order)] for i in range(start, start + epochs.batch)))
    return tuple(batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def epochs_of(
    buckets: Sequence[Hashable], repeats: Sequence[int], regular: Sequence[bool], batch: int, seed: int
) -> Epochs:
    """The batches of pictures with these buckets.

    repeats: how often an epoch shows each
    regular: whether each is of the class and not of the subject (DreamBooth's prior preservation): these are repeated
             or left out, evenly, until an epoch shows as many of them as of the others
    """
    counts = list(repeats)
    own = sum(count for count, is_regular in zip(counts, regular, strict=True) if not is_regular)
    others = [i for i, is_regular in enumerate(regular) if is_regular]
    for place, i in enumerate(others):
        counts[i] = own * (place + 1) // len(others) - own * place // len(others)
    groups: dict[Hashable, list[int]] = {}
    for i, bucket in enumerate(buckets):
        groups.setdefault(bucket, []).extend([i] * counts[i])
    return Epochs(tuple(tuple(group) for group in groups.values() if group), batch, seed)
