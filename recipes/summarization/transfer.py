"""Tell `make transfer` the texts and scores of this recipe (`common.run.transferable`)."""

from typing import Any

from transformers import AutoModelForSeq2SeqLM, AutoModelForTokenClassification

from common.errors import InputError
from common.models import Seq2SeqModelArguments
from common.run.transferable import RowStatistics, TaskRows, of_mean

from .scoring import KINDS, SCORES, Rouge, kind_of


def training_rows(parsed: tuple[Any, ...]) -> TaskRows:
    """Return the documents; there are no classes."""
    data, _ = parsed[1].load()
    generates = isinstance(parsed[0], Seq2SeqModelArguments)
    return TaskRows(
        pieces=[[text] for text in data["train"]["document"][:]],
        classes=None,
        head=AutoModelForSeq2SeqLM if generates else AutoModelForTokenClassification,
        evaluated=(len(data["validation"]), len(data.get("test", []))),
    )


def row_statistics(rows: list[dict[str, Any]], score: str) -> RowStatistics:
    """Return the statistics of a ROUGE of `SCORES`, a mean over the rows; its words follow the references' alphabet."""
    if score not in SCORES:
        raise InputError(f"score {score}: no statistics of rows for it; choose one of {', '.join(SCORES)}")
    rouge = Rouge(kind_of([row["summary"] for row in rows]), [])
    values = rouge([row["predicted"] for row in rows], [row["references"] for row in rows]).reshape(-1, len(KINDS))
    return of_mean(values[:, :3].mean(1) if score == "rouge_mean" else values[:, KINDS.index(score)], points=1)
