"""Find the words in rows without tags: of predict, and of `--unlabeled_file`."""

from collections.abc import Iterator
from itertools import accumulate

from datasets import Dataset, DatasetDict
from transformers import PretrainedConfig

from common.data import Row
from common.data.columns import SAVED, described
from common.data.columns import Columns as SavedColumns
from common.data.files import FileReader
from common.data.json_files import list_of_cell
from common.data.pool import key_of, read_pool
from common.data.tables import MissingColumn, TableRow
from common.data.words import split_words

from .annotations import Annotated, Unusable, task_text
from .arguments import WORDS, NerDataArguments


def in_columns(row: Row, columns: SavedColumns) -> Row:
    """Return the row with its words in `tokens`, or its text in `text`, from a column of the training data."""
    value = columns.value(row, "tokens")
    if value is None and isinstance(row.get("data"), dict):  # a task of Label Studio
        value = columns.value(row["data"], "tokens")
    if isinstance(value, str) and isinstance(row, TableRow):
        value = list_of_cell(value)
    others = {name: cell for name, cell in row.items() if name != "tokens"}
    return others | {"text" if isinstance(value, str) else "tokens": value} if value is not None else row


def text_of(row: Row) -> Annotated | None:
    """Return the text of a row and the spans of its words, or None if the row has neither `text` nor `tokens`."""
    tokens = row.get("tokens")
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        ends = accumulate(len(token) + 1 for token in tokens)
        spans = [(end - 1 - len(token), end - 1) for token, end in zip(tokens, ends, strict=True)]
        return Annotated(" ".join(tokens), [], spans)
    annotated = task_text(row, "text")
    if annotated is not None and annotated.words is None:
        annotated.words = split_words(annotated.text)
    return annotated


def check_row(row: Row) -> Iterator[str]:
    """Yield a message for each error in an input row."""
    tokens = row.get("tokens")
    if isinstance(tokens, list) and not all((isinstance(t, str) and t.strip()) or isinstance(t, dict) for t in tokens):
        yield "tokens must be a list of non-blank texts"
        return
    try:
        found = text_of(row)
    except Unusable as error:
        yield str(error)
        return
    if found is None or (tokens is not None and not isinstance(tokens, list)):
        yield MissingColumn(
            f'needs "text" (a text) or "tokens" (a list of texts); columns here: {", ".join(row) or "none"}'
        )


def read_unlabeled(args: NerDataArguments, data: DatasetDict, read: FileReader) -> Dataset:
    """Return the rows of `--unlabeled_file` in the columns of the training rows, with any tag for each word."""
    placeholder = data["train"]["ner_tags"][0][0]
    columns = SavedColumns(PretrainedConfig(**{SAVED: described(args.columns(), data["train"])}), tokens=(WORDS,))

    def convert(row: Row) -> Row | str:
        row = in_columns(row, columns)
        if problem := next(check_row(row), None):
            return problem
        text = text_of(row)
        words = [text.text[start:end] for start, end in text.words]
        return {"tokens": words, "ner_tags": [placeholder] * len(words)}

    def check(row: Row) -> Iterator[str]:
        if not row["tokens"]:
            yield "has no words; remove the row"

    return read_pool(args, read, convert, check, lambda row: key_of("".join(row["tokens"])), data)
