"""Choose texts to label next for this recipe; see `common.tools.annotate`.

make annotate RECIPE=sentiment MODEL=outputs/sentiment INPUT=pool.jsonl OUTPUT=to_label.jsonl N=50 STRATEGY=margin
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.data.columns import Columns
from common.data.source import Row
from common.errors import InputError, Problems
from common.inference.features import logits_and_features
from common.inference.predictor import InputRows
from common.models.load import load_config, resolve_model
from common.tools.annotate import (
    AnnotateArguments,
    Guess,
    choices_interface,
    choices_task,
    doccano_row,
    entropies,
    margins,
)

from .labels import NO_LABEL, check_texts, load_labeled
from .predict import COLUMNS, Classifier, check_columns, pairs_of
from .reading import read_rows
from .scoring import decide, probabilities
from .windows import pool, read

LABEL = {"label": ("label",)}


@dataclass
class SentimentAnnotateArguments(AnnotateArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id"},
    )


ARGUMENTS = (SentimentAnnotateArguments,)


class Annotator(Classifier):
    """Guess the labels of texts with a saved model, and say how sure it is.

    Attributes:
        kind: type of a label in the labelled files: `str`, `int`, or `list`; `None` before one is read.
    """

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.label = Columns(self.config, **LABEL)
        self.kind: type | None = None

    def check_format(self, name: str) -> None:
        """Raise `InputError` for doccano, which shows one text, if the model was trained on pairs."""
        if name == "doccano" and "text_pair" in (self.columns.trained or ()):
            raise InputError("--format doccano: shows one text, but the model reads pairs; give label_studio or jsonl")

    def labeled_texts(self, path: str, args: SentimentAnnotateArguments) -> Iterator[str]:
        """Yield the text of each row of a file of labelled rows; note how the labels are written."""
        names = self.columns.names["text"][0], self.label.names["label"][0]
        problems = Problems()
        for where, row in read_rows(path, args, names, predicting=True):
            messages = [row] if isinstance(row, str) else list(check_columns(row, self.columns))
            if messages:
                problems.reject(where, messages)
            else:
                label = self.label.value(row, "label")
                self.kind = self.kind or (None if label is None else type(label))
                yield self.text(row)
        problems.check()

    def text(self, row: Row) -> str:
        """Return the text, or the two texts of a pair."""
        pair = pairs_of([row], self.columns)[0]
        return self.columns.value(row, "text") + ("" if pair is None else f"\0{pair}")

    def has_label(self, row: Row) -> bool:
        """Return whether a row has a label."""
        values = [row.get(name) for names in self.label.names["label"] for name in names.split(",")]
        return any(map(self._is_label, values))

    def _is_label(self, value: Any) -> bool:
        if value is None or value == [] or (isinstance(value, float) and math.isnan(value)):
            return False
        return str(value).strip() not in NO_LABEL and (str(value) != "-1" or "-1" in self.names)

    def guesses(self, rows: list[Row], gradients: bool) -> list[Guess]:
        """Return a guess for each row: the names of its classes."""
        texts, pairs = [self.columns.value(row, "text") for row in rows], pairs_of(rows, self.columns)
        found: dict[int, Guess] = {}
        for single in (True, False):
            numbers = [i for i, pair in enumerate(pairs) if (pair is None) == single]
            if numbers:
                seconds = None if single else [pairs[i] for i in numbers]
                found |= zip(numbers, self._guesses([texts[i] for i in numbers], seconds, gradients), strict=True)
        return [found[i] for i in range(len(rows))]

    def _guesses(self, texts: list[str], pairs: list[str] | None, gradients: bool) -> Iterator[Guess]:
        columns = read(self.tokenizer, texts, pairs, self.max_length, **self.reading)
        logits: list[Any] = [None] * len(columns["input_ids"])
        features = logits.copy()
        for batch, some, inputs in logits_and_features(self, columns):
            for i, scores, vector in zip(batch, some.numpy(), inputs.numpy(), strict=True):
                logits[i], features[i] = scores, vector
        first = columns["first_window"]
        probs = probabilities(pool(np.stack(logits), first, self.multi_label), self.multi_label)
        starts = np.flatnonzero(first)
        means = np.add.reduceat(np.stack(features), starts) / np.diff([*starts, len(first)])[:, None]
        decided = decide(probs, self.thresholds)
        chosen = decided if self.multi_label else np.eye(len(self.names), dtype=int)[decided]
        for row_probs, row_chosen, vector in zip(probs, chosen, means.astype(np.float32), strict=True):
            # each class is a decision between yes and no, or the classes are the options of one decision
            options = np.stack([row_probs, 1 - row_probs], 1) if self.multi_label else row_probs[None]
            slope = (row_probs - row_chosen).astype(np.float32)  # of the loss in the logits
            yield Guess(
                labels=[self.names[i] for i in np.flatnonzero(row_chosen)],
                margin=float(margins(options).mean()),
                entropy=float(entropies(options).mean()),
                features=vector,
                gradient=(slope, vector) if gradients else None,
            )

    def written(self, row: Row, guess: Guess, name: str, more: Row) -> Row:
        """Return a row of `train`, a task of Label Studio or a row of doccano with the guessed classes."""
        pair = pairs_of([row], self.columns)[0]
        texts = {"text": self.columns.value(row, "text")} | ({} if pair is None else {"text_pair": pair})
        if name == "jsonl":
            named = {self.columns.names[ours][0]: text for ours, text in texts.items()}
            renamed = [ours for ours in texts if self.columns.names[ours][0] not in row]
            others = {key: value for key, value in row.items() if key not in renamed}
            return named | others | self._labels(guess.labels) | more
        more = {key: row[key] for key in ("id",) if key in row} | more
        if name == "label_studio":
            return choices_task(texts, guess.labels, more)
        return doccano_row(texts["text"], guess.labels, more)

    def _labels(self, labels: list[str]) -> Row:
        """Return the label column, or the columns of 0 and 1, as in the labelled rows."""
        columns = self.label.names["label"][0].split(",")
        if len(columns) > 1:
            return {column.strip(): int(column.strip() in labels) for column in columns}
        numbered = self.kind is int and all(label.removeprefix("-").isdecimal() for label in self.names)
        values = [int(label) if numbered else label for label in labels]
        return {columns[0]: values if self.multi_label or self.kind is list else values[0]}

    def interface(self) -> str:
        """Return the labelling interface of Label Studio."""
        texts = ["text", "text_pair"] if "text_pair" in (self.columns.trained or ()) else ["text"]
        return choices_interface(texts, self.names, self.multi_label)


def open_pool(args: SentimentAnnotateArguments) -> InputRows:
    """Check the rows of the pool, and return them."""
    columns = Columns(load_config(resolve_model(args.model)), **COLUMNS)

    def check(row: Row) -> Iterator[str]:
        problems = list(check_columns(row, columns))
        values = {"text": columns.value(row, "text")}
        yield from problems or check_texts(values)

    return InputRows(args, check, partial(read_rows, args=args, columns=("text", "label"), predicting=True))


def training_rows(parsed: tuple) -> Iterable[Row]:
    """Return the training rows of a run by its arguments."""
    return load_labeled(parsed[1])[0]["train"]
