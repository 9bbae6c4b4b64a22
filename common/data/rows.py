"""Load rows from files or the hub and check them before training. Problems name file and line."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from common.args import SPLITS, DataArguments, GroupedDataArguments
from common.data.domains import DOMAIN, OLD, check_domains, domain_of
from common.data.files import TEXT_CELLS, FileReader, Readers, read_file, too_long
from common.data.json_files import list_of_cell
from common.data.mapping import Splits
from common.data.samples import carve, rarest, sample
from common.data.source import Located, Row, Source
from common.data.tables import class_label_decoder, missing_columns
from common.errors import InputError, Problems, brief, one_line, tell, warn

#: name of a test split in which no row has a gold value
UNLABELED = "unlabeled"
#: errors of `datasets` when a data set is missing, unreachable or unreadable
UNREADABLE = (OSError, ValueError, TypeError, LookupError, RuntimeError, DatasetsError, ArrowException)

# Hub data sets and folders saved by datasets


def read_dataset(args: DataArguments) -> dict[str, Iterator[Located]]:
    """Return the rows of each split of `--dataset_name`, with their places."""
    name = args.dataset_name
    assert name is not None  # the caller checks it
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
        decode = class_label_decoder(split.features)
        for number, row in enumerate(split, 1):
            yield f"{name} [{title}], row {number}", decode(row)

    return {title: rows(split, title) for title, split in splits.items()}


# Rows to a DatasetDict


@dataclass(frozen=True)
class Gold:
    """What a model learns from a row: its label, tags, answers, target or summary.

    Attributes:
        name: its name in messages.
        columns: the recipe's names of its columns.
        missing: returns whether a row lacks its gold value; the row has all columns, absent ones with None.
        check: yields the problems of a row without a gold value, which is predicted.
        classes: returns the classes in a row, by which samples and validation rows are drawn.
        drop: drop rows without a gold value, instead of an error.
    """

    name: str
    columns: tuple[str, ...]
    missing: Callable[[Row], bool]
    check: Callable[[Row], Iterable[str]]
    classes: Callable[[Row], list[str]] = lambda row: []
    drop: bool = False


@dataclass(frozen=True)
class Rejected:
    """A row with problems. `place` is its file and line."""

    place: str
    problems: list[str]


@dataclass(frozen=True)
class Unlabeled:
    """A row without a gold value. `place` is its file and line; `problem` says what is missing."""

    place: str
    row: Row
    problem: str


Entry = Row | Rejected | Unlabeled


def load_splits(
    args: DataArguments,
    columns: dict[str, str],
    check: Callable[[Row], Iterable[str]],
    list_columns: Iterable[str] = (),
    readers: Readers | None = None,
    read: FileReader | None = None,
    unique_ids: bool = False,
    carve_by: str | Callable[[Row], Any] | None = None,
    optional: dict[str, str] | None = None,
    gold: Gold | None = None,
    convert: Callable[[Row], Row] | None = None,
    prepare: Callable[[dict[str, Iterable[Located]]], dict[str, Iterable[Located]]] | None = None,
) -> DatasetDict:
    """Load the data of a run and check each row.

    Under `--domain_column` each row has its domain in column `domain`. The rows of `--replay_file` follow the training
    rows, and column `old` marks them.

    Without validation rows, some training rows are split off, and their number is printed. These rows and the rows of
    `--max_train_samples` and its siblings are drawn at random (see `common.data.samples`), the same for each seed.
    Rows that are not drawn may be invalid.

    Args:
        args: names the files or the data set.
        columns: the recipe's name of a column -> the name in the user's data. Other columns are dropped, except `id`.
            Without `id`, the number of the row is its id.
        check: yields the problems of a row.
        list_columns: columns of lists. A CSV cell contains JSON, or words separated by spaces.
        readers: file formats of the task, by ending (see `read_file`).
        read: reads a file, instead of `read_file`.
        unique_ids: reject rows of a split with the same `id`.
        carve_by: column, or function of a row; rows with the same value stay together when validation rows are split
            off.
        optional: more columns like `columns`; None in rows without them.
        gold: what the model learns from a row; None if each valid row can be learned.
        convert: returns a valid row in the form of the recipe.
        prepare: converts the rows of all splits before they are checked.

    Returns:
        The splits train, validation and, if given, test. A test split in which no row has a gold value is named
        `UNLABELED` instead, and lacks the column.

    Raises:
        InputError: up to ten problems, each with file and line.
    """
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    old = args.replay_file if isinstance(args, GroupedDataArguments) else None
    read = read or partial(read_file, readers=readers, args=args)
    sources: Mapping[str, Iterable[Located]]
    sources = read_dataset(args) if args.dataset_name else {split: read(f) for split, f in files.items() if f}
    unused = [split for split in sources if split not in SPLITS]
    if unused:
        warn(f"unused splits: {', '.join(unused)}; the recipe reads {', '.join(SPLITS)}")
    if "train" not in sources:
        known = f"; its splits: {', '.join(sources)}" if args.dataset_name else ""
        raise InputError(f"no training rows{known}; give --train_file, or a --dataset_name with a train split")
    sources = {split: rows for split, rows in sources.items() if split in SPLITS}
    if old is not None:
        sources, files = sources | {OLD: read(old)}, files | {OLD: old}
    if prepare is not None:
        sources = prepare(dict(sources))
    problems = Problems(args.skip_bad_rows)
    arguments = {getattr(args, f.name): f.name for f in fields(args) if f.name.endswith("_column_name")}
    leave_out = None
    if isinstance(args, GroupedDataArguments) and args.domain_column is not None:
        columns, leave_out = columns | {DOMAIN: args.domain_column}, args.leave_out
        arguments = {args.domain_column: "domain_column"} | arguments
    splits: dict[str, list[Entry]] = {}
    places: dict[str, str] = {}
    for split in (*SPLITS, OLD):
        if split in sources:
            place = files[split] or f"{args.dataset_name} [{split}]"
            in_cells = tuple(list_columns) if Source(Path(place)).ending in TEXT_CELLS else ()
            found = checked(
                sources[split], columns, check, in_cells, args.max_chars, optional, gold, unique_ids, convert, arguments
            )
            entries = list(found)
            if split in ("train", "validation", OLD) and leave_out is not None:
                entries = _without_domain(split, place, entries, leave_out)
            name, rows = _without_unlabeled(split, place, entries, gold)
            splits[name], places[name] = rows, place
            if not rows:
                problems.add(place, "contains no rows; add some")
    if "validation" not in splits and splits["train"]:
        places["validation"] = places["train"]
        _carve_validation(splits, places["train"], args.validation_split_percentage, carve_by, gold)
    limits = dict(zip(SPLITS, (args.max_train_samples, args.max_eval_samples, args.max_predict_samples), strict=True))
    limits |= {UNLABELED: args.max_predict_samples, OLD: None}
    lists: dict[str, list[Row]] = {}
    for name, rows in splits.items():
        limit = limits[name]
        drawn = rows if limit is None else [rows[i] for i in sample(_classes(rows, gold), limit)]
        if len(drawn) < len(rows):
            tell(f"{name}: {len(drawn):,} of {len(rows):,} rows are used, drawn at random")
        kept = accepted(drawn, problems)
        if args.skip_bad_rows and drawn and not kept:
            problems.add(places[name], "each row has a problem")
        if name == "train" and args.train_rows and not problems.count:
            kept = [kept[i] for i in row_numbers(args.train_rows, len(kept))]
            tell(f"train: the {len(kept):,} rows of --train_rows are used")
        lists[name] = kept
    problems.check()
    _warn_of_shared_files({split: files[split] for split in SPLITS})
    if OLD in lists:
        lists = with_old(lists)
    data = Splits({name: _dataset(rows, places[name]) for name, rows in lists.items()})
    if DOMAIN in columns:
        check_domains(data, columns[DOMAIN])
    return data


def with_old(lists: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the rows of each split with column `OLD`; the old rows follow the training rows."""
    tell(f"train: {len(lists['train']):,} new rows, and {len(lists[OLD]):,} old ones of --replay_file")
    marked = {name: [row | {OLD: name == OLD} for row in rows] for name, rows in lists.items()}
    marked["train"] += marked.pop(OLD)
    return marked


def row_numbers(path: str, rows: int) -> list[int]:
    """Return the numbers in the file of `--train_rows`, counted from 0.

    Args:
        path: the file; its numbers count from 1.
        rows: number of training rows.

    Raises:
        InputError: the file has no numbers, or a line is not the number of a row, or is repeated.
    """
    problems, numbers = Problems(), dict[int, str]()
    for where, text, problem in Source(Path(path)).lines():
        number = int(text) - 1 if text.strip().isdecimal() and len(text) < 20 else -1
        if problem or not 0 <= number < rows:
            problems.add(where, problem or f"{brief(text)} is no row; give a number from 1 to {rows:,} a line")
        elif number in numbers:
            problems.add(where, f"row {number + 1} is also in {numbers[number]}; name each row once")
        else:
            numbers[number] = where
    problems.check()
    if not numbers:
        raise InputError(f"--train_rows {path}: has no numbers; name the rows to train on, one a line")
    return list(numbers)


def checked(
    source: Iterable[Located],
    columns: dict[str, str],
    check: Callable[[Row], Iterable[str]],
    list_columns: tuple[str, ...],
    max_chars: int,
    optional: dict[str, str] | None = None,
    gold: Gold | None = None,
    unique_ids: bool = False,
    convert: Callable[[Row], Row] | None = None,
    arguments: Mapping[str, str] | None = None,
) -> Iterator[Entry]:
    """Yield each row with the recipe's columns and `id`, or what is wrong with the row.

    Args:
        source: rows with their places.
        columns: see `load_splits`.
        check: see `load_splits`.
        list_columns: columns whose strings are parsed into lists.
        max_chars: most characters of a row.
        optional: see `load_splits`.
        gold: see `load_splits`.
        unique_ids: see `load_splits`.
        convert: see `load_splits`.
        arguments: the user's name of a column -> the argument that sets it, for messages.
    """
    places: dict[str, str] = {}
    for number, (where, item) in enumerate(source, 1):
        if isinstance(item, str):
            yield Rejected(where, [item])
            continue
        missing = [theirs for ours, theirs in columns.items() if theirs not in item]
        if missing and not (gold and {columns.get(name) for name in gold.columns}.issuperset(missing)):
            problem = missing_columns(item, missing, arguments)
            yield Rejected(problem.place(item, where), [problem])
            continue
        row: Row = {ours: item.get(theirs) for ours, theirs in (columns | (optional or {})).items()}
        for name in list_columns:
            if isinstance(row[name], str):
                row[name] = list_of_cell(row[name])
        domain = {DOMAIN: domain_of(row.pop(DOMAIN))} if DOMAIN in columns else {}
        lacking = gold if gold is not None and gold.missing(row) else None
        messages = list((lacking.check if lacking else check)(row)) or list(too_long(row, max_chars))
        if None in domain.values():
            messages.append(f"{columns[DOMAIN]} is {brief(item[columns[DOMAIN]])}; needed: the name of a domain")
        row["id"] = str(item.get("id", number))
        if unique_ids and places.setdefault(row["id"], where) != where:
            messages.append(f"id {row['id']!r} is already the id of {places[row['id']]}; give each row a different id")
        if messages:
            yield Rejected(where, messages)
        elif lacking:
            yield _unlabeled(where, item, row | domain, lacking, columns, missing, arguments)
        else:
            yield (convert(row) if convert else row) | domain


def _unlabeled(
    where: str,
    item: Row,
    row: Row,
    gold: Gold,
    columns: dict[str, str],
    missing: list[str],
    arguments: Mapping[str, str] | None,
) -> Unlabeled:
    """Return a row without a gold value; a column that a table lacks is a problem of its header."""
    remedy = "add it, remove the row, or pass --drop_unlabeled true"
    if not missing:
        values = ", ".join(f"{columns[name]} is {brief(row[name])}" for name in gold.columns)
        return Unlabeled(where, row, f"no {gold.name}{values and f': {values}'}; {remedy}")
    problem = missing_columns(item, missing, arguments)
    place = problem.place(item, where)
    return Unlabeled(place, row, problem if place != where else type(problem)(f"{problem}; {remedy}"))


def _without_domain(split: str, place: str, entries: list[Entry], domain: str) -> list[Entry]:
    """Return the entries of a split without the rows of `domain`; rejected rows stay.

    Raises:
        InputError: no training row has the domain, or each row has it.
    """
    domains = [e.get(DOMAIN) if isinstance(e, dict) else None for e in entries]
    left = [entry for entry, name in zip(entries, domains, strict=True) if name != domain]
    if split == OLD and not left:
        raise InputError(f"--leave_out {domain}: each row of {place} has this domain; leave --replay_file out")
    if split == "train" and domain not in domains:
        known = sorted({name for name in domains if name is not None})
        raise InputError(f"--leave_out {domain}: no training row has this domain; the domains are {', '.join(known)}")
    if entries and not left:
        raise InputError(f"--leave_out {domain}: each row of {place} has this domain; give rows of other domains")
    tell(f"{split}: {len(entries) - len(left):,} rows of the domain {domain} are left out")
    return left


def _without_unlabeled(split: str, place: str, found: list[Entry], gold: Gold | None) -> tuple[str, list[Entry]]:
    """Return the name of a split, `UNLABELED` if no test row has a gold value, and its rows.

    Rows without a gold value are dropped and counted if `gold` says so; else `accepted` reports them.
    """
    missing = sum(isinstance(entry, Unlabeled) for entry in found)
    if gold is None or not missing:
        return split, found
    labeled = any(isinstance(entry, dict) for entry in found)
    if split == "test" and not labeled:
        warn(f"{place}: each row lacks its {gold.name}; the rows are predicted and not scored")
        rows: list[Entry] = [e.row if isinstance(e, Unlabeled) else e for e in found]
        for row in rows:
            if isinstance(row, dict):
                for name in gold.columns:
                    del row[name]
        return UNLABELED, rows
    if gold.drop and labeled:
        tell(f"{place}: dropped {missing:,} of {len(found):,} rows that lack their {gold.name}")
        return split, [entry for entry in found if not isinstance(entry, Unlabeled)]
    return split, found


def _classes(rows: list[Entry], gold: Gold | None) -> list[str | None]:
    """Return the rarest class of each row; None for rows without a class."""
    return rarest([gold.classes(row) if gold and isinstance(row, dict) else [] for row in rows])


def _dataset(rows: list[Row], place: str) -> Dataset:
    """Return the rows as a data set.

    Raises:
        InputError: a value has another type than those above it in its column, or is an integer beyond 64 bits.
    """
    try:
        return Dataset.from_list(rows)
    except (ArrowException, OverflowError, TypeError, ValueError) as error:
        for name in rows[0]:
            values = [row[name] for row in rows]
            # the longest run of values that fits ends before the first that does not
            end = bisect_left(range(1, len(values) + 1), True, key=lambda count: not _fits(values[:count]))
            if end < len(values):
                reason = "differs in type from the rows above; give all values of a column one type"
                if not _fits([values[end]]):
                    reason = "has an integer beyond 64 bits; write it as a text"
                raise InputError(f"{place}, row {rows[end]['id']}: {name} is {brief(values[end])}: {reason}") from None
        raise InputError(f"{place}: {one_line(error)}; give all values of a column one type") from None


def _fits(values: list[Any]) -> bool:
    try:
        Dataset.from_dict({"values": values})
    except (ArrowException, OverflowError, TypeError, ValueError):
        return False
    return True


def accepted(entries: Iterable[Entry], problems: Problems) -> list[Row]:
    """Return the rows among `entries`; add the problems of the others to `problems`."""
    rows = []
    for entry in entries:
        if isinstance(entry, Unlabeled):
            problems.reject(entry.place, [entry.problem])
        elif isinstance(entry, Rejected):
            problems.reject(entry.place, entry.problems)
        else:
            rows.append(entry)
    return rows


def _carve_validation(
    splits: dict[str, list[Entry]],
    place: str,
    percentage: int,
    by: str | Callable[[Row], Any] | None,
    gold: Gold | None,
) -> None:
    """Move rows, or whole groups of rows with the same value of `by`, from train to validation.

    Rejected rows stay in train, as do groups with more than twice the wanted number of rows. A row without a value is a
    group of its own.
    """
    rows = splits["train"]
    wanted = max(1, len(rows) * percentage // 100)
    groups = _groups(rows, by)
    if by is not None and len(groups) == 1 < len(rows):
        warn(
            f"{place}: all training rows have the same text, question or context, and so have the validation rows that "
            "are split off; give --validation_file"
        )
        groups = _groups(rows, None)
    if len(groups) < 2:
        problems = Problems()
        accepted(rows, problems)
        problems.check()
        raise InputError(f"{place}: one training row: too few to split off validation rows; give --validation_file")
    most = max(2 * wanted, min(map(len, groups)))
    groups = [group for group in groups if len(group) <= most]
    classes = _classes(rows, gold)
    drawn = carve([classes[group[0]] for group in groups], max(1, len(groups) * percentage // 100))
    carved = {number for group in drawn.tolist() for number in groups[group]}
    splits["train"] = [row for number, row in enumerate(rows) if number not in carved]
    splits["validation"] = [row for number, row in enumerate(rows) if number in carved]
    count = len(splits["validation"])
    tell(f"no validation data given: {count} of {len(rows)} training rows are split off for validation")


def _groups(rows: list[Entry], by: str | Callable[[Row], Any] | None) -> list[list[int]]:
    """Return the numbers of the rows of each group, in the order of their first rows; without rejected rows."""
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        if isinstance(row, dict):
            value = None if by is None else row[by] if isinstance(by, str) else by(row)
            groups.setdefault(str(value) if value else number, []).append(number)
    return list(groups.values())


def _warn_of_shared_files(files: dict[str, str | None]) -> None:
    given = [(split, Path(file)) for split, file in files.items() if file and Path(file).is_file()]
    for i, (split, file) in enumerate(given):
        for other_split, other in given[i + 1 :]:
            if file.samefile(other) or file.read_bytes() == other.read_bytes():
                warn(f"{other}: same content as the {split} file; {other_split} scores mean nothing; use other rows")
