"""Documents and their summaries: articles, or the turns of a dialogue; checked, and what they look like."""

import re
from collections.abc import Iterator
from typing import Any

from datasets import DatasetDict

from common.data.files import Row
from common.data.sentences import sentences
from common.errors import tell, warn

#: what a turn of a dialogue that is an object may call its speaker, and what was said
SPEAKERS, SAID = ("speaker", "role"), ("text", "utterance", "content")
#: what else than groups is scored, by the names of the scores
OTHERS = ("lead", "random", "oracle", "reference", "compared")
#: a line that begins with who speaks: `Ann: ...`, `#Person1#: ...`
_SPOKEN = re.compile(r"[^\s:][^:\n]{0,39}:\s")


def as_text(document: Any) -> str | None:
    """A document as one text, the turns of a dialogue as lines `speaker: what was said`; None for what is neither."""
    if isinstance(document, str):
        return document
    if not isinstance(document, list) or not document:
        return None
    lines = [_line(turn) for turn in document]
    return None if None in lines else "\n".join(lines)


def _line(turn: Any) -> str | None:
    if isinstance(turn, dict):
        speaker, said = (next((turn[name] for name in names if name in turn), None) for names in (SPEAKERS, SAID))
        if not isinstance(speaker, str) or not isinstance(said, str) or not said.strip():
            return None
        turn = f"{speaker}: {said}"
    return " ".join(turn.split()) if isinstance(turn, str) and turn.strip() else None


def check_row(row: Row) -> Iterator[str]:
    """A sentence for each thing that is wrong with a row: an empty side, what is no text, or no list of texts."""
    text = as_text(row["document"])
    if text is None:
        yield "the document must be a text, or a list of turns: texts, or objects of `speaker` and `text`, none blank"
    elif not text.strip():
        yield "the document is empty: nothing to summarize; remove the row"
    if not isinstance(row["summary"], str):
        yield f"the summary must be a text, not {type(row['summary']).__name__}"
    elif not row["summary"].strip():
        yield "the summary is empty; remove the row"
    references = row["references"]
    texts = references if isinstance(references, list) else [None]
    if references is not None and not (texts and all(isinstance(text, str) and text.strip() for text in texts)):
        yield "the references must be a list of texts, none blank; leave the column out where there are none"
    if "group" in row and not (isinstance(row["group"], str) and row["group"].strip()):
        yield "the group must be a text that is not blank"
    elif row.get("group") in OTHERS:
        yield f"a group may not be called {row['group']}, under which other scores are reported"


def flatten(row: Row) -> Row:
    """A checked row with its document as one text, and its summary among the `references`."""
    references = row["references"] or []
    own = [] if row["summary"] in references else [row["summary"]]
    return {"document": as_text(row["document"]), "references": own + references}


def units(document: str) -> list[str]:
    """What an extractive summary is made of: the sentences of a document, or the turns of a dialogue.

    A text is a dialogue where each of its lines begins with who speaks; turns keep that.
    """
    return _lines(document) if is_dialogue(document) else sentences(document)


def is_dialogue(document: str) -> bool:
    lines = _lines(document)
    return len(lines) > 1 and all(_SPOKEN.match(line) for line in lines)


def _lines(document: str) -> list[str]:
    return [line.strip() for line in document.splitlines() if line.strip()]


def check_splits(data: DatasetDict) -> None:
    """Say how many summaries are their document; warn of longer ones, and of documents both trained and scored on."""
    trained = {" ".join(text.split()) for text in data["train"]["document"]}
    for name, rows in data.items():
        pairs = [(a.strip(), b.strip()) for a, b in zip(rows["document"], rows["summary"], strict=True)]
        same, longer = sum(a == b for a, b in pairs), sum(len(a) < len(b) for a, b in pairs)
        if same:
            tell(f"{name}: {same:,} of {len(pairs):,} summaries are the document itself")
        if longer:
            warn(f"{name}: {longer:,} of {len(pairs):,} summaries are longer than their document; are they exchanged?")
        seen = sum(" ".join(a.split()) in trained for a, _ in pairs) if name != "train" else 0
        if seen:
            warn(f"{name}: {seen:,} of {len(pairs):,} documents are among the training rows too")
