"""Tell `make transfer` the words, tags and scores of this recipe (`common.run.transferable`)."""

from typing import Any

from transformers import AutoModelForTokenClassification

from common.args import SPLITS
from common.run.transferable import RowStatistics, TaskRows, of_spans

from .reading import load_tagged
from .tagging import entity_spans, word_spans


def training_rows(parsed: tuple[Any, ...]) -> TaskRows:
    """Return the words and the entity type of each; O is a type."""
    data, _, _ = load_tagged(parsed[1])
    tags = data["train"]["ner_tags"][:]
    return TaskRows(
        pieces=data["train"]["tokens"][:],
        classes=[[tag.removeprefix("B-").removeprefix("I-") for tag in row] for row in tags],
        head=AutoModelForTokenClassification,
        evaluated=(len(data["validation"]), len(data.get("test", []))),
        label_names=frozenset(
            tag for split in SPLITS if split in data for row in data[split]["ner_tags"] for tag in row
        ),
    )


def row_statistics(rows: list[dict[str, Any]], score: str) -> RowStatistics:
    """Return the statistics of precision, recall or f1 of entities; tags other than IOB2 are entities of one word."""
    both = [(row["ner_tags"], row["predicted_tags"]) for row in rows]
    iob2 = all(tag == "O" or tag[:2] in ("B-", "I-") for pair in both for tags in pair for tag in tags)
    spans = entity_spans if iob2 else word_spans
    pairs = [(set(spans(gold)), set(spans(predicted))) for gold, predicted in both]
    return of_spans([(len(gold & predicted), len(predicted), len(gold)) for gold, predicted in pairs], score)
