"""Rows from files or the hub, checked before anything is trained. Errors name file and line."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features

from common.args import DataArguments
from common.errors import InputError, Problems, tell, warn

SPLITS = ("train", "validation", "test")
CARVE_SEED = 0  # not --seed: runs with other seeds must be scored on the same rows

MOST_LABELS = 10_000  # a column of texts or numbers taken for labels would make a head of gigabytes

Row = dict[str, Any]
#: what a reader yields: where the row stands ("file:line"), and the row, or a sentence that says what is wrong with it
Located = tuple[str, Row | str]
FileReader = Callable[[str], Iterator[Located]]


# Files to rows


def read_file(path: str | Path, txt: str = "text") -> Iterator[Located]:
    """Rows of a file, each with its place; the ending of the name decides the format.

    `.jsonl`: an object a line. `.json`: a list of objects, or an object a line. `.csv`, `.tsv`: a header line, then a
    row a line. `.parquet`. `.conll`, `.bio`, `.iob`, `.iob2`: a word a line, its tag in the last column, an empty line
    between sentences. `.txt`: plain text, a row a line, or under `txt="conll"` columns as those. Blank lines are no
    rows. Memory does not grow with the file except for `.json`. Raises `InputError` for an unknown ending or an
    unreadable file.
    """
    path = Path(path)
    ending = path.suffix.lower()
    reader = READERS.get(f".{txt}" if ending == ".txt" else ending)
    if reader is None:
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}; known: {' '.join(READERS)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def check_file(
    path: str | Path, check: Callable[[Row], Iterable[str]], max_chars: int, read: FileReader = read_file
) -> None:
    """Read a file through once; raise `InputError` for broken rows and for what `check` finds, with file and line."""
    problems = Problems()
    for where, row in read(path):
        for message in [row] if isinstance(row, str) else [*check(row), *_too_long(row, max_chars)]:
            problems.add(where, message)
    problems.check()


def numbered_lines(path: Path) -> Iterator[tuple[str, str | None]]:
    """Place and text of each line; the text is None where the line is not UTF-8."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                text = None
            yield f"{path}:{number}", text


NOT_UTF8 = "not UTF-8 text; convert the file, for example: iconv -f LATIN1 -t UTF-8"


def parse_json(text: str) -> Any:
    """What `text` holds as JSON. Raises `ValueError` also for a key that stands twice, NaN, and half a character."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"key {max(names, key=names.count)!r} stands twice in one object")
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    if "\\ud" in text.lower():  # half a surrogate pair, such as "\ud83d" alone, is no text
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is no character") from None
    return found


def json_fault(path: Path, error: Exception) -> tuple[str, str]:
    """Place ("file:line" where it is known) and words of the error that `parse_json` raised for the text of a file."""
    return f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path), _says(error)


def _says(error: Exception) -> str:
    """What is wrong with a JSON text, and where in its line; the message of `json` counts lines within the text."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    line = error.doc.split("\n")[error.lineno - 1]
    start = max(0, error.colno - 21)
    return f"{error.msg.removesuffix(' at')} in column {error.colno}, at {line[start : error.colno + 19]!r}"


def _read_json_lines(path: Path) -> Iterator[Located]:
    for where, text in numbered_lines(path):
        if text is None:
            yield where, NOT_UTF8
        elif text.strip():
            try:
                row = parse_json(text)
            except (ValueError, RecursionError) as error:
                yield where, f"not a JSON object: {_says(error)}; a line is one whole object, as json.dumps writes it"
            else:
                yield where, row if isinstance(row, dict) else f"not a JSON object but {_kind(row)}"


def _read_json(path: Path) -> Iterator[Located]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        yield from ((where, NOT_UTF8) for where, line in numbered_lines(path) if line is None)
        return
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    try:
        rows = parse_json(text)
    except (ValueError, RecursionError) as error:
        where, fault = json_fault(path, error)
        yield where, f"not a JSON list: {fault}; write it with json.dump"
        return
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, row if isinstance(row, dict) else f"not a JSON object but {_kind(row)}"


def _read_csv(path: Path) -> Iterator[Located]:
    bad: list[Located] = []

    def text_lines() -> Iterator[str]:
        for where, text in numbered_lines(path):
            if text is None:
                bad.append((where, NOT_UTF8))
            yield (text or "") + "\n"

    tabs = path.suffix.lower() == ".tsv"  # tab-separated files quote nothing, and quotation marks in them are text
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(text_lines(), **({"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}), strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            yield from bad
            bad.clear()
            if not cells:
                continue
            if not header:
                header = cells
                if len(set(header)) < len(header):
                    yield where, f"two columns of one name in the header: {', '.join(header)}"
                    return
            elif len(cells) != len(header):
                yield where, f"{len(cells)} cells, but the header names {len(header)} columns"
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        yield f"{path}:{start}", f"not {'tab' if tabs else 'comma'}-separated text: {error}"


def _read_parquet(path: Path) -> Iterator[Located]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        yield str(path), f"not a Parquet file: {error}"
        return
    try:
        decode = _class_label_decoder(Features.from_arrow_schema(file.schema_arrow))
    except ValueError as error:  # a type that datasets has no feature for
        yield str(path), f"a column cannot be read: {error}"
        return
    number = 0
    try:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", decode(row)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        yield f"{path}, row {number + 1}", f"cannot be read: {error}"


def _read_conll(path: Path) -> Iterator[Located]:
    tokens: list[str] = []
    tags: list[str] = []
    first, columns, broken = "", 0, False
    for where, text in numbered_lines(path):
        cells = [] if text is None else (text.split("\t") if "\t" in text else text.split())
        cells = [cell.strip() for cell in cells]
        if text is None:
            yield where, NOT_UTF8
            broken = True
        elif not text.strip() or cells[0] == "-DOCSTART-":
            if tokens and not broken:
                yield first, {"tokens": tokens, "ner_tags": tags}
            tokens, tags, broken = [], [], False
        elif len(cells) < 2 or (columns and len(cells) != columns) or not all(cells):
            expected = f"the lines above have {columns}" if columns else "a word and its tag are needed"
            yield where, f"{len([c for c in cells if c])} columns, but {expected}: {text[:60]!r}"
            broken = True
        else:
            columns = columns or len(cells)
            first = first if tokens else where
            tokens.append(cells[0])
            tags.append(cells[-1])
    if tokens and not broken:
        yield first, {"tokens": tokens, "ner_tags": tags}


def _read_text(path: Path) -> Iterator[Located]:
    for where, text in numbered_lines(path):
        if text is None:
            yield where, NOT_UTF8
        elif text.strip():
            yield where, {"text": text}


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".conll": _read_conll,
    ".bio": _read_conll,
    ".iob": _read_conll,
    ".iob2": _read_conll,
    ".txt": _read_text,
    ".text": _read_text,
}


def _kind(value: Any) -> str:
    names = {
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


# Hub data sets and folders saved by datasets


def _class_label_decoder(features: Features) -> Callable[[Row], Row]:
    """A function that turns the `ClassLabel` integers of a row into their names."""

    def name(label: ClassLabel, value: int | None) -> str | None:
        if value is None:
            return None
        return label.names[value] if 0 <= value < len(label.names) else f"<unknown class {value}>"

    singles = {c: f for c, f in features.items() if isinstance(f, ClassLabel)}
    lists = {c: f.feature for c, f in features.items() if isinstance(getattr(f, "feature", None), ClassLabel)}

    def decode(row: Row) -> Row:
        row = row | {c: name(label, row[c]) for c, label in singles.items()}
        return row | {c: [name(label, v) for v in row[c]] for c, label in lists.items() if row[c] is not None}

    return decode


def _read_dataset(args: DataArguments) -> dict[str, Iterator[Located]]:
    name = args.dataset_name
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, args.dataset_config_name)
    except Exception as error:  # the library raises a dozen kinds, down to bare RuntimeError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--dataset_name {name}: {reason}; without a network give a folder saved by datasets, or --train_file"
        ) from None
    splits = found if isinstance(found, dict) else {"train": found}

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
    txt: str = "text",
    read: FileReader | None = None,
    unique_ids: bool = False,
    carve_by: str | None = None,
    optional: dict[str, str] | None = None,
) -> DatasetDict:
    """The data of a run as a DatasetDict with splits train, validation and perhaps test, every row checked.

    `columns` maps the names a recipe works with to the names in the user's data; only these are kept, and `id`, which
    is the number of the row where it has none. Those of `optional` may be missing, and are None there. `check(row)`
    yields a sentence for each thing that is wrong with a row. In a CSV cell a list column (`list_columns`) holds a JSON
    list or words separated by spaces. `txt` is as for `read_file`, in whose place `read` reads a file where a task has
    formats of its own. With `unique_ids` no two rows of a split may have the same `id`. A missing validation
    split is carved from train, the same rows whatever the seed, and said; rows with one value in the column `carve_by`
    stay together. Raises `InputError` with up to ten problems, each with file and line.
    """
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    read = read or partial(read_file, txt=txt)
    sources = _read_dataset(args) if args.dataset_name else {split: read(f) for split, f in files.items() if f}
    unused = [split for split in sources if split not in SPLITS]
    if unused:
        warn(f"splits that are not used: {', '.join(unused)}; used are those named {', '.join(SPLITS)}")
    if "train" not in sources:
        there = f"; splits there: {', '.join(sources)}" if args.dataset_name else ""
        raise InputError(f"no training rows{there}; give --train_file or a --dataset_name with a train split")
    problems = Problems()
    splits = {}
    for split in SPLITS:
        if split in sources:
            place = files[split] or f"{args.dataset_name} [{split}]"
            in_cells = tuple(list_columns) if Path(place).suffix.lower() in (".csv", ".tsv") else ()
            rows = checked(sources[split], place, columns, check, in_cells, args.max_chars, problems, optional)
            splits[split] = list(_without_twins(rows, problems) if unique_ids else (row for _, row in rows))
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
    """Place and row of each row of `source` that nothing is wrong with, as `load_splits` describes.

    What is wrong goes to `problems`.
    """
    count = 0
    for where, found in source:
        count += 1
        if isinstance(found, str):
            problems.add(where, found)
            continue
        missing = [theirs for theirs in columns.values() if theirs not in found]
        if missing:
            problems.add(
                where,
                f"no column {' nor '.join(missing)}; columns here: {', '.join(map(str, found)) or 'none'}; "
                "name yours by the arguments that end in _column_name",
            )
            continue
        row = {ours: found[theirs] for ours, theirs in columns.items()}
        row |= {ours: found.get(theirs) for ours, theirs in (optional or {}).items()}
        for name in list_columns:
            if isinstance(row[name], str):
                row[name] = _list_of_cell(row[name])
        wrong = list(check(row)) or list(_too_long(row, max_chars))
        for message in wrong:
            problems.add(where, message)
        if not wrong:
            yield where, row | {"id": str(found.get("id", count))}
    if count == 0:
        problems.add(place, "holds no rows")


def _without_twins(rows: Iterable[tuple[str, Row]], problems: Problems) -> Iterator[Row]:
    places: dict[str, str] = {}
    for where, row in rows:
        if row["id"] in places:
            problems.add(where, f"id {row['id']!r} is that of {places[row['id']]}; each row needs its own")
        places.setdefault(row["id"], where)
        yield row


def _too_long(row: Row, max_chars: int) -> Iterator[str]:
    length = sum(_characters(value) for value in row.values())
    if length > max_chars:
        yield f"{length:,} characters in one row, more than --max_chars {max_chars:,}; split it, or allow more"


def _characters(value: Any) -> int:
    """Characters of a text, or of all texts in a list or an object."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, inner))


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
        one = "one training row" if by is None else f"training rows with one {by}"
        raise InputError(f"{one} is too few to carve validation rows from; give --validation_file")
    drawn = np.random.default_rng(CARVE_SEED).permutation(count)[: max(1, count * percentage // 100)]
    carved = np.isin(groups, drawn)
    data["train"], data["validation"] = (data["train"].select(np.flatnonzero(p)) for p in (~carved, carved))
    tell(f"no validation data given: {carved.sum()} of the {rows} training rows are carved for it")


def _warn_of_shared_files(files: dict[str, str | None]) -> None:
    given = [(split, Path(file)) for split, file in files.items() if file and Path(file).is_file()]
    for i, (split, file) in enumerate(given):
        for other_split, other in given[i + 1 :]:
            if file.samefile(other) or file.read_bytes() == other.read_bytes():
                warn(f"{split} and {other_split} are the same file ({other}): the {other_split} scores say nothing")


def label_names(data: DatasetDict, column: str) -> list[str]:
    """All labels in list column `column` of any split, sorted; warns of those that training never sees."""
    seen = {split: {label for row in rows[column] for label in row} for split, rows in data.items()}
    names = sorted(set().union(*seen.values()))
    if len(names) > MOST_LABELS:
        raise InputError(
            f"{column}: {len(names):,} different labels, more than {MOST_LABELS:,}; is it the right column?"
        )
    unseen = [name for name in names if name not in seen["train"]]
    if unseen:
        splits = [split for split in seen if split != "train" and seen[split] & set(unseen)]
        warn(f"seen in {' and '.join(splits)} but never in training, so they cannot be learned: {', '.join(unseen)}")
    return names
