"""Draw rows at random with a fixed seed: the same rows for each `--seed`, in the shares of their classes."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

SEED = 0  # not --seed: runs with different seeds need the same rows


def rarest(classes: Sequence[Sequence[str]]) -> list[str | None]:
    """Return the rarest class of each row, by which the row is drawn; None for rows without a class."""
    counts = Counter(name for names in classes for name in names)
    return [min(names, key=lambda name: (counts[name], name), default=None) for names in classes]


def sample(classes: Sequence[Hashable], count: int) -> np.ndarray:
    """Return the sorted numbers of `count` rows, with the share that each class has in all rows.

    Each class gets a row before any class gets a second one. A larger sample contains each smaller one.

    Args:
        classes: the class of each row; the same value for all rows draws without regard to classes.
        count: rows to draw.
    """
    order, rank, sizes = _shuffled(classes)
    return np.sort(order[np.argsort(rank / sizes, kind="stable")[:count]])


def carve(classes: Sequence[Hashable], count: int) -> np.ndarray:
    """Return the sorted numbers of `count` rows to split off for validation, in the shares of the classes.

    The last row of each class is drawn only if no other row is left: training needs it.

    Args:
        classes: see `sample`.
        count: rows to draw.
    """
    order, rank, sizes = _shuffled(classes)
    _, number = np.unique(_first_rows(classes)[order], return_inverse=True)
    start = np.random.default_rng(SEED).random(number.max() + 1)[number]  # else the first row of each class is drawn
    place = (rank + start) / sizes + (rank == sizes - 1)
    return np.sort(order[np.argsort(place, kind="stable")[:count]])


def _first_rows(classes: Sequence[Hashable]) -> np.ndarray:
    """Return, for each row, the number of the first row of its class: a number for each class."""
    first: dict[Hashable, int] = {}
    return np.array([first.setdefault(name, row) for row, name in enumerate(classes)], dtype=np.int64)


def _shuffled(classes: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows in random order; for each of them its rank among the rows of its class, and their number."""
    order = np.random.default_rng(SEED).permutation(len(classes))
    number = _first_rows(classes)[order]
    rank = np.zeros(len(order))
    seen: Counter[int] = Counter()
    for place, name in enumerate(number.tolist()):
        rank[place] = seen[name]
        seen[name] += 1
    return order, rank, np.array([seen[name] for name in number.tolist()], dtype=np.float64)
