"""Check documents (articles or dialogues) with their summaries, and split documents into sentences or turns."""

import re
from collections.abc import Iterator
from typing import Any

from datasets import DatasetDict

from common.data.json_files import parse_cell
from common.data.sentences import sentences
from common.data.source import Row
from common.data.tables import TableRow
from common.errors import tell, warn

#: keys of a turn for its speaker and its text
SPEAKERS, SAID = ("speaker", "role"), ("text", "utterance", "content")
#: prefixes of other scores, which no group may use
OTHERS = ("lead", "random", "oracle", "reference", "compared")
#: a line that starts with a speaker: `Ann: ...`, `#Person1#: ...`
_SPOKEN = re.compile(r"[^\s:][^:\n]{0,39}:\s")


def as_text(document: Any) -> str | None:
    """Return a document as one text, with turns as lines `speaker: text`; None for an invalid document."""
    if isinstance(document, str):
        return document
    if not isinstance(document, list) or not document:
        return None
    lines = [_line(turn) for turn in document]
    return None if None in lines else "\n".join(lines)


def of_cell(row: Row, document: Any) -> Any:
    """Return the document of a row; a cell of a table may hold a list of sentences or turns, as JSON or Python."""
    if not isinstance(row, TableRow) or not isinstance(document, str) or not document.lstrip().startswith("["):
        return document
    try:
        turns = parse_cell(document)
    except ValueError:
        return document
    return document if as_text(turns) is None else turns


def _line(turn: Any) -> str | None:
    if isinstance(turn, dict):
        speaker, said = (next((turn[name] for name in names if name in turn), None) for names in (SPEAKERS, SAID))
        if not isinstance(speaker, str) or not isinstance(said, str) or not said.strip():
            return None
        turn = f"{speaker}: {said}"
    return " ".join(turn.split()) if isinstance(turn, str) and turn.strip() else None


def check_row(row: Row) -> Iterator[str]:
    """Yield a message for each problem in a row: an empty side or a value of the wrong type."""
    yield from check_document(row)
    if not isinstance(row["summary"], str):
        yield f"the summary must be a string, not {type(row['summary']).__name__}"
    references = row["references"]
    texts = references if isinstance(references, list) else [None]
    if references is not None and not (texts and all(isinstance(text, str) and text.strip() for text in texts)):
        yield "the references must be a list of strings that are not blank; use null for no references"
    yield from _check_group(row)


def check_document(row: Row) -> Iterator[str]:
    """Yield a message if the document of a row is empty or has the wrong type."""
    text = as_text(row["document"])
    if text is None:
        yield "the document must be a string or a list of turns (strings, or objects of `speaker` and `text`)"
    elif not text.strip():
        yield "the document is empty; remove the row"


def lacks_summary(row: Row) -> bool:
    """Return whether the summary of a row is missing or blank."""
    return row["summary"] is None or (isinstance(row["summary"], str) and not row["summary"].strip())


def _check_group(row: Row) -> Iterator[str]:
    if "group" in row and not (isinstance(row["group"], str) and row["group"].strip()):
        yield "the group must be a string that is not blank; name a group or remove the row"
    elif row.get("group") in OTHERS:
        yield f"the group name {row['group']} is reserved for other scores; rename the group"


def flatten(row: Row) -> Row:
    """Return a checked row with its document as one text, and with `references` that contain the summary."""
    references = row["references"] or []
    summary = [] if row["summary"] in references else [row["summary"]]
    return row | {"document": as_text(row["document"]), "references": summary + references}


def units(document: str) -> list[str]:
    """Split a document into sentences, or a dialogue into turns.

    A dialogue is a text in which every line starts with a speaker. Turns keep the speaker.
    """
    return _lines(document) if is_dialogue(document) else sentences(document)


def is_dialogue(document: str) -> bool:
    """Return whether every line of `document` starts with a speaker."""
    lines = _lines(document)
    return len(lines) > 1 and all(_SPOKEN.match(line) for line in lines)


def _lines(document: str) -> list[str]:
    return [line.strip() for line in document.splitlines() if line.strip()]


def check_splits(data: DatasetDict) -> None:
    """Print the number of summaries equal to their document; warn of longer summaries and of repeated documents."""
    trained = {" ".join(text.split()) for text in data["train"]["document"]}
    for name, rows in data.items():
        pairs = [(a.strip(), b.strip()) for a, b in zip(rows["document"], rows["summary"], strict=True)]
        same, longer = sum(a == b for a, b in pairs), sum(len(a) < len(b) for a, b in pairs)
        if same:
            tell(f"{name}: {same:,} of {len(pairs):,} summaries are the document itself")
        if longer:
            columns = "exchange --document_column_name and --summary_column_name if they are swapped"
            warn(f"{name}: {longer:,} of {len(pairs):,} summaries are longer than their document; {columns}")
        seen = sum(" ".join(a.split()) in trained for a, _ in pairs) if name != "train" else 0
        if seen:
            warn(f"{name}: {seen:,} of {len(pairs):,} documents are also training rows; remove them from one file")
