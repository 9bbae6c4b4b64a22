"""Tell `make transfer` the texts and scores of this recipe (`common.run.transferable`)."""

from typing import Any

from transformers import AutoModelForQuestionAnswering

from common.errors import InputError
from common.run.transferable import RowStatistics, TaskRows, of_mean

from .squad import load_questions


def training_rows(parsed: tuple[Any, ...]) -> TaskRows:
    """Return questions with their contexts; there are no classes."""
    data, _ = load_questions(parsed[1])
    train = data["train"]
    return TaskRows(
        pieces=[
            [f"{question} {context}"] for question, context in zip(train["question"], train["context"], strict=True)
        ],
        classes=None,
        head=AutoModelForQuestionAnswering,
        evaluated=(len(data["validation"]), len(data.get("test", []))),
    )


def row_statistics(rows: list[dict[str, Any]], score: str) -> RowStatistics:
    """Return the statistics of f1 or exact_match, both means over the questions."""
    if score not in ("f1", "exact_match"):
        raise InputError(f"score {score}: no statistics of rows for it; choose one of f1, exact_match")
    return of_mean([row[score] for row in rows])
