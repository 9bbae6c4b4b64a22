"""Make corrupted variants of a valid JSON Lines file, for any recipe.

`variants(rows)` makes hundreds of files from valid rows; each variant has a name, its bytes, and the number of the
changed line if one line changed. `tried` runs a function on each file. The module knows no task: a column is only a
text or a list.
"""

import codecs
import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.errors import InputError


@dataclass
class Variant:
    name: str
    content: bytes
    line: int | None = None  # from 1; None if more than one place changed


def tried(found: Iterable[Variant], file: Path, run: Callable[[], Any], also: str | None = None) -> tuple[int, int]:
    """Run `run` on each of `found`, written to `file`, and return how many it accepts and how many it refuses.

    Fails if a refusal is not an `InputError`, or if the error names neither the file nor `also`.
    """
    taken, refused, wrong = 0, 0, []
    for variant in found:
        file.write_bytes(variant.content)
        try:
            run()
            taken += 1
        except InputError as error:
            refused += 1
            if str(file) not in str(error) and (also is None or also not in str(error)):
                wrong.append(f"{variant.name}: {str(error)[:200]}")
        except Exception as error:
            wrong.append(f"{variant.name}: {type(error).__name__}: {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)
    return taken, refused


def lines_of(content: bytes) -> list[str]:
    """Return the lines of a file that are not blank; a byte order mark selects the encoding, and CR may end lines."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"}
    encoding = next((name for mark, name in marks.items() if content.startswith(mark)), "utf-8-sig")
    text = content.decode(encoding)
    return [line for line in text.split("\n" if "\n" in text else "\r") if line.strip()]


def as_bytes(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def variants(rows: list[dict[str, Any]], seed: int = 0) -> Iterator[Variant]:
    """Yield every variant of `rows`."""
    chance = random.Random(seed)
    yield from of_bytes(as_bytes(rows), chance)
    yield from of_encoding(rows)
    yield from of_lines(rows)
    yield from of_values(rows, chance)
    yield from of_texts(rows, chance)


def of_bytes(good: bytes, chance: random.Random) -> Iterator[Variant]:
    """Flip bits, cut the file, and remove, repeat, insert or exchange bytes."""

    def at(position: int) -> int:
        return good.count(b"\n", 0, position) + 1

    def touched(name: str, i: int, content: bytes) -> Variant:
        return Variant(f"{name} at byte {i}", content, at(i))

    for _ in range(40):
        i = chance.randrange(len(good))
        yield touched("flipped bit", i, good[:i] + bytes([good[i] ^ 1 << chance.randrange(8)]) + good[i + 1 :])
    for _ in range(12):
        i = chance.randrange(1, len(good))
        yield touched("cut", i, good[:i])
    for _ in range(10):
        i = chance.randrange(len(good) - 1)
        yield touched("lost byte", i, good[:i] + good[i + 1 :])
        yield touched("inserted byte", i, good[:i] + bytes([chance.randrange(256)]) + good[i:])
        yield touched("doubled stretch", i, good[: i + 7] + good[i:])
        yield touched("exchanged bytes", i, good[:i] + good[i + 1 : i + 2] + good[i : i + 1] + good[i + 2 :])
    yield Variant("empty", b"")
    yield Variant("one newline", b"\n")
    yield Variant("zero bytes", bytes(1000))
    yield Variant("random bytes", chance.randbytes(5000))
    yield Variant("zeros at the end", good + bytes(512))  # some file systems leave zeros after a crash


def of_encoding(rows: list[dict[str, Any]]) -> Iterator[Variant]:
    """Change byte order marks, encodings and newlines."""
    good = as_bytes(rows)
    text = good.decode()
    yield Variant("byte order mark", b"\xef\xbb\xbf" + good)
    yield Variant("two byte order marks", b"\xef\xbb\xbf" * 2 + good, 1)
    second = good.index(b"\n") + 1
    yield Variant("byte order mark in line 2", good[:second] + b"\xef\xbb\xbf" + good[second:], 2)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7"):
        yield Variant(encoding, (text + "é\n").encode(encoding))
    accents = json.loads(json.dumps(rows[:3]))
    for row in accents:
        for name, value in row.items():
            row[name] = [f"é{value[0]}", *value[1:]] if isinstance(value, list) and value else f"é{value}"
    yield Variant("latin-1", as_bytes(accents).decode().encode("latin-1"), 1)
    yield Variant("cp1252 quotation marks", good.replace(b'": "', b'": "\x93', 1))
    for name, newline in (("CRLF", "\r\n"), ("CR", "\r"), ("line separator", "\u2028"), ("next line", "\x85")):
        yield Variant(f"newlines {name}", text.replace("\n", newline).encode())
    mixed = "".join(line + ("\r\n" if i % 2 else "\n") for i, line in enumerate(text.splitlines()))
    yield Variant("mixed newlines", mixed.encode())
    yield Variant("blank lines", text.replace("\n", "\n\n  \n\t\n").encode())
    yield Variant("no newline at the end", good[:-1])
    yield Variant("form feeds", text.replace("\n", "\n\f\n").encode(), 2)
    yield Variant("vertical tab in a line", text.replace("{", "{\v", 1).encode(), 1)


def of_lines(rows: list[dict[str, Any]]) -> Iterator[Variant]:
    """Write lines that are not one JSON object each."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]

    def with_second(name: str, line: str) -> Variant:
        return Variant(name, "\n".join([lines[0], line, *lines[2:], ""]).encode(), 2)

    yield Variant("one JSON list", json.dumps(rows).encode())
    yield Variant("indented", json.dumps(rows[0], indent=1).encode())
    yield with_second("two objects in a line", lines[1] + lines[2])
    yield with_second("comma after the object", lines[1] + ",")
    yield with_second("comma before the brace", lines[1][:-1] + ",}")
    yield with_second("single quotes", lines[1].replace('"', "'"))
    yield with_second("comment", "// " + lines[1])
    yield with_second("unquoted key", lines[1].replace('"', "", 2))
    for name, line in {
        "null": "null", "number": "17", "text": '"text"', "list": "[1, 2]", "true": "true", "word": "nonsense",
        "empty object": "{}", "NaN": "NaN", "half an object": lines[1][: len(lines[1]) // 2], "CSV": "a,b,c",
        "XML": "<row><a>b</a></row>", "deep list": "[" * 100_000 + "]" * 100_000,
        "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000, "open list": "[" * 100_000,
    }.items():  # fmt: skip
        yield with_second(f"line is {name}", line)
    first = next(iter(rows[1]))
    for name, line in {
        "same value": f"{lines[1][:-1]}, {json.dumps(first)}: {json.dumps(rows[1][first])}}}",
        "other value": f"{lines[1][:-1]}, {json.dumps(first)}: null}}",
        "in front": f"{{{json.dumps(first)}: 1, {lines[1][1:]}",
    }.items():
        yield with_second(f"duplicate key, {name}", line)
    yield Variant("row twice", "\n".join([lines[0], *lines, ""]).encode())


def of_values(rows: list[dict[str, Any]], chance: random.Random) -> Iterator[Variant]:
    """Remove, rename and exchange columns; change types and lengths of values."""
    wrong: dict[str, Any] = {
        "null": None, "true": True, "number": 7, "fraction": 0.5, "huge integer": 10**400, "text": "text", "empty": "",
        "object": {"a": 1}, "empty list": [], "list of null": [None], "list of numbers": [1, 2, 3],
        "list of lists": [["a"]], "list of blanks": [" ", ""], "deep": [[[[[["a"]]]]]],
    }  # fmt: skip

    def with_row(name: str, number: int, row: Any) -> Variant:
        return Variant(name, as_bytes([*rows[:number], row, *rows[number + 1 :]]), number + 1)

    names = list(rows[0])
    for column in names:
        number = chance.randrange(len(rows))
        row = rows[number]
        for name, value in wrong.items():
            yield with_row(f"{column} is {name}", number, row | {column: value})
        yield with_row(f"{column} missing", number, {k: v for k, v in row.items() if k != column})
        yield with_row(f"{column} renamed", number, {k.upper() if k == column else k: v for k, v in row.items()})
        yield Variant(
            f"{column} missing everywhere", as_bytes([{k: v for k, v in r.items() if k != column} for r in rows])
        )
        for literal in ("NaN", "Infinity", "-Infinity", "1e999", "undefined", "None", "True", "0x10", "01", ".5"):
            line = json.dumps(row | {column: "@"}, ensure_ascii=False).replace('"@"', literal)
            content = as_bytes(rows[:number]) + line.encode() + b"\n" + as_bytes(rows[number + 1 :])
            yield Variant(f"{column} is {literal}", content, number + 1)
        if isinstance(row[column], list):
            value = row[column]
            for name, changed in {
                "shortened": value[:-1], "lengthened": [*value, value[-1]], "doubled": value * 2,
                "with a null": [None, *value[1:]], "with a number": [*value[:-1], 3],
                "with a list": [[value[0]], *value[1:]],
                "in one text": " ".join(value), "as JSON in a text": json.dumps(value),
            }.items():  # fmt: skip
                yield with_row(f"{column} {name}", number, row | {column: changed})
    for one, other in pairwise(names):
        number = chance.randrange(len(rows))
        yield with_row(
            f"{one} and {other} exchanged", number, rows[number] | {one: rows[number][other], other: rows[number][one]}
        )
        yield Variant(
            f"{one} and {other} exchanged everywhere", as_bytes([r | {one: r[other], other: r[one]} for r in rows])
        )
    yield with_row("further column", 1, rows[1] | {"further": 10**400})
    yield with_row("further column of NaN", 1, rows[1] | {"further": float("nan")})


HOSTILE = {
    "escape sequence": "\x1b[31mred\x1b]0;title\x07", "bell": "\a", "zero": "a\0b", "backspaces": "good\b\b\b\bevil",
    "right to left": "\u202eevil\u202c", "isolate": "\u2067x\u2069", "zero width": "a\u200bb\ufeffc",
    "HTML": "<script>alert(1)</script>", "Markdown": "`|](http://evil)|\n# x", "format": "%s%n{0}{__class__}",
    "combining": "e" + "\u0301" * 500, "private": "\ue000\U000f0000", "noncharacter": "\ufffe\U0010ffff",
    "emoji": "👩‍👩‍👧‍👦", "quotation": '"\\', "carriage return": "a\rb", "delete": "\x7f\x9b31m", "long": "x" * 100_000,
    "CJK": "日本語", "replacement": "\ufffd", "YAML": "!!python/object/apply:os.system ['true']",
    "path": "../../etc/passwd",
}  # fmt: skip


def of_texts(rows: list[dict[str, Any]], chance: random.Random) -> Iterator[Variant]:
    """Put hostile but valid texts, and half characters, in any column."""

    def put(value: Any, text: str) -> Any:
        return [text, *value[1:]] if isinstance(value, list) else text

    for column in rows[0]:
        for name, text in HOSTILE.items():
            number = chance.randrange(len(rows))
            changed = rows[number] | {column: put(rows[number][column], text)}
            yield Variant(f"{column}: {name}", as_bytes([*rows[:number], changed, *rows[number + 1 :]]), number + 1)
        number = chance.randrange(len(rows))
        for half in ("\\ud83d", "\\udc00", "\\ud83d\\ud83d"):
            line = json.dumps(rows[number] | {column: put(rows[number][column], "@half@")}).replace("@half@", half)
            content = as_bytes(rows[:number]) + line.encode() + b"\n" + as_bytes(rows[number + 1 :])
            yield Variant(f"{column}: half a surrogate pair {half}", content, number + 1)


def tables(rows: list[dict[str, Any]], seed: int = 0) -> Iterator[tuple[str, Variant]]:
    """Yield the ending and the content of tables: each way in which programs write `rows`, and damaged tables."""

    def table(delimiter: str, quoting: int = csv.QUOTE_MINIMAL, ends: str = "\n", header: bool = True) -> str:
        file = io.StringIO()
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=ends, quotechar='"')
        cells = [[v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in r.values()] for r in rows]
        writer.writerows([list(rows[0]), *cells] if header else cells)
        return file.getvalue()

    good = table(",")
    lines = good.split("\n")
    for ending, delimiter in ((".csv", ","), (".tsv", "\t")):
        for name, quoting in (("minimal", csv.QUOTE_MINIMAL), ("all", csv.QUOTE_ALL)):
            for newline in ("\n", "\r\n", "\r"):
                text = table(delimiter, quoting, newline)
                yield ending, Variant(f"{ending}, quoting {name}, newline {newline!r}", text.encode())
        yield ending, Variant(f"{ending} without a header", table(delimiter, header=False).encode())
        for other in ",;\t@|":
            yield ending, Variant(f"{ending} with {other!r}", table(other).encode())
        for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030", "cp1252"):
            text = table(delimiter).replace("e", "é").encode(encoding, errors="replace")
            yield ending, Variant(f"{ending} in {encoding}", text)
        for variant in of_bytes(table(delimiter).encode(), random.Random(seed)):
            yield ending, variant
    for name, text in {
        "nameless columns": "\n".join(f",{line},," if line else "" for line in lines),
        "one column twice": "\n".join(f"{line},{line}" if line else "" for line in lines),
        "a short row": "\n".join([*lines[:2], lines[2].split(",")[0], *lines[3:]]),
        "a long row": "\n".join([*lines[:2], lines[2] + ",more", *lines[3:]]),
        "an open quotation mark": "\n".join([*lines[:2], '"' + lines[2], *lines[3:]]),
        "rows of commas": good + ",,,\n,,\n",
        "a header alone": lines[0] + "\n",
    }.items():
        yield ".csv", Variant(name, text.encode())
    packed = gzip.compress(good.encode())
    yield ".csv.gz", Variant("compressed", packed)
    yield ".csv.gz", Variant("compressed, cut off", packed[:-20])
    yield ".csv", Variant("compressed, ending .csv", packed)
