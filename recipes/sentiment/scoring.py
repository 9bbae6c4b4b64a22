"""From logits to probabilities, scores, thresholds, and the rows that were hardest."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
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

from common.data.files import Row
from common.run.report import print_table, write_json_lines

BINS = 15  # of the calibration error, as in Guo et al. 2017


def probabilities(logits: list[np.ndarray], several: bool) -> np.ndarray:
    """Probability of each class, of shape (rows, classes): softmax, or with several labels a row sigmoids."""
    stacked = np.stack(logits).astype(np.float64)
    return expit(stacked) if several else softmax(stacked, axis=-1)


def decide(found: np.ndarray, thresholds: list[float] | None) -> np.ndarray:
    """The class of each row, of shape (rows,); or with `thresholds` a 0 or 1 of shape (rows, classes)."""
    return found.argmax(-1) if thresholds is None else (found >= np.array(thresholds)).astype(int)


def scores(found: np.ndarray, gold: np.ndarray, names: list[str], thresholds: list[float] | None) -> dict[str, float]:
    """Scores of probabilities `found` (rows, classes) against `gold`, class numbers (rows,) or 0 and 1 (rows, classes).

    accuracy                                     share of rows that are right (all labels of a row)
    macro_ and weighted_ precision, recall, f1   over classes; with several labels micro_ as well
    mcc                                          Matthews correlation, for one label a row (Gorodkin 2004)
    roc_auc average_precision                    mean over the classes that gold has and has not
    calibration_error                            expected calibration error, 15 bins (Guo et al. 2017,
                                                 https://arxiv.org/abs/1706.04599)
    CLASS_precision CLASS_recall CLASS_f1 CLASS_support
    """
    decided = decide(found, thresholds)
    several = thresholds is not None
    numbers = list(range(len(names)))
    result: dict[str, float] = {"accuracy": float(accuracy_score(gold, decided))}
    for average in ("macro", "weighted", "micro") if several else ("macro", "weighted"):
        triple = precision_recall_fscore_support(gold, decided, labels=numbers, average=average, zero_division=0)
        result |= {f"{average}_{k}": float(v) for k, v in zip(("precision", "recall", "f1"), triple, strict=False)}
    if not several:
        result["mcc"] = float(matthews_corrcoef(gold, decided))
    hits = gold.astype(int) if several else np.eye(len(names), dtype=int)[gold]
    both = [i for i in numbers if 0 < hits[:, i].sum() < len(hits)]
    if both:
        result["roc_auc"] = float(np.mean([roc_auc_score(hits[:, i], found[:, i]) for i in both]))
        result["average_precision"] = float(np.mean([average_precision_score(hits[:, i], found[:, i]) for i in both]))
    right = (decided == gold) if not several else (hits == decided)
    sure = found.max(-1) if not several else np.where(decided == 1, found, 1 - found)
    result["calibration_error"] = calibration_error(sure.ravel(), right.ravel())
    each = precision_recall_fscore_support(gold, decided, labels=numbers, average=None, zero_division=0)
    for i, name in enumerate(names):
        for key, values in zip(("precision", "recall", "f1", "support"), each, strict=True):
            result[f"class_{name}_{key}"] = int(values[i]) if key == "support" else float(values[i])
    return result


def calibration_error(sure: np.ndarray, right: np.ndarray) -> float:
    """Mean distance, over bins of equal width weighted by their rows, of mean probability and share that is right."""
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    total = 0.0
    for i in np.unique(bins):
        inside = bins == i
        total += inside.sum() * abs(sure[inside].mean() - right[inside].mean())
    return float(total / len(sure))


def tune_thresholds(found: np.ndarray, gold: list[np.ndarray]) -> list[float]:
    """For each class the threshold of its best F1 on these rows: halfway between two neighbouring probabilities."""
    thresholds = []
    for column, hits in zip(found.T, np.array(gold).T, strict=True):
        order = np.argsort(-column, kind="stable")
        true = np.cumsum(hits[order])
        f1 = 2 * true / (np.arange(1, len(order) + 1) + hits.sum())
        last = np.append(column[order][1:] < column[order][:-1], True)  # a threshold cannot part equal values
        best = int(np.argmax(np.where(last, f1, -1)))
        below = column[order][best + 1] if best + 1 < len(order) else 0.0
        thresholds.append(float((column[order][best] + below) / 2) if hits.any() else 0.5)
    return thresholds


def bag_of_words(train: dict[str, list], test: dict[str, list], names: list[str], several: bool) -> dict[str, float]:
    """Accuracy and macro F1 of the baseline: logistic regression on tf-idf of words and pairs of neighbouring words."""
    texts, test_texts = (
        [" ".join(pair) for pair in zip(*(rows[k] for k in ("text", "text_pair") if k in rows), strict=True)]
        for rows in (train, test)
    )
    number = {name: i for i, name in enumerate(names)}
    if several:
        gold, wanted = (
            np.array([[name in labels for name in names] for labels in rows["label"]], dtype=int)
            for rows in (train, test)
        )
        known = [i for i in range(len(names)) if 0 < gold[:, i].sum() < len(gold)]
        model = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2)), OneVsRestClassifier(LogisticRegression(max_iter=1000))
        )
        decided = np.zeros_like(wanted)
        decided[:, known] = model.fit(texts, gold[:, known]).predict(test_texts).reshape(len(wanted), -1)
    else:
        gold, wanted = (np.array([number[label] for label in rows["label"]]) for rows in (train, test))
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
        decided = model.fit(texts, gold).predict(test_texts) if len(set(gold)) > 1 else np.full(len(wanted), gold[0])
    f1 = precision_recall_fscore_support(
        wanted, decided, labels=list(range(len(names))), average="macro", zero_division=0
    )[2]
    return {"bag_of_words_accuracy": float(accuracy_score(wanted, decided)), "bag_of_words_macro_f1": float(f1)}


def losses_of(found: np.ndarray, gold: np.ndarray, several: bool) -> np.ndarray:
    """Negative log-likelihood of each row's gold label or labels."""
    safe = np.clip(found, 1e-12, 1 - 1e-12)
    if several:
        return -(gold * np.log(safe) + (1 - gold) * np.log(1 - safe)).sum(-1)
    return -np.log(safe[np.arange(len(gold)), gold])


def predictions(
    rows: list[Row],
    found: np.ndarray,
    names: list[str],
    thresholds: list[float] | None,
    all_probabilities: bool = False,
) -> Iterator[Row]:
    """Rows with what the model says: `predicted` and its `probability`.

    `probability` is that of each class with several labels a row, or with `all_probabilities`.
    """
    for row, chances, choice in zip(rows, found, decide(found, thresholds), strict=True):
        each = {name: round(float(p), 4) for name, p in zip(names, chances, strict=True)}
        if thresholds is None:
            name = names[choice]
            yield row | {"predicted": name, "probability": each if all_probabilities else each[name]}
        else:
            yield row | {"predicted": [n for n, yes in zip(names, choice, strict=True) if yes], "probability": each}


def hardest(rows: list[dict], found: np.ndarray, gold: np.ndarray, several: bool) -> list[dict]:
    """The rows of `predictions`, those of the highest loss first, each with its `loss`."""
    losses = losses_of(found, gold, several)
    return [rows[i] | {"loss": round(float(losses[i]), 4)} for i in np.argsort(-losses, kind="stable")]


class Scorer:
    """Scores of what the trainer predicts for the classes `names`, of which a row has one, or `several`."""

    def __init__(self, names: list[str], several: bool):
        self.classes, self.several = names, several

    def read(self, output: EvalPrediction | PredictionOutput) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities, of shape (rows, classes), and the gold labels."""
        return probabilities(output.predictions, self.several), np.array(output.label_ids)

    def __call__(self, output: EvalPrediction | PredictionOutput, thresholds: list[float] | None) -> dict[str, float]:
        """Return the `scores`."""
        return scores(*self.read(output), self.classes, thresholds)

    def thresholds(self, output: EvalPrediction | PredictionOutput) -> list[float] | None:
        """Return the threshold of each class with its best F1 on these rows; None for one label a row."""
        return tune_thresholds(*self.read(output)) if self.several else None

    def names(self, labels: list) -> list[str]:
        """Return the names of the scores that rows with these `labels` get."""
        gold, size = np.array(labels), len(self.classes)
        chance = np.full((len(gold), size), 1 / size)
        return list(scores(chance, gold, self.classes, [0.5] * size if self.several else None))

    def write(self, folder: str, rows: Dataset, output: PredictionOutput, thresholds: list[float] | None) -> None:
        """Write `predictions_test.jsonl`, and `hardest_test.jsonl` with the rows of the highest loss first."""
        found, gold = self.read(output)
        predicted = list(predictions(rows.to_list(), found, self.classes, thresholds))
        write_json_lines(Path(folder, "predictions_test.jsonl"), predicted)
        write_json_lines(Path(folder, "hardest_test.jsonl"), hardest(predicted, found, gold, self.several))


def print_scores(metrics: dict[str, float], split: str, names: list[str]) -> None:
    """A line for each class, the averages, and the baseline where it was scored."""
    keys = ("precision", "recall", "f1")
    rows = [[n, *(metrics[f"{split}_class_{n}_{k}"] for k in (*keys, "support"))] for n in names]
    total = sum(row[-1] for row in rows)
    averages = [a for a in ("micro", "macro", "weighted") if f"{split}_{a}_f1" in metrics]
    rows += [[f"all ({a})", *(metrics[f"{split}_{a}_{k}"] for k in keys), total] for a in averages]
    if f"{split}_bag_of_words_macro_f1" in metrics:
        rows.append(["bag of words (macro)", "", "", metrics[f"{split}_bag_of_words_macro_f1"], total])
    print_table(["class", "precision", "recall", "F1", "rows"], rows, last=len(rows) - len(names))
    shown = [
        k for k in ("accuracy", "mcc", "roc_auc", "average_precision", "calibration_error") if f"{split}_{k}" in metrics
    ]
    print_table(["score", split], [[k.replace("_", " "), metrics[f"{split}_{k}"]] for k in shown])
    if f"{split}_bag_of_words_accuracy" in metrics:
        print_table(["baseline", split], [["bag of words, accuracy", metrics[f"{split}_bag_of_words_accuracy"]]])
