"""A training set with augmented copies of its rows, made anew in each epoch while the rows are fetched."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from common.data.augment.pieces import SpanText
from common.data.source import Row

#: makes a copy of a text from random numbers
Augmentation = Callable[[SpanText, np.random.Generator], SpanText]


class AugmentedRows(TorchDataset):
    """The encoded windows of a training set, then `copies` times as many windows of augmented rows.

    A copy depends only on `seed`, epoch, number of its row and number of the copy: an exactly resumed run, several
    processes and other batches see the same copies. A copy has as many windows as its row, and its length for the
    order of the rows is that of its row. If the augmented text has more windows, they take turns over the epochs; if it
    has fewer, the first are repeated.

    Args:
        windows: the encoded rows, one or more windows a row.
        row_of: number of the row of each window; the windows of a row are neighbours.
        rows: the rows before encoding.
        augment: returns an augmented row.
        encode: encodes a row; returns the columns of its windows.
        seed: seed of the copies.
        copies: augmented copies of each row in an epoch.
        prepare: called once, before the first epoch.
    """

    def __init__(
        self,
        windows: Dataset,
        row_of: Sequence[int],
        rows: Dataset,
        augment: Callable[[Row, np.random.Generator], Row],
        encode: Callable[[Row], dict[str, list]],
        seed: int,
        copies: int,
        prepare: Callable[[], None] | None = None,
    ):
        self.windows, self.rows, self.augment, self.encode = windows, rows, augment, encode
        self.seed, self.copies, self.epoch, self.prepare = seed, copies, 0, prepare
        self.row_of = np.asarray(row_of)
        starts = np.r_[True, np.diff(self.row_of) != 0]
        #: number of each window in its row
        self.place = np.arange(len(self.row_of)) - np.flatnonzero(starts)[np.cumsum(starts) - 1]
        self.sizes = np.bincount(self.row_of)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that seeds the copies."""
        if self.prepare is not None:
            self.prepare()
            self.prepare = None
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.windows) * (1 + self.copies)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        places = [divmod(int(number), len(self.windows)) for number in numbers]
        originals = iter(self.windows.__getitems__([window for copy, window in places if copy == 0]))
        return [self._window(copy, window) if copy else next(originals) for copy, window in places]

    def copy_of(self, row: int, copy: int) -> Row:
        """Return copy number `copy`, from 1, of a row in this epoch."""
        return self.augment(self.rows[row], np.random.default_rng([self.seed, self.epoch, row, copy]))

    def _window(self, copy: int, window: int) -> dict[str, Any]:
        row, place = int(self.row_of[window]), int(self.place[window])
        columns = self.encode(self.copy_of(row, copy))
        count = len(next(iter(columns.values())))
        shift = self.epoch if count > self.sizes[row] else 0
        return {name: values[(place + shift) % count] for name, values in columns.items()}
