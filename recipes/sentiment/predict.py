"""Classify a file of texts with a model saved by `train`.

    make predict RECIPE=sentiment MODEL=outputs/sentiment INPUT=texts.jsonl OUTPUT=labels.jsonl
    python -m recipes.sentiment.predict --model outputs/sentiment --input texts.txt --output labels.jsonl

The input is JSON Lines of {"text": ...}, or a .txt file with one text per line. A model of text pairs also needs
"text_pair". The output has the same rows in the same order. Each row gets `predicted` and `probability`. A multi-label
model writes a list of classes and the probability of each class. Memory use does not grow with the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from transformers import AutoModelForSequenceClassification

from common.cli import command_line, parse
from common.data.columns import Columns
from common.data.source import Row
from common.inference.predictor import DomainPredictArguments, InputRows, Predictor, predict_file
from common.models.load import load_config, resolve_model

from .reading import read_rows
from .scoring import predictions, probabilities
from .windows import pool, read

WRITTEN = ("predicted", "probability")
COLUMNS = {"text": ("text",), "text_pair": ("text_pair",)}


@dataclass
class SentimentPredictArguments(DomainPredictArguments):
    model: str | None = field(
        default=f"outputs/{Path(__file__).resolve().parent.name}",
        metadata={"help": "folder that train saved, or a hub id"},
    )
    all_probabilities: bool = field(default=False, metadata={"help": "write the probability of each class"})

    def check_input(self) -> None:
        """Raise `InputError` unless `--input` is a file or a folder of classes."""
        if not Path(self.input).is_dir():
            super().check_input()


ARGUMENTS = (SentimentPredictArguments,)


class Classifier(Predictor):
    """Classify texts or text pairs with a saved model, which reads long texts in the same way as in training.

    `batch_tokens` limits the tokens of a batch, padding included.
    """

    def __init__(self, model: str, batch_tokens: int = 4096, precision: str = "auto", speed: str = "auto", **more):
        super().__init__(
            AutoModelForSequenceClassification,
            "ForSequenceClassification",
            model,
            batch_tokens,
            precision,
            speed,
            **more,
        )
        self.columns = Columns(self.config, **COLUMNS)
        names = ("keep", "long_texts", "doc_stride")  # in the configuration of a model that train saved
        self.reading = {name: getattr(self.config, name) for name in names if hasattr(self.config, name)}
        self.multi_label = self.config.problem_type == "multi_label_classification"
        self.thresholds = getattr(self.config, "thresholds", [0.5] * len(self.labels)) if self.multi_label else None
        self.names = [self.labels[i] for i in range(len(self.labels))]

    def __call__(self, texts: list[str], pairs: list[str] | None = None) -> np.ndarray:
        """Return the probability of each class for each text, (texts, classes)."""
        columns = read(self.tokenizer, texts, pairs, self.max_length, **self.reading)
        all_logits = np.empty((len(columns["input_ids"]), len(self.names)), dtype=np.float32)
        for batch, logits in self.logits(columns):
            all_logits[batch] = logits.cpu().numpy()
        return probabilities(pool(all_logits, columns["first_window"], self.multi_label), self.multi_label)


def check_row(row: Row, columns: Columns) -> Iterator[str]:
    """Yield a message for each error in an input row. A model of text pairs needs both texts."""
    for name in WRITTEN:
        if name in row:
            yield f'already has "{name}", which would be overwritten; rename that column'
    yield from check_columns(row, columns)


def check_columns(row: Row, columns: Columns) -> Iterator[str]:
    """Yield a message for each text that a row lacks."""
    if not isinstance(columns.value(row, "text"), str):
        yield columns.problem(row, "text")
    pair = columns.value(row, "text_pair")
    if columns.trained is None:
        if not isinstance(pair, str | None):
            yield '"text_pair" must be a text'
    elif "text_pair" in columns.trained and not isinstance(pair, str):
        yield columns.problem(row, "text_pair", "a text: the model was trained on pairs")


def pairs_of(rows: list[Row], columns: Columns) -> list[str | None]:
    """Return the second text of each row; None for a model that was trained on single texts."""
    paired = columns.trained is None or "text_pair" in columns.trained
    return [columns.value(row, "text_pair") if paired else None for row in rows]


def with_labels(rows: list[Row], classifier: Classifier, all_probabilities: bool = False) -> Iterator[Row]:
    """Yield the rows with `predicted` and `probability`."""
    texts = [classifier.columns.value(row, "text") for row in rows]
    pairs = pairs_of(rows, classifier.columns)
    single = [i for i, pair in enumerate(pairs) if pair is None]
    paired = [i for i, pair in enumerate(pairs) if pair is not None]
    probs = np.zeros((len(rows), len(classifier.names)))
    if single:
        probs[single] = classifier([texts[i] for i in single])
    if paired:
        probs[paired] = classifier([texts[i] for i in paired], [pairs[i] for i in paired])
    return predictions(rows, probs, classifier.names, classifier.thresholds, all_probabilities)


def main(argv: list[str] | None = None) -> int:
    (args,) = parse(ARGUMENTS, argv, __doc__)
    read = partial(read_rows, args=args, columns=("text", "label"), predicting=True)
    columns = Columns(load_config(resolve_model(args.model)), **COLUMNS)
    rows = InputRows(args, lambda row: check_row(row, columns), read)
    classifier = Classifier(args.model, **args.settings())
    return predict_file(args, lambda some: with_labels(some, classifier, args.all_probabilities), rows)


if __name__ == "__main__":
    command_line(main)
