"""Read rows from files of every format, each with its place; write files atomically."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from common.args import FileArguments
from common.data.json_files import read_json, read_json_lines
from common.data.source import COMPRESSED, Located, Row, Source
from common.data.tables import read_csv, read_parquet
from common.data.workbooks import WORKBOOKS, read_workbook
from common.errors import InputError

#: reads the rows of a file: a format
Reader = Callable[[Source], Iterator[Located]]
#: ending of the file name -> reader
Readers = dict[str, Reader]
#: reads the rows of the file at a path
FileReader = Callable[[str], Iterator[Located]]


def read_text(source: Source) -> Iterator[Located]:
    """Yield each line that is not blank as a row with column `text`."""
    for where, text, problem in source.lines(bounded=True, carriage_returns=True):
        if problem:
            yield where, problem
        elif text.strip():
            yield where, {"text": text}


TABLES: Readers = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    **dict.fromkeys(WORKBOOKS, read_workbook),
}
#: endings of tables in which each cell is a text
TEXT_CELLS = (".csv", ".tsv", *WORKBOOKS)
READERS: Readers = TABLES | {".txt": read_text, ".text": read_text}


def read_file(path: str | Path, readers: Readers | None = None, args: FileArguments | None = None) -> Iterator[Located]:
    """Yield the rows of a file, each with its place. The ending of the file name selects the format.

    `.jsonl`: one object a line. `.json`: see `common.data.json_files.rows_of`. `.csv`, `.tsv`: a header line, then one
    row a line. `.xlsx`, `.xls`, `.ods`: a sheet. `.parquet`. `.txt`, `.text`: one row a line, in column `text`. Blank
    lines are skipped. Any of these may be compressed, such as `rows.csv.gz`. Only `.json` files and sheets are loaded
    into memory completely.

    Args:
        path: the file.
        readers: the formats of a task, such as `TABLES | {".txt": my_reader}`; `READERS` if None.
        args: how to read the file; the defaults if None.

    Raises:
        InputError: the ending is unknown, or the file is unreadable.
    """
    source = Source(Path(path), args or FileArguments())
    readers = READERS if readers is None else readers
    ending = source.ending
    if ending not in readers:
        known = f"{' '.join(readers)}, also compressed ({' '.join(COMPRESSED)})"
        if ending in READERS:
            raise InputError(f"{path}: unknown file type {ending!r}: plain text has no columns; give a table: {known}")
        if not ending:
            raise InputError(f"{path}: the name has no ending for its format; add one, such as .tsv; known: {known}")
        raise InputError(f"{path}: unknown file type {ending!r}; convert it to one of: {known}")
    yield from readers[ending](source)


def too_long(row: Row, max_chars: int) -> Iterator[str]:
    """Yield a problem if a row has more than `max_chars` characters."""
    length = sum(_characters(value) for value in row.values())
    if length > max_chars:
        yield f"{length:,} characters in one row, more than --max_chars {max_chars:,}; split it, or raise --max_chars"


def _characters(value: Any) -> int:
    """Count the characters of all strings in `value`."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, inner))


def check_output(path: str | Path, overwrite: bool) -> None:
    """Raise `InputError` if `fresh_file` could not write `path`; create nothing."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no regular file; name a file to write")
        if path.exists() and not overwrite:
            raise InputError(
                f"{path}: exists already; choose another name, or add --overwrite (with make: ARGS=--overwrite)"
            )
        folder = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; name another file") from None
    if not folder.is_dir():
        raise InputError(f"{path}: cannot be written: {folder} is a file; name another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written: no permission to write into {folder}; name another folder")


@contextmanager
def fresh_file(path: str | Path, overwrite: bool) -> Iterator[TextIO]:
    """Open a file for writing that appears under its name only after the block completes; a link stays a link.

    Args:
        path: the file; missing folders are created.
        overwrite: replace an existing file.

    Raises:
        InputError: the file exists and `overwrite` is false, or the file cannot be written.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    part = target.parent / f"{target.name}.{os.getpid()}.part"  # no file of the user has this name
    check_output(path, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "w", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
