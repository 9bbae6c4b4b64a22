"""Define what a recipe tells `make transfer`: its training rows, and statistics of test rows that give its score.

A recipe has a module `transfer` with two functions:

    training_rows(parsed) -> TaskRows                    # parsed: one instance of each dataclass of its arguments
    row_statistics(rows, score) -> RowStatistics         # rows: the lines of predictions_test.jsonl

`row_statistics` raises `InputError` for a score without such statistics, also for no rows: a plan is checked so.

Without `row_statistics` a recipe can be a source of a plan, and no target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from common.errors import InputError


@dataclass(frozen=True)
class TaskRows:
    """The training rows of a task.

    Attributes:
        pieces: the parts of each row that have a class: its words, or the whole text as one piece.
        classes: the class of each piece; None for a task without classes.
        head: class of transformers that loads the saved model, such as `AutoModelForTokenClassification`.
        evaluated: number of validation rows and of test rows.
        label_names: the labels of all splits, which decide whether a trained head fits; empty without labels.
    """

    pieces: list[list[str]]
    classes: list[list[str]] | None
    head: type[Any]
    evaluated: tuple[int, int]
    label_names: frozenset[str] = frozenset()

    @cached_property
    def texts(self) -> list[str]:
        """Return each row as one text."""
        return [" ".join(pieces) for pieces in self.pieces]

    @property
    def types(self) -> frozenset[str]:
        """Return the classes without the prefix of a tag, in lower case."""
        return frozenset(name.lower().removeprefix("b-").removeprefix("i-") for name in self.label_names) - {"o"}


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of test rows whose sums give a score, so that a bootstrap over the rows scores no row twice.

    Attributes:
        values: shape (rows, statistics).
        score: returns the scores, shape (...), of sums over rows, shape (..., statistics); more is better.
        points: what a score of 1 is in points: 1 for BLEU and ROUGE, which go up to 100.
    """

    values: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    points: float = 100.0

    def of_all(self) -> float:
        """Return the score of all rows."""
        return float(self.score(self.values.sum(0)))


def of_mean(values: Sequence[float], points: float = 100.0) -> RowStatistics:
    """Return the statistics of a score that is the mean over the rows."""
    column = np.asarray(values, dtype=np.float64)
    return RowStatistics(np.stack([column, np.ones_like(column)], 1), lambda sums: sums[..., 0] / sums[..., 1], points)


def of_spans(counts: Sequence[tuple[int, int, int]], score: str = "f1") -> RowStatistics:
    """Return the statistics of micro precision, recall or F1 of spans.

    Args:
        counts: number of correct, predicted and gold spans of each row.
        score: precision, recall or f1.
    """
    parts = {"precision": (0, 1), "recall": (1, 0), "f1": (1, 1)}  # weights of gold and predicted in the denominator
    if score not in parts:
        raise InputError(f"score {score}: no statistics of rows for it; choose one of {', '.join(parts)}")
    gold, predicted = parts[score]

    def of_sums(sums: np.ndarray) -> np.ndarray:
        return _ratio((gold + predicted) * sums[..., 0], predicted * sums[..., 1] + gold * sums[..., 2])

    return RowStatistics(np.asarray(counts, dtype=np.float64).reshape(len(counts), 3), of_sums)


def of_classes(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], score: str, ignored: Sequence[str] = ()
) -> RowStatistics:
    """Return the statistics of a score of a classifier.

    Averages are over the classes that occur in the gold labels or in the predictions of the rows, as in scikit-learn.

    Args:
        gold: the labels of each row; one for single-label rows.
        predicted: the predicted labels of each row.
        score: accuracy (all labels of a row correct), macro_f1, micro_f1 or weighted_f1.
        ignored: classes that the averages leave out, such as "no relation".
    """
    if score == "accuracy":
        return of_mean([float(set(a) == set(b)) for a, b in zip(gold, predicted, strict=True)])
    known = ("accuracy", "macro_f1", "micro_f1", "weighted_f1")
    if score not in known:
        raise InputError(f"score {score}: no statistics of rows for it; choose one of {', '.join(known)}")
    names = sorted({name for rows in (gold, predicted) for row in rows for name in row} - set(ignored))
    number = {name: i for i, name in enumerate(names)}
    values = np.zeros((len(gold), 3, len(names)), dtype=np.float32)  # correct, predicted, gold
    for row, (theirs, ours) in enumerate(zip(gold, predicted, strict=True)):
        for place, labels in ((0, set(theirs) & set(ours)), (1, set(ours)), (2, set(theirs))):
            values[row, place, [number[name] for name in labels if name in number]] = 1

    def of_sums(sums: np.ndarray) -> np.ndarray:
        correct, ours, theirs = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, len(names)), -2, 0)
        if score == "micro_f1":
            return _ratio(2 * correct.sum(-1), ours.sum(-1) + theirs.sum(-1))
        f1 = _ratio(2 * correct, ours + theirs)
        if score == "weighted_f1":
            return _ratio((f1 * theirs).sum(-1), theirs.sum(-1))
        return _ratio(f1.sum(-1), ((ours + theirs) > 0).sum(-1))

    return RowStatistics(values.reshape(len(gold), 3 * len(names)), of_sums)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the quotient; 0 where the divisor is 0, as scikit-learn and seqeval do."""
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)
