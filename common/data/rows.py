"""Load rows from files or the hub and check them before training. Problems name file and line."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from common.args import SPLITS, DataArguments
from common.data.files import (
    FileReader,
    Located,
    Readers,
    Row,
    _class_label_decoder,
    _too_long,
    parse_json,
    read_file,
)
from common.errors import InputError, Problems, tell, warn

CARVE_SEED = 0  # not --seed: runs with different seeds need the same validation rows

MOST_LABELS = 10_000  # a column of texts or numbers used as labels would make a head of gigabytes

#: errors of `datasets` when a data set is missing, unreachable or unreadable
UNREADABLE = (OSError, ValueError, TypeError, LookupError, RuntimeError, DatasetsError, ArrowException)

# Hub data sets and folders saved by datasets


def _read_dataset(args: DataArguments) -> dict[str, Iterator[Located]]:
    name = args.dataset_name
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, args.dataset_config_name)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--dataset_name {name}: {reason}; without a network, give a saved folder, or --train_file"
        ) from None
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}

    def rows(split: Dataset, title: str) -> Iterator[Located]:
        decode = _class_label_decoder(split.features)
        for number, row in enumerate(split, 1):
            yield f"{name} [{title}], row {number}", decode(row)

    return {title: rows(split, title) for title, split in splits.items()}


# Rows to a DatasetDict


def load_splits(
    args: DataArguments,
    columns: dict[str, str],
    check: Callable[[Row], Iterable[str]],
    list_columns: Iterable[str] = (),
    readers: Readers | None = None,
    read: FileReader | None = None,
    unique_ids: bool = False,
    carve_by: str | None = None,
    optional: dict[str, str] | None = None,
) -> DatasetDict:
    """Load the data of a run and check each row.

    Without validation rows, some training rows are split off: the same rows for each seed, with their number printed.

    Args:
        args: names the files or the data set.
        columns: the recipe's name of a column -> the name in the user's data. Other columns are dropped, except `id`.
            Without `id`, the number of the row is its id.
        check: yields the problems of a row.
        list_columns: columns of lists. A CSV cell contains JSON, or words separated by spaces.
        readers: file formats of the task, by ending (see `read_file`).
        read: reads a file, instead of `read_file`.
        unique_ids: reject rows of a split with the same `id`.
        carve_by: column; rows with the same value stay together when validation rows are split off.
        optional: more columns like `columns`; None in rows without them.

    Returns:
        The splits train, validation and, if given, test.

    Raises:
        InputError: up to ten problems, each with file and line.
    """
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    read = read or partial(read_file, readers=readers)
    sources = _read_dataset(args) if args.dataset_name else {split: read(f) for split, f in files.items() if f}
    unused = [split for split in sources if split not in SPLITS]
    if unused:
        warn(f"unused splits: {', '.join(unused)}; the recipe reads {', '.join(SPLITS)}")
    if "train" not in sources:
        known = f"; its splits: {', '.join(sources)}" if args.dataset_name else ""
        raise InputError(f"no training rows{known}; give --train_file, or a --dataset_name with a train split")
    problems = Problems()
    splits = {}
    for split in SPLITS:
        if split in sources:
            place = files[split] or f"{args.dataset_name} [{split}]"
            in_cells = tuple(list_columns) if Path(place).suffix.lower() in (".csv", ".tsv") else ()
            rows = checked(sources[split], place, columns, check, in_cells, args.max_chars, problems, optional)
            splits[split] = list(_check_unique_ids(rows, problems) if unique_ids else (row for _, row in rows))
    problems.check()
    _warn_of_shared_files(files)
    data = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
    if "validation" not in data:
        _carve_validation(data, args.validation_split_percentage, carve_by)
    for split, limit in zip(
        SPLITS, (args.max_train_samples, args.max_eval_samples, args.max_predict_samples), strict=True
    ):
        if split in data and limit is not None:
            data[split] = data[split].select(range(min(limit, len(data[split]))))
    return data


def checked(
    source: Iterable[Located],
    place: str,
    columns: dict[str, str],
    check: Callable[[Row], Iterable[str]],
    list_columns: tuple[str, ...],
    max_chars: int,
    problems: Problems,
    optional: dict[str, str] | None = None,
) -> Iterator[tuple[str, Row]]:
    """Yield the place and the row of each valid row; add the problems of the others to `problems`.

    Args:
        source: rows with their places.
        place: file or data set, for messages.
        columns: see `load_splits`.
        check: see `load_splits`.
        list_columns: columns whose strings are parsed into lists.
        max_chars: most characters of a row.
        problems: collects the problems.
        optional: see `load_splits`.
    """
    count = 0
    for where, item in source:
        count += 1
        if isinstance(item, str):
            problems.add(where, item)
            continue
        missing = [theirs for theirs in columns.values() if theirs not in item]
        if missing:
            problems.add(
                where,
                f"no column {' nor '.join(missing)}; columns here: {', '.join(map(str, item)) or 'none'}; "
                "name yours with the arguments that end in _column_name",
            )
            continue
        row = {ours: item[theirs] for ours, theirs in columns.items()}
        row |= {ours: item.get(theirs) for ours, theirs in (optional or {}).items()}
        for name in list_columns:
            if isinstance(row[name], str):
                row[name] = _list_of_cell(row[name])
        messages = list(check(row)) or list(_too_long(row, max_chars))
        for message in messages:
            problems.add(where, message)
        if not messages:
            yield where, row | {"id": str(item.get("id", count))}
    if count == 0:
        problems.add(place, "contains no rows; add some")


def _check_unique_ids(rows: Iterable[tuple[str, Row]], problems: Problems) -> Iterator[Row]:
    places: dict[str, str] = {}
    for where, row in rows:
        if row["id"] in places:
            problems.add(
                where, f"id {row['id']!r} is already the id of {places[row['id']]}; give each row a different id"
            )
        places.setdefault(row["id"], where)
        yield row


def _list_of_cell(cell: str) -> Any:
    try:
        return parse_json(cell) if cell.startswith("[") else cell.split()
    except (ValueError, RecursionError):
        return cell.split()


def _carve_validation(data: DatasetDict, percentage: int, by: str | None) -> None:
    rows = len(data["train"])
    groups = np.arange(rows) if by is None else np.unique(data["train"][by][:], return_inverse=True)[1]
    count = groups.max() + 1
    if count < 2:
        few = "one training row" if by is None else f"training rows with one {by}"
        raise InputError(f"{few}: too few to split off validation rows; give --validation_file")
    selected = np.random.default_rng(CARVE_SEED).permutation(count)[: max(1, count * percentage // 100)]
    carved = np.isin(groups, selected)
    data["train"], data["validation"] = (data["train"].select(np.flatnonzero(p)) for p in (~carved, carved))
    tell(f"no validation data given: {carved.sum()} of {rows} training rows are split off for validation")


def _warn_of_shared_files(files: dict[str, str | None]) -> None:
    given = [(split, Path(file)) for split, file in files.items() if file and Path(file).is_file()]
    for i, (split, file) in enumerate(given):
        for other_split, other in given[i + 1 :]:
            if file.samefile(other) or file.read_bytes() == other.read_bytes():
                warn(f"{other}: same content as the {split} file; {other_split} scores mean nothing; use other rows")


def label_names(data: DatasetDict, column: str) -> list[str]:
    """Return the sorted labels in list column `column` of all splits, and warn of labels missing from train.

    Raises:
        InputError: there are more than `MOST_LABELS` labels.
    """
    seen = {split: {label for row in rows[column] for label in row} for split, rows in data.items()}
    names = sorted(set().union(*seen.values()))
    if len(names) > MOST_LABELS:
        raise InputError(
            f"{column}: {len(names):,} different labels, more than {MOST_LABELS:,}; choose a column of labels"
        )
    unseen = [name for name in names if name not in seen["train"]]
    if unseen:
        splits = [split for split in seen if split != "train" and seen[split] & set(unseen)]
        warn(f"labels of {' and '.join(splits)} that training never sees and cannot learn: {', '.join(unseen)}")
    return names
