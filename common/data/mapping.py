"""Apply a function to all rows, without the search for an earlier result that `datasets` makes first."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from datasets import Dataset, DatasetDict


class Splits(DatasetDict):
    """The splits of a data set in memory, whose `map` hashes no function (see `map_rows`)."""

    def map(self, function: Callable[..., Any], **options: Any) -> "Splits":
        """Return the splits with `function` applied to their rows; see `datasets.Dataset.map` for the options."""
        return Splits({split: map_rows(rows, function, **options) for split, rows in self.items()})


def map_rows(rows: Dataset, function: Callable[..., Any], **options: Any) -> Dataset:
    """Return `rows.map(function, **options)`, without a hash of `function`.

    `datasets` hashes the function of a script with all modules that it uses, once for each split, and looks for a file
    of that name. This takes seconds for each split, and rows in memory have no such file.

    Args:
        rows: rows in memory.
        function: as `datasets.Dataset.map` calls it.
        options: those of `datasets.Dataset.map`.
    """
    return rows.map(function, new_fingerprint=uuid4().hex, **options)
