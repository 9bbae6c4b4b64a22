"""Compute probabilities, scores and thresholds from logits, and rank the rows by loss."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from scipy.special import expit, softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from common.args import TrainingArguments
from common.data.domains import by_domain
from common.data.source import Row
from common.data.words import without_spaces, words
from common.errors import tell
from common.run.report import print_table, rows_named, write_json_lines
from common.training import Trainer

BINS = 15  # bins of the calibration error, as in Guo et al. 2017


def probabilities(logits: list[np.ndarray], multi_label: bool) -> np.ndarray:
    """Return the probability of each class, (rows, classes): softmax, or sigmoid for multi-label rows."""
    stacked = np.stack(logits).astype(np.float64)
    return expit(stacked) if multi_label else softmax(stacked, axis=-1)


def decide(probs: np.ndarray, thresholds: list[float] | None) -> np.ndarray:
    """Return the class of each row, (rows,); with `thresholds` a 0 or 1 for each class, (rows, classes)."""
    return probs.argmax(-1) if thresholds is None else (probs >= np.array(thresholds)).astype(int)


def scores(probs: np.ndarray, gold: np.ndarray, names: list[str], thresholds: list[float] | None) -> dict[str, float]:
    """Compute the scores of a classifier.

    Args:
        probs: probabilities, (rows, classes).
        gold: class numbers (rows,), or for multi-label rows 0 and 1 (rows, classes).
        names: names of the classes.
        thresholds: threshold of each class for multi-label rows; None for one label per row.

    Returns:
        accuracy: share of rows with all labels correct.
        macro_, weighted_ precision, recall, f1: averages over the classes that occur in the gold labels or in the
            predictions, as scikit-learn's default; micro_ too for multi-label rows.
        absent_classes: classes that occur in neither.
        mcc: Matthews correlation, for one label per row (Gorodkin 2004).
        roc_auc, average_precision: means over the classes with positive and negative rows.
        calibration_error: expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
        class_NAME_precision, class_NAME_recall, class_NAME_f1, class_NAME_support
    """
    decided = decide(probs, thresholds)
    multi_label = thresholds is not None
    numbers = list(range(len(names)))
    result: dict[str, float] = {"accuracy": float(accuracy_score(gold, decided))}
    present = present_classes(gold, decided, len(names))
    result["absent_classes"] = len(names) - len(present)
    for average in ("macro", "weighted", "micro") if multi_label else ("macro", "weighted"):
        triple = precision_recall_fscore_support(gold, decided, labels=present, average=average, zero_division=0)
        result |= {f"{average}_{k}": float(v) for k, v in zip(("precision", "recall", "f1"), triple, strict=False)}
    if not multi_label:
        result["mcc"] = float(matthews_corrcoef(gold, decided))
    hits = gold.astype(int) if multi_label else np.eye(len(names), dtype=int)[gold]
    both = [i for i in numbers if 0 < hits[:, i].sum() < len(hits)]
    if both:
        result["roc_auc"] = float(np.mean([roc_auc_score(hits[:, i], probs[:, i]) for i in both]))
        result["average_precision"] = float(np.mean([average_precision_score(hits[:, i], probs[:, i]) for i in both]))
    correct = (decided == gold) if not multi_label else (hits == decided)
    confidence = probs.max(-1) if not multi_label else np.where(decided == 1, probs, 1 - probs)
    result["calibration_error"] = calibration_error(confidence.ravel(), correct.ravel())
    each = precision_recall_fscore_support(gold, decided, labels=numbers, average=None, zero_division=0)
    for i, name in enumerate(names):
        for key, values in zip(("precision", "recall", "f1", "support"), each, strict=True):
            result[f"class_{name}_{key}"] = int(values[i]) if key == "support" else float(values[i])
    return result


def present_classes(gold: np.ndarray, decided: np.ndarray, classes: int) -> list[int]:
    """Return the numbers of the classes that occur in the gold labels or in the decisions; all if none occurs."""
    if gold.ndim == 1:
        return sorted({*gold.tolist(), *decided.tolist()})
    return np.flatnonzero(gold.any(0) | decided.any(0)).tolist() or list(range(classes))


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the expected calibration error over bins of equal width.

    The error is the distance of mean confidence and accuracy in a bin, averaged over the bins by their rows.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    total = 0.0
    for i in np.unique(bins):
        inside = bins == i
        total += inside.sum() * abs(confidence[inside].mean() - correct[inside].mean())
    return float(total / len(confidence))


def tune_thresholds(probs: np.ndarray, gold: list[np.ndarray]) -> list[float]:
    """Return the threshold of each class with the best F1: the middle of two neighbouring probabilities."""
    thresholds = []
    for column, hits in zip(probs.T, np.array(gold).T, strict=True):
        order = np.argsort(-column, kind="stable")
        true = np.cumsum(hits[order])
        f1 = 2 * true / (np.arange(1, len(order) + 1) + hits.sum())
        last = np.append(column[order][1:] < column[order][:-1], True)  # a threshold cannot separate equal values
        best = int(np.argmax(np.where(last, f1, -1)))
        below = column[order][best + 1] if best + 1 < len(order) else 0.0
        thresholds.append(float((column[order][best] + below) / 2) if hits.any() else 0.5)
    return thresholds


def bag_of_words(
    train: dict[str, list], test: dict[str, list], names: list[str], multi_label: bool
) -> dict[str, float]:
    """Compute accuracy and macro F1 of the baseline: logistic regression on tf-idf of words and bigrams.

    Training texts without words, such as emojis, and labels that all training rows share give the most frequent answer.
    """
    tfidf = TfidfVectorizer(ngram_range=(1, 2), tokenizer=_long_words, token_pattern=None)
    texts, test_texts = (
        [" ".join(pair) for pair in zip(*(rows[k] for k in ("text", "text_pair") if k in rows), strict=True)]
        for rows in (train, test)
    )
    number = {name: i for i, name in enumerate(names)}
    has_words = any(map(_long_words, texts))
    if multi_label:
        train_gold, test_gold = (
            np.array([[name in labels for name in names] for labels in rows["label"]], dtype=int)
            for rows in (train, test)
        )
        known = [i for i in range(len(names)) if 0 < train_gold[:, i].sum() < len(train_gold)]
        decided = np.tile((train_gold.mean(0) > 0.5).astype(int), (len(test_gold), 1))
        if known and has_words:
            model = make_pipeline(tfidf, OneVsRestClassifier(LogisticRegression(max_iter=1000)))
            decided[:, known] = model.fit(texts, train_gold[:, known]).predict(test_texts).reshape(len(test_gold), -1)
    else:
        train_gold, test_gold = (np.array([number[label] for label in rows["label"]]) for rows in (train, test))
        decided = np.full(len(test_gold), np.bincount(train_gold).argmax())
        if len(set(train_gold)) > 1 and has_words:
            decided = make_pipeline(tfidf, LogisticRegression(max_iter=1000)).fit(texts, train_gold).predict(test_texts)
    f1 = precision_recall_fscore_support(
        test_gold, decided, labels=present_classes(test_gold, decided, len(names)), average="macro", zero_division=0
    )[2]
    return {"bag_of_words_accuracy": float(accuracy_score(test_gold, decided)), "bag_of_words_macro_f1": float(f1)}


def _long_words(text: str) -> list[str]:
    """Return the words of two and more letters, as scikit-learn does, and each letter in scripts without spaces."""
    return [word for word in words(text) if len(word) > 1 or without_spaces(word)]


def losses_of(probs: np.ndarray, gold: np.ndarray, multi_label: bool) -> np.ndarray:
    """Return the negative log-likelihood of the gold labels of each row."""
    clipped = np.clip(probs, 1e-12, 1 - 1e-12)
    if multi_label:
        return -(gold * np.log(clipped) + (1 - gold) * np.log(1 - clipped)).sum(-1)
    return -np.log(clipped[np.arange(len(gold)), gold])


def predictions(
    rows: list[Row],
    probs: np.ndarray,
    names: list[str],
    thresholds: list[float] | None,
    all_probabilities: bool = False,
) -> Iterator[Row]:
    """Yield the rows with `predicted` and `probability`.

    `probability` holds all classes for multi-label rows and with `all_probabilities`.
    """
    for row, row_probs, choice in zip(rows, probs, decide(probs, thresholds), strict=True):
        each = {name: round(float(p), 4) for name, p in zip(names, row_probs, strict=True)}
        if thresholds is None:
            name = names[choice]
            yield row | {"predicted": name, "probability": each if all_probabilities else each[name]}
        else:
            yield row | {"predicted": [n for n, yes in zip(names, choice, strict=True) if yes], "probability": each}


def hardest(rows: list[dict], probs: np.ndarray, gold: np.ndarray, multi_label: bool) -> list[dict]:
    """Sort the rows of `predictions` by loss, the highest first, and add `loss`."""
    losses = losses_of(probs, gold, multi_label)
    return [rows[i] | {"loss": round(float(losses[i]), 4)} for i in np.argsort(-losses, kind="stable")]


class Scorer:
    """Score the outputs of the trainer. `names` are the classes; `multi_label` allows several per row."""

    def __init__(self, names: list[str], multi_label: bool, args: TrainingArguments):
        self.classes, self.multi_label, self.args = names, multi_label, args

    def read(self, output: EvalPrediction | PredictionOutput) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities (rows, classes) and the gold labels."""
        return probabilities(output.predictions, self.multi_label), np.array(output.label_ids)

    def __call__(self, output: EvalPrediction | PredictionOutput, thresholds: list[float] | None) -> dict[str, float]:
        """Return the `scores` of an output."""
        return scores(*self.read(output), self.classes, thresholds)

    def by_domain(
        self, rows: Dataset, output: EvalPrediction | PredictionOutput, thresholds: list[float] | None
    ) -> dict[str, float]:
        """Return the `scores` of an output, and those of the domains of the encoded `rows`."""
        return by_domain(rows, lambda select: self(select(output), thresholds), self.args)

    def thresholds(self, output: EvalPrediction | PredictionOutput) -> list[float] | None:
        """Return the threshold of each class with the best F1; None for one label per row."""
        return tune_thresholds(*self.read(output)) if self.multi_label else None

    def names(self, labels: list) -> list[str]:
        """Return the names of the scores of rows with these `labels`."""
        gold, size = np.array(labels), len(self.classes)
        uniform = np.full((len(gold), size), 1 / size)
        return list(scores(uniform, gold, self.classes, [0.5] * size if self.multi_label else None))

    def probe(self, trainer: Trainer, rows: DatasetDict) -> dict[str, float]:
        """Score the test rows by the model before training, whose head is a linear probe."""
        if "test" not in rows:
            return {}
        thresholds = self.thresholds(trainer.predict(rows["validation"])) if self.multi_label else None
        result = self(trainer.predict(rows["test"]), thresholds)
        return {f"probe_{name}": result[name] for name in ("accuracy", "macro_f1")}

    def write(self, folder: str, rows: Dataset, output: PredictionOutput, thresholds: list[float] | None) -> None:
        """Write `predictions_test.jsonl`, and `hardest_test.jsonl` with the same rows sorted by loss."""
        probs, gold = self.read(output)
        predicted = list(predictions(rows.to_list(), probs, self.classes, thresholds))
        write_json_lines(Path(folder, "predictions_test.jsonl"), predicted)
        write_json_lines(Path(folder, "hardest_test.jsonl"), hardest(predicted, probs, gold, self.multi_label))


def print_scores(metrics: dict[str, float], split: str, names: list[str]) -> None:
    """Print the scores of each class, the averages, and the baselines that `metrics` has."""
    keys = ("precision", "recall", "f1")
    rows = [[n, *(metrics[f"{split}_class_{n}_{k}"] for k in (*keys, "support"))] for n in names]
    total = sum(row[-1] for row in rows)
    averages = [a for a in ("micro", "macro", "weighted") if f"{split}_{a}_f1" in metrics]
    rows += [[f"all ({a})", *(metrics[f"{split}_{a}_{k}"] for k in keys), total] for a in averages]
    baselines = {"bag of words": "bag_of_words", "linear probe": "probe"}
    baselines = {name: f"{split}_{key}" for name, key in baselines.items() if f"{split}_{key}_accuracy" in metrics}
    rows += [[f"{name} (macro)", "", "", metrics[f"{key}_macro_f1"], total] for name, key in baselines.items()]
    tell(f"\n{rows_named(split)} scores of classes")
    print_table(["class", "precision", "recall", "F1", "rows"], rows, last=len(rows) - len(names))
    absent = metrics[f"{split}_absent_classes"]
    if absent:
        tell(f"macro averages leave out {absent} of {len(names)} classes, which neither labels nor predictions have")
    shown = [
        k for k in ("accuracy", "mcc", "roc_auc", "average_precision", "calibration_error") if f"{split}_{k}" in metrics
    ]
    print_table(["score", rows_named(split)], [[k.replace("_", " "), metrics[f"{split}_{k}"]] for k in shown])
    if baselines:
        print_table(
            ["baseline", rows_named(split)],
            [[f"{name}, accuracy", metrics[f"{key}_accuracy"]] for name, key in baselines.items()],
        )
