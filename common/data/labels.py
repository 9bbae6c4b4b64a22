"""List the classes of all splits, and warn of classes that are hard to learn."""

import unicodedata
from collections import Counter, defaultdict

from datasets import DatasetDict

from common.errors import InputError, brief, warn

MOST_LABELS = 10_000  # a column of texts or numbers used as labels would make a head of gigabytes
#: a class with fewer training rows is warned of
FEW = 5
#: most names in a warning
SHOWN = 20


def label_names(data: DatasetDict, column: str) -> list[str]:
    """Return the sorted labels in list column `column` of all splits, and warn of labels missing from train.

    Raises:
        InputError: there are more than `MOST_LABELS` labels.
    """
    counts = label_counts(data, column)
    check_number(counts, column)
    warn_of_unseen(counts, "labels")
    return sorted(set().union(*counts.values()))


def label_counts(data: DatasetDict, column: str) -> dict[str, Counter]:
    """Return for each split how many rows have each label in `column`, a column of labels or of lists of them."""
    counts = {}
    for split, rows in data.items():
        labels = rows[column][:]
        lists = [[label] if isinstance(label, str) else set(label) for label in labels]
        counts[split] = Counter(label for of_row in lists for label in of_row)
    return counts


def check_number(counts: dict[str, Counter], column: str) -> None:
    """Raise `InputError` if the splits have more than `MOST_LABELS` labels."""
    number = len(set().union(*counts.values()))
    if number > MOST_LABELS:
        raise InputError(f"{column}: {number:,} different labels, more than {MOST_LABELS:,}; choose a column of labels")


def warn_of_unseen(counts: dict[str, Counter], noun: str) -> None:
    """Warn of labels that no training row has."""
    unseen = sorted(set().union(*counts.values()) - set(counts["train"]))
    if unseen:
        splits = [split for split in counts if split != "train" and set(counts[split]) & set(unseen)]
        warn(f"{noun} of {' and '.join(splits)} that training never sees and cannot learn: {_listed(unseen)}")


def warn_of_few(counts: dict[str, Counter], noun: str) -> None:
    """Warn of classes with fewer than `FEW` training rows."""
    few = [f"{name} ({count})" for name, count in sorted(counts["train"].items()) if count < FEW]
    if few:
        warn(f"{noun} with fewer than {FEW} training rows, which are hard to learn: {_listed(few)}; add rows")


def warn_of_alike(counts: dict[str, Counter], noun: str) -> None:
    """Warn of labels that differ only in blanks, case or the encoding of accents."""
    spellings: dict[str, Counter] = defaultdict(Counter)
    for of_split in counts.values():
        for name, count in of_split.items():
            spellings["".join(unicodedata.normalize("NFKC", name).casefold().split())][name] += count
    alike = [alternatives for alternatives in spellings.values() if len(alternatives) > 1]
    if alike:
        each = [
            " and ".join(f"{brief(name)} ({count:,} rows)" for name, count in names.most_common()) for names in alike
        ]
        warn(
            f"{noun} that differ only in blanks or case, each learned as a class of its own: {'; '.join(each[:SHOWN])}"
            f"; if they mean the same, write them the same in the data"
        )


def _listed(names: list[str]) -> str:
    more = f", ... and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
