"""Tell `make transfer` the texts and scores of this recipe (`common.run.transferable`).

Scored pairs can be a source and no target: their scores are not means over rows.
"""

from typing import Any

import numpy as np
from transformers import AutoModel

from common.errors import InputError
from common.run.transferable import RowStatistics, TaskRows, of_mean

from .arguments import COLUMNS, MatchingDataArguments
from .reading import load_pairs

#: scores with statistics of rows: those of queries, and those of translations
SCORES = ("ndcg@10", "mrr@10", "accuracy", "forward", "backward")


def training_rows(parsed: tuple[Any, ...]) -> TaskRows:
    """Return both texts of each row as one text; there are no classes."""
    data_args = next(part for part in parsed if isinstance(part, MatchingDataArguments))
    teacher = next(part.teacher for part in parsed if hasattr(part, "teacher"))
    data, _, _ = load_pairs(data_args, teacher)
    one, other = COLUMNS[data_args.rows][:2]
    scored = data_args.rows in ("ranking", "translation")
    return TaskRows(
        pieces=[[" ".join(pair)] for pair in zip(data["train"][one][:], data["train"][other][:], strict=True)],
        classes=None,
        head=AutoModel,
        evaluated=(len(data["validation"]), len(data.get("test", [])) if scored else 0),
    )


def row_statistics(rows: list[dict[str, Any]], score: str) -> RowStatistics:
    """Return the statistics of a score in `SCORES`: its mean over distinct queries, or over translations."""
    if score not in SCORES:
        raise InputError(f"score {score}: no statistics of rows for it; choose one of {', '.join(SCORES)}")
    if score == "accuracy":
        return of_mean([(row["forward"] + row["backward"]) / 2 for row in rows])
    if score in ("forward", "backward"):
        return of_mean([row[score] for row in rows])
    seen: set[str] = set()
    values = np.zeros((len(rows), 2))  # of a query that several rows have, the first one counts
    for of_row, row in zip(values, rows, strict=True):
        if row["query"] not in seen:
            seen.add(row["query"])
            of_row[:] = row[score], 1
    return RowStatistics(values, lambda sums: sums[..., 0] / sums[..., 1])
