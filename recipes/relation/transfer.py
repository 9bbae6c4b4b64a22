"""Tell `make transfer` the texts, relations and scores of this recipe (`common.run.transferable`)."""

from typing import Any

from transformers import AutoModelForTokenClassification

from common.run.transferable import RowStatistics, TaskRows, of_classes

from .arguments import NO_RELATION
from .reading import load_pairs


def training_rows(parsed: tuple[Any, ...]) -> TaskRows:
    """Return the texts and the relation of each."""
    data, _, relations, _ = load_pairs(parsed[1])
    train = data["train"]
    return TaskRows(
        pieces=[[text] for text in train["text"][:]],
        classes=[[label] for label in train["label"][:]],
        head=AutoModelForTokenClassification,
        evaluated=(len(data["validation"]), len(data.get("test", []))),
        label_names=frozenset(relations),
    )


def row_statistics(rows: list[dict[str, Any]], score: str) -> RowStatistics:
    """Return the statistics of accuracy, micro_f1, macro_f1 or weighted_f1.

    The averages leave out the label that `--no_relation_label auto` finds.
    """
    gold, predicted = ([[row[name]] for row in rows] for name in ("label", "predicted"))
    occurring = {label for labels in gold + predicted for label in labels}
    return of_classes(gold, predicted, score, [name for name in NO_RELATION if name in occurring][:1])
