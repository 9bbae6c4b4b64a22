"""Apply a function to all rows, without the search for an earlier result that `datasets` makes first."""

from collections.abc import Callable
from typing import Any, TypeVar
from uuid import uuid4

from datasets import Dataset, DatasetDict

Rows = TypeVar("Rows", Dataset, DatasetDict)


def map_rows(data: Rows, function: Callable[..., Any], **options: Any) -> Rows:
    """Return `data.map(function, **options)`, without a hash of `function`.

    `datasets` hashes the function of a script with all modules that it uses, once for each split, and looks for a file
    of that name. This takes longer than a short training, and rows in memory have no such file.

    Args:
        data: rows in memory, of one split or of several.
        function: as `datasets.Dataset.map` calls it.
        options: those of `datasets.Dataset.map`.
    """
    if isinstance(data, DatasetDict):
        return DatasetDict({split: map_rows(rows, function, **options) for split, rows in data.items()})
    return data.map(function, new_fingerprint=uuid4().hex, **options)
