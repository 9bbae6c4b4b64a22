"""Compare two runs on the same test rows, with a significance test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import DatasetDict

from common.data.json_files import parse_json
from common.errors import InputError

RESAMPLES = 1000


def read_predictions(path: str, reference: str) -> list[tuple[str, str]]:
    """Return reference and prediction of each row of `predictions_test.jsonl`; `reference` names the column."""
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fault = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise InputError(f"{path}: {fault}; name predictions_test.jsonl of another run") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            pair = row[reference], row["predicted"]
        except (ValueError, KeyError, TypeError, RecursionError):
            pair = (None, None)
        if not all(isinstance(text, str) for text in pair):
            raise InputError(
                f"{path}:{number}: lacks `{reference}` or `predicted`; name predictions_test.jsonl of another run"
            )
        pairs.append(pair)
    return pairs


def other_predictions(path: str | None, data: DatasetDict, reference: str) -> list[str] | None:
    """Return the test predictions of another run; None if `path` is None.

    Args:
        path: `predictions_test.jsonl` of the other run.
        data: the splits of this run.
        reference: column that holds the reference.

    Raises:
        InputError: this run has no test rows, or the predictions belong to other rows.
    """
    if path is None:
        return None
    if "test" not in data:
        raise InputError(f"{path}: this run has no test rows to compare; give --test_file")
    return check_comparison(path, data["test"][reference][:], reference)


def check_comparison(path: str, gold: list[str], reference: str) -> list[str]:
    """Return the predictions in a file; raise `InputError` if its references differ from `gold`."""
    other = read_predictions(path, reference)
    if len(other) != len(gold):
        raise InputError(
            f"{path}: has {len(other):,} rows, and this run {len(gold):,} test rows; compare on the same rows"
        )
    for number, ((reference, _), expected) in enumerate(zip(other, gold, strict=True), 1):
        if reference != expected:
            raise InputError(
                f"{path}:{number}: belongs to another test row (reference {reference[:60]!r}); compare on the same rows"
            )
    return [predicted for _, predicted in other]


def bootstrap_p(
    theirs: np.ndarray, ours: np.ndarray, score: Callable[[np.ndarray], float] = lambda rows: float(rows.mean())
) -> float:
    """Return the two-sided p-value of the difference of two scores, by a paired bootstrap over the test rows.

    With the observed difference `d` and the differences `d_b` of B = `RESAMPLES` resamples of the rows,

        p = (1 + number of resamples with |d_b - d| >= |d|) / (B + 1)

    The resampled differences are shifted to mean 0, the hypothesis of no difference (Efron and Tibshirani 1993, An
    Introduction to the Bootstrap, section 16.4; the 1 of Davison and Hinkley 1997, Bootstrap Methods and their
    Application, section 4.2.1). For scores of corpora: Koehn 2004, https://aclanthology.org/W04-3250. The bootstrap
    of sacreBLEU shifts absolute differences instead, and gives smaller p-values.

    Args:
        theirs: scores of the other run, shape (rows,), or statistics of its rows, (rows, statistics).
        ours: the same of this run.
        score: returns the score of some rows; default: the mean.
    """
    theirs, ours = np.asarray(theirs), np.asarray(ours)
    random = np.random.default_rng(0)

    def difference(rows: np.ndarray | slice) -> float:
        return score(ours[rows]) - score(theirs[rows])

    observed = difference(slice(None))
    size = len(ours)
    resampled = np.array([difference(random.integers(0, size, size)) for _ in range(RESAMPLES)])
    extreme = np.abs(resampled - observed) >= abs(observed) - 1e-12  # rounding of sums in another order
    return float((extreme.sum() + 1) / (RESAMPLES + 1))
