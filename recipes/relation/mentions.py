"""Read the two mentions of a row, in the notations in which data sets and tools write them."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from common.data.json_files import list_of_cell, parse_cell
from common.data.source import Row
from common.data.tables import TableRow
from common.errors import brief

#: names of a mention's ends, type and text in the rows of tools
KEYS = {
    "start": ("start", "start_offset", "start_char"),
    "end": ("end", "end_offset", "end_char"),
    "type": ("type", "label"),
    "text": ("text", "name"),
}
MENTIONS = ("head", "tail")


class Unusable(Exception):
    """A row cannot be read; the message says why."""


@dataclass(frozen=True)
class Mention:
    """Characters `start` to `end` (exclusive) of a text, and the type of what they name, or None."""

    start: int
    end: int
    type: str | None = None

    def in_row(self, text: str) -> Row:
        """Return the mention as a value of a row."""
        return {"text": text[self.start : self.end], "start": self.start, "end": self.end, "type": self.type}


@dataclass(frozen=True)
class Pair:
    """A text and its two mentions. A relation goes from `head` to `tail`."""

    text: str
    head: Mention
    tail: Mention


def read_pair(text: Any, head: Any, tail: Any) -> Pair:
    """Read the cells of a row.

    Args:
        text: a text, or a list of tokens, which are joined by single spaces.
        head: the first mention; see `read_mention`.
        tail: the second mention.

    Raises:
        Unusable: a cell is wrong, a mention is empty or outside the text, or the mentions overlap.
    """
    text, tokens = read_text(text)
    first, second = (read_mention(name, cell, text, tokens) for name, cell in zip(MENTIONS, (head, tail), strict=True))
    if overlap(first, second):
        quoted = " and ".join(repr(text[m.start : m.end]) for m in (first, second))
        raise Unusable(
            f"head and tail overlap: {quoted:.100}; mark two mentions that share no character, or remove the row"
        )
    return Pair(text, first, second)


def read_text(value: Any) -> tuple[str, list[tuple[int, int]] | None]:
    """Return the text of a cell, and the characters of each token if the cell is a list of tokens.

    Raises:
        Unusable: the cell is blank, or neither a text nor a list of texts.
    """
    if isinstance(value, str) and value.strip():
        return value, None
    if isinstance(value, list) and value and all(isinstance(token, str) and token.strip() for token in value):
        ends = accumulate(len(token) + 1 for token in value)
        return " ".join(value), [(end - 1 - len(token), end - 1) for end, token in zip(ends, value, strict=True)]
    raise Unusable(f"the text is {brief(value)}; needed: a non-blank text, or a list of non-blank tokens")


def of_cell(row: Row, cell: Any, words: bool = False) -> Any:
    """Return the value in a cell of a table: an object or a list, or with `words` a list of tokens."""
    if not isinstance(row, TableRow) or not isinstance(cell, str):
        return cell
    if words:
        return list_of_cell(cell)
    try:
        return parse_cell(cell)
    except ValueError:
        return cell


def read_mention(name: str, cell: Any, text: str, tokens: list[tuple[int, int]] | None) -> Mention:
    """Read a mention.

    `cell` is {start, end} with a type and the text of the mention if known, [start, end], [start, end, type], FewRel's
    {indices} or ["name", "id", indices]. `start` and `end` (exclusive) count tokens if the row has tokens, else
    characters. `indices` are the numbers of its tokens, or a list of such lists, of which the first is read.
    """
    kind, quoted = None, None
    if isinstance(cell, dict):
        kind, quoted = _value(cell, "type"), _value(cell, "text")
        ends = _of_indices(name, cell["indices"]) if "indices" in cell else [_value(cell, "start"), _value(cell, "end")]
    elif isinstance(cell, list) and len(cell) == 3 and isinstance(cell[2], list):
        quoted, ends = cell[0], _of_indices(name, cell[2])
    elif isinstance(cell, list) and len(cell) in (2, 3):
        ends, kind = cell[:2], cell[2] if len(cell) == 3 else None
    else:
        raise Unusable(f"{name} is {brief(cell)}; needed: an object with start and end, or [start, end]")
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise Unusable(f"{name} {brief(cell)} has no integers start and end; correct them")
    if kind is not None and not (isinstance(kind, str) and kind.strip()):
        raise Unusable(f"{name} has the type {brief(kind)}; needed: a text, or null for none")
    start, end = ends
    size, unit = (len(text), "characters") if tokens is None else (len(tokens), "tokens")
    if start == end:
        raise Unusable(
            f"{name} [{start}, {end}] is empty; end must be above start, the number after the last of the {unit}"
        )
    if not 0 <= start < end <= size:
        raise Unusable(f"{name} [{start}, {end}] does not lie in the text of {size} {unit}; start must be below end")
    if tokens is not None:
        start, end = tokens[start][0], tokens[end - 1][1]
    found = text[start:end]
    if not found.strip():
        raise Unusable(f"{name} [{start}, {end}] is blank; mark a mention with letters")
    if isinstance(quoted, str) and _bare(quoted) != _bare(found):
        raise Unusable(
            f"{name} says {quoted!r:.60}, but the text has {found!r:.60} there; export text and mentions again, from "
            "the same text"
        )
    return Mention(start, end, kind.strip() if kind else None)


def overlap(one: Mention, other: Mention) -> bool:
    """Return whether two mentions share a character."""
    return one.start < other.end and other.start < one.end


def words_between(text: str, one: Mention, other: Mention) -> int:
    """Return the number of words, separated by blanks, between two mentions of a text."""
    return len(text[min(one.end, other.end) : max(one.start, other.start)].split())


def _value(cell: dict, key: str) -> Any:
    return next((cell[name] for name in KEYS[key] if name in cell), None)


def _of_indices(name: str, indices: Any) -> list[Any]:
    """Return the first token and the one after the last of token numbers, or of the first of several lists."""
    several = isinstance(indices, list) and bool(indices) and isinstance(indices[0], list)
    numbers = indices[0] if several else indices
    if not isinstance(numbers, list) or not numbers:
        raise Unusable(f"{name} has the indices {brief(indices)}; needed: the numbers of its tokens, such as [[3, 4]]")
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise Unusable(f"{name} has the indices {brief(indices)}; needed: integers")
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise Unusable(f"{name} has the indices {brief(numbers)}, which are no neighbours; mark one run of tokens")
    return [numbers[0], numbers[-1] + 1]


def _bare(text: str) -> str:
    """Return a text without blanks and capitals, which data sets change in quotes."""
    return "".join(text.split()).casefold()
