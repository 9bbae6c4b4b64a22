"""Read rows from files, each with its file and line; write files atomically."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from common.errors import InputError, Problems

Row = dict[str, Any]


#: integers of a `ClassLabel` column for "no label", as in SNLI and in the test splits of GLUE
NO_CLASS = (-1, -100)

#: item of a reader: the place of a row ("file:line"), and the row or its problem
Located = tuple[str, Row | str]


FileReader = Callable[[str], Iterator[Located]]


#: ending of the file name -> reader
Readers = dict[str, Callable[[Path], Iterator[Located]]]


def read_file(path: str | Path, readers: Readers | None = None) -> Iterator[Located]:
    """Yield the rows of a file, each with its place. The ending of the file name selects the format.

    `.jsonl`: one object a line. `.json`: a list of objects, or one object a line. `.csv`, `.tsv`: a header line, then
    one row a line. `.parquet`. `.txt`, `.text`: one row a line, in column `text`. Blank lines are skipped. Only `.json`
    files are loaded into memory completely.

    Args:
        path: the file.
        readers: the formats of a task, such as `TABLES | {".txt": my_reader}`; `READERS` if None.

    Raises:
        InputError: the ending is unknown, or the file is unreadable.
    """
    path = Path(path)
    readers = READERS if readers is None else readers
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown file type {path.suffix!r}; convert it to one of: {' '.join(readers)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def check_file(
    path: str | Path, check: Callable[[Row], Iterable[str]], max_chars: int, read: FileReader = read_file
) -> None:
    """Read a file once and check its rows.

    Args:
        path: the file.
        check: yields the problems of a row.
        max_chars: most characters of a row.
        read: reads the file.

    Raises:
        InputError: up to ten problems, each with file and line.
    """
    problems = Problems()
    for where, row in read(path):
        for message in [row] if isinstance(row, str) else [*check(row), *_too_long(row, max_chars)]:
            problems.add(where, message)
    problems.check()


def numbered_lines(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield place and text of each line; the text is None if the line is not UTF-8."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                text = None
            yield f"{path}:{number}", text


NOT_UTF8 = "not UTF-8 text; convert the file, for example: iconv -f LATIN1 -t UTF-8"


def parse_json(text: str) -> Any:
    """Parse `text` as strict JSON.

    Raises:
        ValueError: `text` is not JSON, repeats a key, or contains NaN, infinity or half of a surrogate pair.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"key {max(names, key=names.count)!r} occurs twice in one object")
        return values

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    if "\\ud" in text.lower():  # half of a surrogate pair, such as "\ud83d" alone, is not valid text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is not a character") from None
    return value


def json_fault(path: Path, error: Exception) -> tuple[str, str]:
    """Return place ("file:line" if known) and message of the error that `parse_json` raised for a file."""
    return f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path), _describe(error)


def _describe(error: Exception) -> str:
    """Return the problem of a JSON text and its column; the message of `json` counts lines within the text."""
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
                yield where, f"not a JSON object: {_describe(error)}; write each line with json.dumps"
            else:
                yield where, row if isinstance(row, dict) else f"not a JSON object but {_type_name(row)}"


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
        yield where, row if isinstance(row, dict) else f"not a JSON object but {_type_name(row)}"


def _read_csv(path: Path) -> Iterator[Located]:
    bad: list[Located] = []

    def text_lines() -> Iterator[str]:
        for where, text in numbered_lines(path):
            if text is None:
                bad.append((where, NOT_UTF8))
            yield (text or "") + "\n"

    tabs = path.suffix.lower() == ".tsv"  # tab-separated files have no quoting: quotation marks are text
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
                    yield where, f"two columns have the same name; rename one: {', '.join(header)}"
                    return
            elif len(cells) != len(header):
                yield where, f"{len(cells)} cells, but the header has {len(header)} columns"
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
    except ValueError as error:  # datasets has no feature for this type
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


def _read_text(path: Path) -> Iterator[Located]:
    for where, text in numbered_lines(path):
        if text is None:
            yield where, NOT_UTF8
        elif text.strip():
            yield where, {"text": text}


TABLES: Readers = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
READERS: Readers = TABLES | {".txt": _read_text, ".text": _read_text}


def _type_name(value: Any) -> str:
    names = {
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _class_label_decoder(features: Features) -> Callable[[Row], Row]:
    """Return a function that replaces the `ClassLabel` integers of a row by their names, and `NO_CLASS` by None."""

    def name(label: ClassLabel, value: int | None) -> str | None:
        if value is None or value in NO_CLASS:
            return None
        return label.names[value] if 0 <= value < len(label.names) else f"<unknown class {value}>"

    singles = {c: f for c, f in features.items() if isinstance(f, ClassLabel)}
    lists = {c: f.feature for c, f in features.items() if isinstance(getattr(f, "feature", None), ClassLabel)}

    def decode(row: Row) -> Row:
        row = row | {c: name(label, row[c]) for c, label in singles.items()}
        return row | {c: [name(label, v) for v in row[c]] for c, label in lists.items() if row[c] is not None}

    return decode


def _too_long(row: Row, max_chars: int) -> Iterator[str]:
    length = sum(_characters(value) for value in row.values())
    if length > max_chars:
        yield f"{length:,} characters in one row, more than --max_chars {max_chars:,}; split it, or raise --max_chars"


def _characters(value: Any) -> int:
    """Count the characters of all strings in `value`."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, inner))


@contextmanager
def fresh_file(path: str | Path, overwrite: bool) -> Iterator[TextIO]:
    """Open a file for writing that appears under its name only after the block completes.

    Args:
        path: the file; missing folders are created.
        overwrite: replace an existing file.

    Raises:
        InputError: the file exists and `overwrite` is false, or the file cannot be written.
    """
    path = Path(path)
    part = path.parent / f"{path.name}.{os.getpid()}.part"  # no file of the user has this name
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no regular file; name a file to write")
        if path.exists() and not overwrite:
            raise InputError(
                f"{path}: exists already; choose another name, or add --overwrite (with make: ARGS=--overwrite)"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "w", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
