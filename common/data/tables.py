"""Read rows from tables: text with delimiters (CSV, TSV) and Parquet."""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from common.data.source import Line, Located, Row, Source
from common.errors import InputError, SameProblem

#: characters that files use between cells -> their names
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "'|'", "@": "'@'", "^": "'^'", "~": "'~'"}
SAMPLED_LINES = 50  # lines that decide about the layout of a table in messages
#: integers of a `ClassLabel` column for "no label", as in SNLI and in the test splits of GLUE
NO_CLASS = (-1, -100)
SAME_NAME = "two columns have the same name; rename one"
DECLARED = re.compile(r"sep=(.)", re.IGNORECASE)
TAG = re.compile(r"O|[BIESLUM]-\S+")
CONLL = "it looks like CoNLL columns, a word and its tag a line: end the name of the file in .conll"
QUOTING = "if quotation marks are text, give --csv_quoting none; if they enclose cells, --csv_quoting csv"


@dataclass
class Table:
    """The columns of a table, for messages about a column that is missing.

    Attributes:
        where: the file and line of the header, or the file.
        names: the names of the columns.
        unusable: name -> reason, for columns without values.
        source: the file, if it is text with delimiters.
    """

    where: str
    names: list[str]
    unusable: dict[str, str] = field(default_factory=dict)
    source: Source | None = None


class TableRow(dict[str, Any]):
    """A row of a table, without the columns that have no name or are unusable."""

    __slots__ = ("table",)

    def __init__(self, cells: Row, table: Table):
        super().__init__(cells)
        self.table = table

    def __or__(self, more: Row) -> "TableRow":  # type: ignore[override]
        return TableRow({**self, **more}, self.table)


class MissingColumn(SameProblem):
    """The problem of a row that lacks a column. In a table, it is a problem of the header, told once."""

    def place(self, row: Row, where: str) -> str:
        """Return the place of the problem of `row`, which is at `where`."""
        return row.table.where if isinstance(row, TableRow) else where


def missing_columns(row: Row, names: Sequence[str], arguments: Mapping[str, str] | None = None) -> MissingColumn:
    """Return the problem that `row` lacks the columns `names`; `arguments` has the argument that sets each name."""
    unusable = row.table.unusable if isinstance(row, TableRow) else {}
    for name in names:
        if name in unusable:
            return MissingColumn(f"{unusable[name]}: {name}")
    here = f"columns here: {', '.join(map(str, row)) or 'none'}"
    hint = header_hint(row, names)
    known = [f"--{arguments[name]}" for name in names if name in arguments] if arguments else []
    setting = " and ".join(known) if len(known) == len(names) else "the arguments that end in _column_name"
    renaming = "" if "likely" in hint else f"; name yours with {setting}"
    return MissingColumn(f"no column {' nor '.join(names)}; {here}{renaming}{hint}")


def header_hint(row: Row, names: Sequence[str]) -> str:
    """Return the end of a message about missing columns `names`: another delimiter, no header, or another format."""
    table = row.table if isinstance(row, TableRow) else None
    if table is None or table.source is None or not table.source.args.csv_header:
        return ""
    likely = likely_delimiter(table, names)
    if likely:
        return f"; {_delimiter_remedy(likely)}"
    listed = ",".join(names) if len(names) == len(table.names) else f"with {len(table.names)} names"
    header = f"if this line is a row, give --csv_header false --column_names {listed}, in the order of the columns"
    return f"; {f'{CONLL}; ' if _looks_like_conll(table.source) else ''}{header}"


def likely_delimiter(table: Table, names: Sequence[str] = ()) -> str | None:
    """Return a delimiter that gives the columns `names`, or gives all lines the same number of cells, or None."""
    if table.source is None:
        return None
    lines = [line.text for line in islice(table.source.lines(carriage_returns=True), SAMPLED_LINES)]
    present = delimiter_of(table.source)
    for delimiter in (one for one in DELIMITERS if one != present):
        try:
            rows = [row for row in csv.reader(lines, delimiter=delimiter) if row]
        except csv.Error:
            rows = [line.split(delimiter) for line in lines if line]
        header = [cell.strip() for cell in rows[0]] if rows else []
        if names and set(names) <= set(header):
            return delimiter
        if len(table.names) == 1 and len(header) > 1 and all(len(row) == len(header) for row in rows):
            return delimiter
    return None


def delimiter_of(source: Source) -> str:
    """Return the character between the cells of a file. A first line such as `sep=;`, as Excel writes it, names it."""
    if source.args.csv_delimiter:
        return source.args.csv_delimiter
    declared = DECLARED.fullmatch(next(iter(source.lines(carriage_returns=True)), Line("", "")).text)
    return declared[1] if declared else "\t" if source.ending == ".tsv" else ","


def _delimiter_remedy(likely: str) -> str:
    argument = "tab" if likely == "\t" else f"'{likely}'"
    return f"{DELIMITERS[likely]} is the likely delimiter; give --csv_delimiter {argument}"


def _looks_like_conll(source: Source) -> bool:
    lines = [line.text for line in islice(source.lines(carriage_returns=True), SAMPLED_LINES) if line.text.strip()]
    cells = [line.split("\t") if "\t" in line else line.split() for line in lines]
    cells = [words for words in cells if not words[0].startswith("#")]
    return bool(cells) and all(len(words) > 1 and TAG.fullmatch(words[-1].strip()) for words in cells)


# Text with delimiters

#: place of a record, and its cells or the problem of a line
Record = tuple[str, list[str] | str]


def read_csv(source: Source) -> Iterator[Located]:
    """Yield the rows of a `.csv` or `.tsv` file, by the arguments that begin with `--csv`.

    Columns without a name are ignored, and so are cells beyond the header if they are blank.

    Raises:
        InputError: quotation marks or the delimiter do not fit the file.
    """
    quoted = source.args.csv_quoting == "csv" or (
        source.args.csv_quoting == "auto" and (source.ending != ".tsv" or _is_quoted(source))
    )
    given = source.args.column_names
    names: list[str] = []
    table, kept, remedy = None, [], ""
    for where, cells in (_quoted_records if quoted else _plain_records)(source):
        if isinstance(cells, str):
            yield where, cells
            continue
        if table is None and len(cells) == 2 and cells[0].lower() == "sep=" and not cells[1]:
            continue  # names the delimiter
        if table is None:
            first = given is None
            names = [cell.strip() for cell in cells] if given is None else given
            repeated = {name: SAME_NAME for name in names if names.count(name) > 1}
            table = Table(where if first else str(source.path), names, repeated, source)
            kept = [i for i, name in enumerate(names) if name and name not in repeated]
            if first:
                continue
        if len(cells) < len(names) or any(cell.strip() for cell in cells[len(names) :]):
            if not remedy:  # once: these look at the beginning of the file
                _check_layout(f"{where}: {_widths(cells, names, source)}", table, source, quoted)
                remedy = _row_remedy(source, quoted)
            yield where, f"{_widths(cells, names, source)}; {remedy}"
        else:
            yield where, TableRow({names[i]: cells[i] for i in kept}, table)


def _widths(cells: list[str], names: list[str], source: Source) -> str:
    given = "the header has" if source.args.csv_header else "--column_names has"
    return f"{len(cells)} cells, but {given} {len(names)} columns"


def _check_layout(problem: str, table: Table, source: Source, quoted: bool) -> None:
    """Raise `InputError` if not only a row but the layout of the file is why rows do not have the cells of the header.

    Args:
        problem: place and problem of the first such row.
        table: the columns of the file.
        source: the file.
        quoted: whether quotation marks enclose cells.
    """
    likely = likely_delimiter(table)
    if likely:
        raise InputError(f"{problem}; {_delimiter_remedy(likely)}")
    if source.args.csv_header and _has_unnamed_first_column(source, quoted, len(table.names)):
        raise InputError(
            f"{table.where}: each row has one cell more than the header; add the name of the first column to the "
            "header, such as id"
        )
    if _looks_like_conll(source):
        raise InputError(f"{table.where}: {CONLL}")


def _has_unnamed_first_column(source: Source, quoted: bool, columns: int) -> bool:
    """Return whether the first rows have one cell more than the header, as `write.table` of R writes row names."""
    records = islice((_quoted_records if quoted else _plain_records)(source), 1, SAMPLED_LINES)
    widths = [len(cells) for _, cells in records if not isinstance(cells, str)]
    return len(widths) > 1 and set(widths) == {columns + 1}


def _row_remedy(source: Source, quoted: bool) -> str:
    """Return what to do about a row with a wrong number of cells."""
    if b'"' in source.head():
        return f"correct the row, or {_quoting_remedy(quoted)}"
    name = DELIMITERS.get(delimiter_of(source), "the delimiter")
    return f"put quotation marks around cells that contain {name}" + ("" if quoted else ", and give --csv_quoting csv")


def _quoting_remedy(quoted: bool) -> str:
    other = "none if quotation marks are text" if quoted else "csv if quotation marks enclose cells"
    return f"give --csv_quoting {other}"


def _plain_records(source: Source) -> Iterator[Record]:
    delimiter = delimiter_of(source)
    for where, text, problem in source.lines(carriage_returns=True):
        if problem or text.strip():
            yield where, problem or text.split(delimiter)


def _quoted_records(source: Source) -> Iterator[Record]:
    """Yield the records of a file in which quotation marks enclose cells. Newlines within cells stay as they are.

    A record of several lines has the problems of each of them.
    """
    problems: list[Record] = []

    def texts() -> Iterator[str]:
        for where, text, problem in source.lines(keep_ends=True, carriage_returns=True):
            if problem:
                problems.append((where, problem))
            yield text

    delimiter, start = delimiter_of(source), 1
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            where, start = f"{source.path}:{start}", reader.line_num + 1
            if problems:
                yield from problems
                problems.clear()
            elif any(cell.strip() for cell in cells):
                yield where, cells
    except csv.Error as error:
        yield from problems
        if problems and not source.args.skip_bad_rows:  # reading ended at the line that is no text
            return
        kind = DELIMITERS.get(delimiter, repr(delimiter)).removeprefix("a ")
        remedy = _quoting_remedy(quoted=True)
        raise InputError(f"{source.path}:{start}: not {kind}-separated text: {error}; {remedy}") from None


def _is_quoted(source: Source) -> bool:
    """Return whether quotation marks enclose cells in a tab-separated file; the whole file decides.

    Excel and pandas write quotation marks around cells, and double those inside. Other programs write cells as they
    are. A file has the second kind if it cannot be read as the first, or if a cell has a quotation mark inside without
    those around it. A file has the first kind if only then all rows have the same number of cells, or if marks are
    doubled in each cell with marks inside.

    Raises:
        InputError: both are possible, and the cells differ.
    """
    delimiter = delimiter_of(source)
    widths: set[int] = set()
    header: list[str] = []
    enclosed_at, doubled, bare = None, False, False
    for where, cells in _plain_records(source):
        if isinstance(cells, str):
            return False  # reported when the rows are read
        widths.add(len(cells))
        header = header or cells
        for cell in cells:
            if cell.startswith('"'):
                enclosed_at = enclosed_at or where
                doubled = doubled or '""' in cell[1:-1]
            elif '"' in cell:
                bare = True
    if enclosed_at is None:
        return False  # both readings give the same cells
    quoted_widths: set[int] = set()
    spans = False
    try:
        for _, cells in _quoted_records(source):
            quoted_widths.add(len(cells))
            spans = spans or any(delimiter in cell or "\n" in cell for cell in cells)
    except InputError:
        return False
    if len(quoted_widths) > 1 or (len(widths) == 1 and spans):
        return False
    if len(widths) > 1:
        return True
    enclosed_header = all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in header)
    if bare != (doubled or enclosed_header):
        return not bare
    raise InputError(f"{enclosed_at}: a cell begins with a quotation mark; {QUOTING}")


# Parquet


def read_parquet(source: Source) -> Iterator[Located]:
    """Yield the rows of a Parquet file. Integers with names of classes become these names.

    Raises:
        InputError: the file is damaged.
    """
    path = source.path
    with source.open() as raw:
        try:
            file = pq.ParquetFile(raw if raw.seekable() else io.BytesIO(raw.read()))
        except pa.ArrowException as error:
            raise InputError(f"{path}: not a Parquet file: {error}; write it again") from None
        names = file.schema_arrow.names
        table = Table(str(path), names, {name: SAME_NAME for name in names if names.count(name) > 1})
        decode = class_label_decoder(_features(file.schema_arrow))
        number = 0
        try:
            for batch in file.iter_batches():
                for cells in zip(*_columns(batch, table), strict=True):
                    number += 1
                    row = {name: cell for name, cell in zip(names, cells, strict=True) if name not in table.unusable}
                    yield f"{path}, row {number}", TableRow(decode(row), table)
        except pa.ArrowException as error:
            raise InputError(f"{path}, row {number + 1}: cannot be read: {error}; write the file again") from None


def _columns(batch: pa.RecordBatch, table: Table) -> Iterator[list[Any]]:
    """Yield the values of each column; a column that cannot be converted becomes unusable."""
    for name, column in zip(table.names, batch.columns, strict=True):
        values = [None] * batch.num_rows
        if name not in table.unusable:
            try:
                values = column.to_pylist()
            except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
                table.unusable[name] = f"a column cannot be read ({error}); write it again"
        yield values


def _features(schema: pa.Schema) -> Features:
    try:
        return Features.from_arrow_schema(schema)
    except ValueError:  # datasets has no feature for the type of some column; only its own files have classes
        return Features()


def class_label_decoder(features: Features) -> Callable[[Row], Row]:
    """Return a function that replaces the `ClassLabel` integers of a row by their names, and `NO_CLASS` by None."""

    def name(label: ClassLabel, value: int | None) -> str | None:
        if value is None or value in NO_CLASS:
            return None
        return label.names[value] if 0 <= value < len(label.names) else f"<unknown class {value}>"

    singles = {c: f for c, f in features.items() if isinstance(f, ClassLabel)}
    lists = {c: f.feature for c, f in features.items() if isinstance(getattr(f, "feature", None), ClassLabel)}

    def decode(row: Row) -> Row:
        row = row | {c: name(label, row[c]) for c, label in singles.items() if c in row}
        return row | {c: [name(label, v) for v in row[c]] for c, label in lists.items() if row.get(c) is not None}

    return decode
