"""Choose sentences to label next for this recipe; see `common.tools.annotate`.

make annotate RECIPE=ner MODEL=outputs/ner INPUT=pool.jsonl OUTPUT=to_label.jsonl N=50 STRATEGY=margin
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.data import Row
from common.data.columns import Columns as SavedColumns
from common.data.words import split_words
from common.errors import InputError, Problems
from common.inference.features import logits_and_features
from common.inference.predictor import InputRows
from common.models.load import load_config, resolve_model
from common.tools.annotate import (
    AnnotateArguments,
    Guess,
    doccano_row,
    entropies,
    margins,
    spans_interface,
    spans_task,
)

from .annotations import SPAN_COLUMNS, Skipped, Unusable, read_annotated
from .arguments import TAGS, WORDS
from .predict import NerPredictArguments, Tagger, check_row, in_columns, reader_for, text_of
from .reading import entity_types, lacks_tags, load_tagged, span_columns
from .train import encode


@dataclass
class NerAnnotateArguments(AnnotateArguments, NerPredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id"},
    )


ARGUMENTS = (NerAnnotateArguments,)


class Annotator(Tagger):
    """Guess the tags of sentences with a saved model, and say how sure it is."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.columns, self.words, self.tags = saved_columns(self.config)

    def check_format(self, name: str) -> None:
        """Raise `InputError` for tools that label spans, if the model gives each word a tag of its own."""
        if name != "jsonl" and self.single_words:
            raise InputError(f"--format {name}: labels spans, but the model tags single words; give --format jsonl")

    def labeled_texts(self, path: str, args: NerAnnotateArguments) -> Iterator[str]:
        """Yield the text of each row of a file of labelled rows."""
        problems = Problems()
        for where, row in reader_for(args, self.config)(path):
            messages = [row] if isinstance(row, str) else list(check_row(in_columns(row, self.columns)))
            if messages:
                problems.reject(where, messages)
            else:
                yield self.text(row)
        problems.check()

    def text(self, row: Row) -> str:
        """Return the text of a row, or its words joined by spaces."""
        return text_of(in_columns(row, self.columns)).text

    def has_label(self, row: Row) -> bool:
        """Return whether a row has tags or spans."""
        words = in_columns(row, self.columns).get("tokens")
        if isinstance(words, list) and isinstance(row.get(self.tags), list):
            return not lacks_tags({"tokens": words, "ner_tags": row[self.tags]})
        try:
            annotated = read_annotated(row, *span_columns(self.words, self.tags))
        except Skipped:
            return False
        except Unusable:
            return True
        return annotated is not None and bool(annotated.spans)

    def guesses(self, rows: list[Row], gradients: bool) -> Iterator[Guess]:
        """Yield a guess for each row: the tag of each word."""
        texts = [text_of(in_columns(row, self.columns)) for row in rows]
        sentences = [[text.text[start:end] for start, end in text.words] for text in texts]
        cut = {"max_seq_length": self.max_length, "doc_stride": self.doc_stride}
        windows = encode({"tokens": sentences}, range(len(rows)), self.tokenizer, self.config.label2id, **cut)
        found: list[Any] = [None] * len(windows["input_ids"])
        for batch, logits, features in logits_and_features(self, windows):
            for i, of_tokens, inputs in zip(batch, logits, features, strict=True):
                at = windows["positions"][i]
                found[i] = _sums(of_tokens[at].softmax(-1).numpy(), inputs[at].numpy(), gradients)
        starts = np.searchsorted(windows["sentence"], range(len(rows)))
        for (first, end), words in zip(pairwise([*starts, len(found)]), sentences, strict=True):
            tags, *sums = (list(parts) for parts in zip(*found[first:end], strict=True))
            margin, entropy, vector, gradient = (sum(parts) / len(words) for parts in sums)
            yield Guess(
                labels=self._valid([self.labels[tag] for tag in np.concatenate(tags)]),
                margin=float(margin),
                entropy=float(entropy),
                features=vector,
                gradient=(np.ones(1, dtype=np.float32), gradient.ravel()) if gradients else None,
            )

    def _valid(self, tags: list[str]) -> list[str]:
        """Return the tags of the entities that predict finds: an I-X that continues no X becomes O."""
        if self.single_words:
            return tags
        valid = ["O"] * len(tags)
        for label, first, last in self.spans(tags):
            valid[first:last] = [f"B-{label}", *[f"I-{label}"] * (last - first - 1)]
        return valid

    def written(self, row: Row, guess: Guess, name: str, more: Row) -> Row:
        """Return a row of `train`, a task of Label Studio or a row of doccano with the guessed tags."""
        placed = in_columns(row, self.columns)
        annotated = text_of(placed)
        tokens = [annotated.text[start:end] for start, end in annotated.words]
        spans = [
            (annotated.words[first][0], annotated.words[last - 1][1], label)
            for label, first, last in self.spans(guess.labels)
        ]
        identity = {key: row[key] for key in ("id",) if key in row}
        if name == "jsonl":
            kept = identity if isinstance(row.get("data"), dict) else row
            if isinstance(placed.get("tokens"), list) and not isinstance(placed["tokens"][0], dict):
                return kept | {self.words: tokens, self.tags: guess.labels} | more
            if self.single_words:
                return identity | {self.words: tokens, self.tags: guess.labels} | more
            text, column = span_columns(self.words, self.tags)
            kept = {key: value for key, value in kept.items() if key not in SPAN_COLUMNS}
            found = [{"label": label, "text": annotated.text[a:b], "start": a, "end": b} for a, b, label in spans]
            return kept | {text: annotated.text, column or "entities": found} | more
        more = identity | more
        if annotated.words != split_words(annotated.text):  # a correction keeps the words, in the form of Prodigy
            words = [{"text": annotated.text[a:b], "start": a, "end": b} for a, b in annotated.words]
            more = {"tokens": words} | more
        return (spans_task if name == "label_studio" else doccano_row)(annotated.text, spans, more)

    def interface(self) -> str:
        """Return the labelling interface of Label Studio."""
        return spans_interface(entity_types(list(self.labels.values())))


def _sums(probs: np.ndarray, features: np.ndarray, gradients: bool) -> tuple:
    """Return the tags of the words of a window, and sums over the words: margin, entropy, features and gradient.

    Args:
        probs: probabilities of the tags, (words, tags).
        features: inputs of the last layer, (words, width).
        gradients: whether to compute the gradient, (tags, width); else it is 0.
    """
    tags = probs.argmax(-1)
    slope = probs - np.eye(probs.shape[1], dtype=probs.dtype)[tags]  # of the loss in the logits
    gradient = slope.T @ features if gradients else np.zeros(())
    return tags, margins(probs).sum(), entropies(probs).sum(), features.sum(0), gradient


def saved_columns(config: Any) -> tuple[SavedColumns, str, str]:
    """Return the columns that predict reads, and the names of the words and of the tags in the training data."""
    columns = SavedColumns(config, tokens=(WORDS,))
    return columns, columns.names["tokens"][0], SavedColumns(config, ner_tags=(TAGS,)).names["ner_tags"][0]


def open_pool(args: NerAnnotateArguments) -> InputRows:
    """Check the rows of the pool, and return them."""
    config = load_config(resolve_model(args.model))
    columns = saved_columns(config)[0]

    def check(row: Row) -> Iterator[str]:
        placed = in_columns(row, columns)
        problems = list(check_row(placed))
        if not problems and not text_of(placed).words:
            problems = ["the text is blank; needed: a text with words"]
        yield from problems

    return InputRows(args, check, reader_for(args, config))


def training_rows(parsed: tuple) -> Iterable[Row]:
    """Return the training rows of a run by its arguments."""
    return load_tagged(parsed[1])[0]["train"]
