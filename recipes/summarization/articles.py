"""Documents and their summaries from files: articles, or the turns of a dialogue; checked, and what they look like."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import DatasetDict

from common.args import DataArguments
from common.data import Located, Row, parse_json, read_file
from common.errors import InputError, tell, warn
from common.sentences import sentences

SAMPLE = Path(__file__).resolve().parent / "sample"
WORDS = ("auto", "english", "unicode")
#: what a turn of a dialogue that is an object may call its speaker, and what was said
SPEAKERS, SAID = ("speaker", "role"), ("text", "utterance", "content")
#: a line that begins with who speaks: `Ann: ...`, `#Person1#: ...`
_SPOKEN = re.compile(r"[^\s:][^:\n]{0,39}:\s")


@dataclass
class SummarizationDataArguments(DataArguments):
    """Where the rows come from, which columns hold what, and how they are scored."""

    document_column_name: str = field(
        default="document", metadata={"help": "column with the text to summarize, or with a list of turns"}
    )
    summary_column_name: str = field(default="summary", metadata={"help": "column with its summary"})
    references_column_name: str = field(
        default="references", metadata={"help": "column with a list of summaries; the best counts; may be missing"}
    )
    group_column_name: str | None = field(
        default=None, metadata={"help": "column with the domain of a row; each is scored for itself too"}
    )
    summary_sentences: int | None = field(
        default=None, metadata={"help": "sentences of an extractive summary; the validation rows choose when not given"}
    )
    language: str | None = field(
        default=None, metadata={"help": "language of the texts, for models that must be told, such as mBART: en, de"}
    )
    source_prefix: str | None = field(
        default=None, metadata={"help": "text in front of each document; that of T5 is known"}
    )
    rouge_words: Literal[WORDS] = field(
        default="auto", metadata={"help": "words of ROUGE: english (with stemmer), unicode, or by the letters"}
    )
    compare_to: str | None = field(
        default=None, metadata={"help": "predictions_test.jsonl of another run: is the difference in ROUGE chance?"}
    )

    def __post_init__(self) -> None:
        if not (self.train_file or self.dataset_name):
            if self.validation_file or self.test_file:
                raise InputError("--train_file or --dataset_name is missing; without any the sample is summarized")
            for split in ("train", "validation", "test"):
                setattr(self, f"{split}_file", str(SAMPLE / f"{split}.jsonl"))
            self.group_column_name = "domain"
        super().__post_init__()
        if self.summary_sentences is not None and self.summary_sentences < 1:
            raise InputError("--summary_sentences must be at least 1")

    def columns(self) -> dict[str, str]:
        """What `load_splits` is to read."""
        group = {"group": self.group_column_name} if self.group_column_name else {}
        return {"document": self.document_column_name, "summary": self.summary_column_name} | group

    def read(self, path: str) -> Iterator[Located]:
        """Rows of a file, turns as lines of one text; in CSV cells references are a JSON list."""
        in_cells = Path(path).suffix.lower() in (".csv", ".tsv")
        for where, row in read_file(path):
            if isinstance(row, dict):
                text = as_text(row.get(self.document_column_name))
                row = row | ({} if text is None else {self.document_column_name: text})
                cell = row.get(self.references_column_name)
                if in_cells and isinstance(cell, str):  # an empty one is how CSV says that there are none
                    row = row | {self.references_column_name: _json(cell) if cell.strip() else None}
            yield where, row


def _json(cell: str) -> Any:
    try:
        return parse_json(cell)
    except (ValueError, RecursionError):
        return cell


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


def flat(row: Row) -> Row:
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


def look_over(data: DatasetDict) -> None:
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
