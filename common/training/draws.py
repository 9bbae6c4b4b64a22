"""Choose the rows of each epoch from groups of rows: domains by temperature, and old rows by their number."""

from typing import Any

import numpy as np
from datasets import Dataset

from common.args import TrainingArguments
from common.data.augment.rows import AugmentedRows
from common.data.domains import DOMAIN, OLD
from common.errors import tell


def shares(sizes: list[int], temperature: float, total: int) -> list[int]:
    """Divide `total` rows among groups by their size to the power of 1 / `temperature`; each gets at least one.

    Args:
        sizes: rows of each group.
        temperature: 1 for shares in proportion to the sizes; a high one for equal shares.
        total: number of rows; at least one for each group.

    Returns:
        The rows of each group, rounded by largest remainder.
    """
    weights = np.asarray(sizes, dtype=np.float64) ** (1 / temperature)
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    for empty in np.flatnonzero(counts == 0):
        counts[counts.argmax()] -= 1
        counts[empty] = 1
    return counts.tolist()


class EpochRows:
    """Draw the rows of each epoch: a fixed number from each group.

    The rows of a group come in passes, each with a new shuffle. An epoch continues where the one before ended, so each
    row of a group comes equally often. The rows depend on seed and epoch only.

    Args:
        groups: row numbers of each group.
        counts: rows of each group in an epoch.
        seed: seed of the order.
    """

    def __init__(self, groups: list[np.ndarray], counts: list[int], seed: int):
        self.groups, self.counts, self.seed = groups, counts, seed

    def __len__(self) -> int:
        return sum(self.counts)

    def rows(self, epoch: int) -> np.ndarray:
        """Return the row numbers of an epoch, shuffled."""
        parts = [self._part(number, epoch) for number in range(len(self.groups))]
        return np.random.default_rng([self.seed, epoch]).permutation(np.concatenate(parts))

    def _part(self, number: int, epoch: int) -> np.ndarray:
        rows, count = self.groups[number], self.counts[number]
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // len(rows), -(-last // len(rows)))
        shuffled = [np.random.default_rng([self.seed, number, one]).permutation(rows) for one in passes]
        return np.concatenate([rows[:0], *shuffled])[first - passes.start * len(rows) :][:count]


def of_windows(dataset: Dataset | AugmentedRows, column: str) -> list[Any]:
    """Return the value of `column` of each encoded row; windows of a row have the value of its first window."""
    if isinstance(dataset, AugmentedRows):
        return of_windows(dataset.windows, column) * (1 + dataset.copies)
    values = dataset[column][:]
    for number, value in enumerate(values):
        if value is None:
            values[number] = values[number - 1]
    return values


def draws_of(dataset: Any, args: TrainingArguments, of: str = "an epoch") -> EpochRows | None:
    """Return the rows of each epoch under `--domain_temperature` or with old rows; None if an epoch takes every row.

    Args:
        dataset: the encoded training rows, with the columns of `common.data.domains.carry`.
        args: temperature, use of the old rows, and seed.
        of: what the rows are of, for the message.
    """
    windows = dataset.windows if isinstance(dataset, AugmentedRows) else dataset
    has_old = isinstance(windows, Dataset) and OLD in windows.column_names
    if args.domain_temperature is None and not has_old:
        return None
    old = np.asarray(of_windows(dataset, OLD)) if has_old else np.zeros(len(dataset), dtype=bool)
    new = np.flatnonzero(~old)
    groups, counts, names = [new], [len(new)], ["new rows"]
    if args.domain_temperature is not None:
        domains = np.asarray(of_windows(dataset, DOMAIN))
        names = sorted(set(domains[new].tolist()))
        groups = [new[domains[new] == name] for name in names]
        counts = shares([len(rows) for rows in groups], args.domain_temperature, len(new))
    if args.keep == "replay":
        groups, names = [*groups, np.flatnonzero(old)], [*names, "old rows"]
        counts.append(replayed(len(groups[-1]), len(new), args.replay_rows))
    listed = ", ".join(f"{n} {c:,} of {len(rows):,}" for n, c, rows in zip(names, counts, groups, strict=True))
    tell(f"rows of {of}: {listed}")
    return EpochRows(groups, counts, args.seed if args.data_seed is None else args.data_seed)


def replayed(old: int, new: int, asked: float | None) -> int:
    """Return the number of old rows in an epoch.

    Args:
        old: number of old rows.
        new: number of new rows.
        asked: `--replay_rows`: a number, or below 1 a share of the old rows; None for all, at most as many as new rows.
    """
    if asked is None:
        return min(old, new)
    return max(1, round(asked * old)) if asked < 1 else min(old, round(asked))
