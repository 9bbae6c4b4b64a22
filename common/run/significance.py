"""Compare two runs on the same test rows: read the other run's predictions, and test the difference of the scores."""

from pathlib import Path

import numpy as np
from datasets import DatasetDict

from common.data.files import parse_json
from common.errors import InputError

RESAMPLES = 1000


def read_predictions(path: str, reference: str) -> list[tuple[str, str]]:
    """Return reference and prediction of each row of a run's `predictions_test.jsonl`; `reference` names the column."""
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fault = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise InputError(f"{path}: {fault}; name predictions_test.jsonl of a run to compare with") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            pair = row[reference], row["predicted"]
        except (ValueError, KeyError, TypeError, RecursionError):
            pair = (None, None)
        if not all(isinstance(text, str) for text in pair):
            raise InputError(
                f"{path}:{number}: needs `{reference}` and `predicted`, as in predictions_test.jsonl of a run"
            )
        found.append(pair)
    return found


def other_predictions(path: str | None, data: DatasetDict, reference: str) -> list[str] | None:
    """Return the test predictions of another run; None if `path` is None.

    Args:
        path: `predictions_test.jsonl` of the other run.
        data: the splits of this run.
        reference: column that holds the reference.

    Raises:
        InputError: there are no test rows, or the predictions are of other rows.
    """
    if path is None:
        return None
    if "test" not in data:
        raise InputError(f"{path}: there are no test rows to compare with; give --test_file")
    return check_comparison(path, data["test"][reference][:], reference)


def check_comparison(path: str, gold: list[str], reference: str) -> list[str]:
    """Return the predictions in a file; raise `InputError` unless they are of the references `gold`, in that order."""
    other = read_predictions(path, reference)
    if len(other) != len(gold):
        raise InputError(
            f"{path}: has {len(other):,} rows, and there are {len(gold):,} test rows; compare on the same rows"
        )
    for number, ((reference, _), own) in enumerate(zip(other, gold, strict=True), 1):
        if reference != own:
            raise InputError(f"{path}:{number}: is of another test row: the reference is {reference[:60]!r}")
    return [predicted for _, predicted in other]


def bootstrap_p(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The chance `p` that the difference of two mean scores is none, by a paired bootstrap over the test rows.

    Both have shape (rows,). The share of `RESAMPLES` samples of rows in which the difference, moved so that its mean is
    0, is as large as the one found, as in sacreBLEU (Koehn 2004, https://aclanthology.org/W04-3250).
    """
    differences = np.asarray(ours) - np.asarray(theirs)
    random = np.random.default_rng(0)
    means = np.array(
        [differences[random.integers(0, len(differences), len(differences))].mean() for _ in range(RESAMPLES)]
    )
    found = abs(differences.mean())
    return float((np.sum(np.abs(means - differences.mean()) >= found) + 1) / (RESAMPLES + 1))
