"""Read rows from JSON Lines, and from the layouts in which programs write a JSON file."""

import ast
import io
import itertools
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.data.source import Located, Source
from common.errors import InputError


def parse_json(text: str) -> Any:
    """Parse `text` as strict JSON.

    Raises:
        ValueError: `text` is not JSON, repeats a key, or contains NaN, infinity, half of a surrogate pair, or an
            integer of thousands of digits.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"key {max(names, key=names.count)!r} occurs twice in one object")
        return values

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def integer(digits: str) -> int:
        if len(digits) > 4000:  # Python converts no more
            raise ValueError(f"a number of {len(digits):,} digits; write it as a text")
        return int(digits)

    value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_int=integer)
    if "\\ud" in text.lower():  # half of a surrogate pair, such as "\ud83d" alone, is not valid text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is not a character") from None
    return value


#: a text or a number in a list as numpy prints it, without commas: `['a' 'b']`, `[1 0]`, `[1. 0.]`
_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\d{1,18}\.?(?![^\s\]])"""
_PRINTED_ARRAY = re.compile(rf"\[\s*(?:{_ITEM})(?:\s+(?:{_ITEM}))+\s*\]")


def parse_cell(text: str) -> Any:
    """Parse a cell that holds a list or an object: JSON, or as Python, pandas and numpy print it.

    Raises:
        ValueError: the cell is neither.
    """
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        pass
    text = text.strip()
    if _PRINTED_ARRAY.fullmatch(text):
        return [ast.literal_eval(item.removesuffix(".")) for item in re.findall(_ITEM, text)]
    try:
        value = ast.literal_eval(_Arrays().visit(ast.parse(text, mode="eval")))
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        raise ValueError("neither JSON nor a Python list or dict") from None
    if (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds):
        raise NoComma("two texts without a comma between them; write the cell with json.dumps")
    return value


def list_of_cell(cell: str) -> Any:
    """Return the list in a cell: as for `parse_cell`, or words separated by spaces.

    A cell in which a comma between two texts is missing is returned unchanged, so that the check of the row reports it.
    """
    if not cell.startswith("["):
        return cell.split()
    try:
        return parse_cell(cell)
    except NoComma:
        return cell
    except ValueError:
        return cell.split()


class NoComma(ValueError):
    """Two texts stand side by side, as numpy prints a list; Python would join them into one text."""


class _Arrays(ast.NodeTransformer):
    """Replace `array([...], dtype=object)`, as numpy prints a list, by the list."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        named = isinstance(node.func, ast.Name) and node.func.id == "array"
        return node.args[0] if named and len(node.args) == 1 else node


def json_fault(path: Path, error: Exception) -> tuple[str, str]:
    """Return place ("file:line" if known) and message of the error that `parse_json` raised for a file."""
    return f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path), _describe(error)


def read_json_lines(source: Source) -> Iterator[Located]:
    """Yield the objects of a file with one object a line."""
    for where, text, problem in source.lines(carriage_returns=True):
        if problem:
            yield where, problem
        elif text.strip():
            try:
                row = parse_json(text)
            except (ValueError, RecursionError) as error:
                yield where, f"not a JSON object: {_describe(error)}; write each line with json.dumps"
            else:
                yield where, row if isinstance(row, dict) else f"not a JSON object but {type_name(row)}"


def read_json(source: Source) -> Iterator[Located]:
    """Yield the rows of a JSON file: a list of objects, objects one a line, or a layout of `rows_of`.

    Raises:
        InputError: the file is no JSON, or has another layout.
    """
    text, path = source.text(), source.path
    start = text.lstrip()
    try:
        value = parse_json(text) if start else []
    except (ValueError, RecursionError) as error:
        extra = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        lines = start.split("\n", 2)
        if not start.startswith("[") and any(map(_is_object, lines[:2])):
            yield from read_json_lines(source)
            return
        if extra and start.startswith("{"):
            raise InputError(f"{path}: objects over several lines; write one object a line: jq -c . {path}") from None
        where, fault = json_fault(path, error)
        kind = "list" if start.startswith("[") else "file"
        raise InputError(f"{where}: not a JSON {kind}: {fault}; write it with json.dump") from None
    try:
        rows = rows_of(value)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    for number, row in enumerate(rows, 1):
        where = f"{path}:1" if row is value else f"{path}, row {number}"
        yield where, row if isinstance(row, dict) else f"not a JSON object but {type_name(row)}"


#: names of a list that holds the rows of a file, beside other values such as a version
CONTAINERS = ("data", "rows", "records", "examples", "samples", "instances", "items", "train", "validation", "test")
#: names of a list of objects within one row
INNER = ("answers", "conversation", "conversations", "dialog", "dialogue", "entities", "messages", "spans", "turns")


def rows_of(value: Any) -> list[Any]:
    """Return the rows of a JSON value.

    - a list of objects, also within an object, such as `{"version": 1, "data": [...]}` or `{"reviews": [...]}`;
    - the layouts of `pandas.DataFrame.to_json`: records, columns, index, split and table;
    - any other object is one row.

    Raises:
        ValueError: the rows have no names of columns, or the object holds several lists of objects.
    """
    if isinstance(value, list):
        if value and all(isinstance(row, list) for row in value):
            raise ValueError('rows are lists without names; write objects, in pandas with to_json(orient="records")')
        return value
    if not isinstance(value, dict):
        raise ValueError(f"not a list of JSON objects but {type_name(value)}; write a list with json.dump")
    if value.keys() == {"columns", "index", "data"}:
        return _split_layout(value["columns"], value["data"])
    lists = [name for name, rows in value.items() if name not in INNER and _is_table(rows)]
    if len(lists) > 1 and all(name in CONTAINERS for name in lists):
        raise ValueError(f"holds several lists of rows ({', '.join(lists)}); write each list to a file of its own")
    if len(lists) == 1 and (len(value) == 1 or lists[0] in CONTAINERS):
        rows = value[lists[0]]
        index = _index_names(value.get("schema"))  # orient="table"
        return [{name: cell for name, cell in row.items() if name not in index} for row in rows] if index else rows
    inner = list(value.values())
    if inner and all(isinstance(cells, dict) and cells.keys() == inner[0].keys() for cells in inner):
        if all(name.isdecimal() for name in value):  # orient="index"
            return inner
        if inner[0] and all(name.isdecimal() for name in inner[0]):  # orient="columns"
            return [{name: cells[number] for name, cells in value.items()} for number in inner[0]]
        if len(inner) > 1:
            raise ValueError('objects within one object; write a list of objects, in pandas to_json(orient="records")')
    return [value]


def _split_layout(columns: Any, rows: Any) -> list[Any]:
    """Return the rows of `to_json(orient="split")`."""
    if not isinstance(columns, list) or len({str(name) for name in columns}) < len(columns):
        raise ValueError('"columns" must be a list of different names; rename one')
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        raise ValueError(f'"data" must be a list of rows with {len(columns)} values each, as "columns" has')
    return [dict(zip(map(str, columns), row, strict=True)) for row in rows]


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _index_names(schema: Any) -> list[str]:
    """Return the index columns in the schema of `to_json(orient="table")`."""
    names = schema.get("primaryKey", []) if isinstance(schema, dict) and "fields" in schema else []
    return names if isinstance(names, list) else []


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except (ValueError, RecursionError):
        return False


def _describe(error: Exception) -> str:
    """Return the problem of a JSON text and its column; the message of `json` counts lines within the text."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    line = error.doc.split("\n")[error.lineno - 1]
    start = max(0, error.colno - 21)
    return f"{error.msg.removesuffix(' at')} in column {error.colno}, at {line[start : error.colno + 19]!r}"


def type_name(value: Any) -> str:
    """Return the name of the type of a JSON value, for messages."""
    names = {
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
