"""Tell `make transfer` the texts and scores of this recipe (`common.run.transferable`)."""

from typing import Any

import numpy as np
from transformers import AutoModelForSeq2SeqLM

from common.errors import InputError
from common.run.transferable import RowStatistics, TaskRows, of_mean

from .scoring import bleu_counts, bleu_of, bleu_of_counts


def training_rows(parsed: tuple[Any, ...]) -> TaskRows:
    """Return the sources; there are no classes."""
    data, _ = parsed[1].load()
    return TaskRows(
        pieces=[[text] for text in data["train"]["source"][:]],
        classes=None,
        head=AutoModelForSeq2SeqLM,
        evaluated=(len(data["validation"]), len(data.get("test", []))),
    )


def row_statistics(rows: list[dict[str, Any]], score: str) -> RowStatistics:
    """Return the statistics of bleu, the mean over the language pairs with the default tokenizer, or of exact."""
    predicted, gold = ([" ".join(row[name].split()) for row in rows] for name in ("predicted", "target"))
    if score == "exact":
        return of_mean([float(ours == theirs) for ours, theirs in zip(predicted, gold, strict=True)])
    if score != "bleu":
        raise InputError(f"score {score}: no statistics of rows for it; choose one of bleu, exact")
    pairs = [row["pair"] for row in rows]
    names = sorted(set(pairs))
    bleus = [bleu_of(name.partition("-")[2], "auto") for name in names]
    values = np.zeros((len(rows), len(names), 10))
    for number, (name, bleu) in enumerate(zip(names, bleus, strict=True)):
        of_pair = [i for i, pair in enumerate(pairs) if pair == name]
        values[of_pair, number] = bleu_counts(bleu, [predicted[i] for i in of_pair], [gold[i] for i in of_pair])

    def of_sums(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, len(names), 10)
        scores = [
            [bleu_of_counts(bleu, c[None].round().astype(int)) for bleu, c in zip(bleus, of, strict=True)]
            for of in flat
        ]
        return np.mean(scores, axis=1).reshape(sums.shape[:-1])

    return RowStatistics(values.reshape(len(rows), 10 * len(names)), of_sums, points=1)
