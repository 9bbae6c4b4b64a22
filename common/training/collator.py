"""Collate training batches: each batch is drawn for its epoch, and a part of a step without rows has no labels."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class EpochSeeded(Protocol):
    """A collator or data set that draws random numbers: they must follow from its seed, the epoch and the row.

    The trainer sets the epoch before the first batch. With the global random state the masks of a resumed run would
    differ from those of the uninterrupted run.
    """

    def set_epoch(self, epoch: int) -> None: ...


class TrainingCollator:
    """Collate training batches by a collator, which gets the epoch of the run before each batch.

    The epoch is in shared memory, because a worker that lives for several epochs has a copy of the collator.

    A part of a step without rows becomes a batch of one row whose labels are -100. The process then takes part in the
    step, and adds nothing to the loss and the gradient.

    Args:
        collate: the collator of the loader.
        seeded: the collator of the recipe, which `collate` may wrap.
        filler: the row of an empty part.
        labels: names of the labels in a batch.
    """

    def __init__(self, collate: Callable, seeded: Callable, filler: list[dict], labels: Iterable[str]):
        self.collate, self.seeded, self.filler, self.labels = collate, seeded, filler, list(labels)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch in this process and its workers."""
        self.epoch.fill_(epoch)

    def __call__(self, rows: list[dict]) -> Mapping[str, Tensor]:
        if isinstance(self.seeded, EpochSeeded):
            self.seeded.set_epoch(int(self.epoch))
        batch = self.collate(rows or self.filler)
        for name in () if rows else self.labels:
            if name in batch:
                batch[name] = torch.full_like(batch[name], -100)
        return batch
