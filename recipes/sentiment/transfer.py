"""Tell `make transfer` the texts, classes and scores of this recipe (`common.run.transferable`)."""

from typing import Any

from transformers import AutoModelForSequenceClassification

from common.run.transferable import RowStatistics, TaskRows, of_classes

from .labels import load_labeled


def training_rows(parsed: tuple[Any, ...]) -> TaskRows:
    """Return the texts and their labels; several labels of a text are one class."""
    data, _, several, labels = load_labeled(parsed[1])
    train = data["train"]
    pairs = zip(*(train[name][:] for name in ("text", "text_pair") if name in train.column_names), strict=True)
    classes = [["|".join(sorted(label)) if several else label] for label in train["label"][:]]
    return TaskRows(
        pieces=[[" ".join(pair)] for pair in pairs],
        classes=classes,
        head=AutoModelForSequenceClassification,
        evaluated=(len(data["validation"]), len(data.get("test", []))),
        label_names=frozenset(labels),
    )


def row_statistics(rows: list[dict[str, Any]], score: str) -> RowStatistics:
    """Return the statistics of accuracy, macro_f1, micro_f1 or weighted_f1."""
    gold, predicted = ([_labels(row[name]) for row in rows] for name in ("label", "predicted"))
    return of_classes(gold, predicted, score)


def _labels(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
