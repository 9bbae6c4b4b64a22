"""Score each domain of the rows, and say how often each domain is sampled."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from common.args import MEAN, SPLITS, WORST, TrainingArguments, score_of_rows
from common.errors import InputError, brief, warn

#: column of the domain, in rows and in encoded rows
DOMAIN = "domain"
#: column of the training rows and their encoded rows: whether a row is from `--replay_file`
OLD = "old"
#: a column with more values, such as an id or a text, has no domains
MOST_DOMAINS = 200
#: most names in a warning
SHOWN = 20

#: the values of columns `domain` and `old`, as far as rows have them, with the rows that have these values
Groups = list[tuple[dict[str, Any], Dataset]]
#: selects values of some rows from those of all rows
Select = Callable[[Any], Any]


def domain_of(value: Any) -> str | None:
    """Return the name of a domain as a text; None for a value that names none.

    A list of equal values, which a sentence has whose words were rows of a table, is its first value.
    """
    if isinstance(value, list):
        return domain_of(value[0]) if value and all(one == value[0] for one in value) else None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int) else None


def check_domains(data: DatasetDict, column: str) -> None:
    """Warn of domains without a training row, and of rows that all have one domain.

    Args:
        data: the splits.
        column: the value of `--domain_column`.

    Raises:
        InputError: the column has too many values.
    """
    counts = {split: Counter(rows[DOMAIN][:]) for split, rows in data.items() if split in SPLITS}
    names = set().union(*counts.values())
    if len(names) > MOST_DOMAINS:
        raise InputError(
            f"--domain_column {column}: {len(names):,} different values, more than {MOST_DOMAINS}; name a column of "
            "domains"
        )
    if len(names) == 1:
        warn(f"--domain_column {column}: all rows have the domain {brief(next(iter(names)))}; there is one score")
    for split, of_split in counts.items():
        unseen = [f"{brief(n)} ({count:,} rows)" for n, count in of_split.items() if n not in counts["train"]]
        if unseen:
            more = f", ... and {len(unseen) - SHOWN:,} more" if len(unseen) > SHOWN else ""
            warn(f"{split}: domains that no training row has: {', '.join(unseen[:SHOWN])}{more}")


def domain_counts(data: DatasetDict) -> dict[str, dict[str, int]]:
    """Return split -> domain -> rows, of the splits with domains."""
    return {split: dict(Counter(rows[DOMAIN][:])) for split, rows in data.items() if DOMAIN in rows.column_names}


def groups_of(rows: Dataset) -> Groups:
    """Divide rows by their domain, and into new and old ones."""
    names = [name for name in (DOMAIN, OLD) if name in rows.column_names]
    if not names:
        return [({}, rows)]
    places: dict[tuple, list[int]] = {}
    for number, values in enumerate(zip(*(rows[name] for name in names), strict=True)):
        places.setdefault(values, []).append(number)
    return [(dict(zip(names, values, strict=True)), rows.select(places[values])) for values in sorted(places)]


def with_groups(groups: Groups) -> Dataset:
    """Join the rows of groups, each with the values of its group."""
    parts = []
    for values, rows in groups:
        for name, value in values.items():
            rows = rows.add_column(name, [value] * len(rows)) if len(rows) else rows
        parts += [rows] if len(rows) else []
    return concatenate_datasets(parts)


def carry(columns: dict[str, list], rows: dict[str, list], numbers: Sequence[int] | None = None) -> dict:
    """Add columns `domain` and `old` of `rows` to their encoded `columns`.

    The first window of a row has its values, and each other window None.

    Args:
        columns: the encoded rows.
        rows: the rows before encoding; columns that they lack are not added.
        numbers: number of the row of each encoded row, in increasing order; None if there is one for each.
    """
    for name in (DOMAIN, OLD):
        if name in rows:
            values = rows[name]
            order = range(len(values)) if numbers is None else numbers
            new = [number != last for number, last in zip(order, [None, *order], strict=False)]
            columns = columns | {name: [values[n] if first else None for n, first in zip(order, new, strict=True)]}
    return columns


def selecting(rows: list[int]) -> Select:
    """Return a function that selects `rows` from a list, an array, a data set or a prediction."""

    def select(values: Any) -> Any:
        if isinstance(values, EvalPrediction | PredictionOutput):
            return EvalPrediction(select(values.predictions), select(values.label_ids))
        if isinstance(values, Dataset):
            return values.select(rows)
        return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]

    return select


def by_domain(
    rows: Dataset,
    score: Callable[[Select], dict[str, float]],
    args: TrainingArguments,
    names: Sequence[str] = (),
) -> dict[str, float]:
    """Return the scores of all rows, and of each domain some of them.

    Args:
        rows: the scored rows with column `domain`, encoded or not; without the column there are no domains.
        score: `score(select)` returns the scores of some rows; `select(values)` takes their values from those of all.
        args: name the score that selects the best checkpoint.
        names: the scores of the domains; if empty, the selecting one, or the first score if the loss selects.

    Returns:
        The scores; `domain_NAME_SCORE` and `domain_NAME_rows` of each domain; `mean_domain_SCORE` over the domains and
        `worst_domain_SCORE`. A domain whose rows do not have the score is left out of it.
    """
    result = score(lambda values: values)
    if DOMAIN not in rows.column_names:
        return result
    places: dict[str, list[int]] = {}
    for number, name in enumerate(name for name in rows[DOMAIN] if name is not None):
        places.setdefault(name, []).append(number)
    best = score_of_rows(args.metric_for_best_model)
    names = names or (best if best in result else next(iter(result)),)
    found = {domain: score(selecting(places[domain])) for domain in sorted(places)}
    for name in names:
        each = {domain: scores[name] for domain, scores in found.items() if name in scores}
        if not each:
            continue  # such as the area under a curve, which rows of one class do not have
        result |= {f"domain_{domain}_{name}": value for domain, value in each.items()}
        worst = max if name in args.lower_is_better else min
        result |= {f"{MEAN}{name}": float(np.mean(list(each.values()))), f"{WORST}{name}": worst(each.values())}
    return result | {f"domain_{domain}_rows": len(places[domain]) for domain in found}
