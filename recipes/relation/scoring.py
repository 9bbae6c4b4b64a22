"""Score relations, rate the baseline of the types, write predictions and print the table of results."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from scipy.special import softmax
from sklearn.metrics import precision_recall_fscore_support
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from common.data.source import Row
from common.errors import is_main_process, tell
from common.run.pictures import draw_confusion, short_name
from common.run.report import print_table, rows_named, write_json_lines

from .mentions import MENTIONS

#: a label of SemEval-2010 Task 8: relation and direction
_DIRECTED = re.compile(r"(.+)\((e1,e2|e2,e1)\)")
BASELINES = {"type_pair": "by types alone", "probe": "probe on frozen states"}


def scores(gold: np.ndarray, decided: np.ndarray, names: list[str], no_relation: str | None) -> dict[str, float]:
    """Compute the scores of relations.

    Args:
        gold: gold relations by number, (rows,).
        decided: predicted relations by number, (rows,).
        names: names of the relations, that for no relation included.
        no_relation: label of pairs without a relation; None without one.

    Returns:
        accuracy: share of rows with the correct label, no relation included.
        micro_precision, micro_recall, micro_f1: over the rows with a relation in the gold labels or in the predictions,
            as the scorer of TACRED (Zhang et al. 2017, https://aclanthology.org/D17-1004). Without a label for no
            relation they equal the accuracy.
        macro_precision, macro_recall, macro_f1: means over the relations that occur in gold labels or predictions.
        semeval_macro_f1: see `semeval_macro_f1`; only with labels of that kind.
        relation_NAME_precision, relation_NAME_recall, relation_NAME_f1, relation_NAME_support
    """
    real = [i for i, name in enumerate(names) if name != no_relation]
    occurring = {*gold.tolist(), *decided.tolist()}
    present = [i for i in real if i in occurring] or real
    result = {"accuracy": float((gold == decided).mean())}
    for average, labels in (("micro", real), ("macro", present)):
        triple = precision_recall_fscore_support(gold, decided, labels=labels, average=average, zero_division=0)
        result |= {f"{average}_{k}": float(v) for k, v in zip(("precision", "recall", "f1"), triple, strict=False)}
    if is_directed(names, no_relation):
        result["semeval_macro_f1"] = semeval_macro_f1(
            [names[i] for i in gold], [names[i] for i in decided], no_relation
        )
    each = precision_recall_fscore_support(gold, decided, labels=real, average=None, zero_division=0)
    for key, values in zip(("precision", "recall", "f1", "support"), each, strict=True):
        for i, value in zip(real, values, strict=True):
            result[f"relation_{names[i]}_{key}"] = int(value) if key == "support" else float(value)
    return result


def is_directed(names: list[str], no_relation: str | None) -> bool:
    """Return whether every relation has a direction as in SemEval-2010 Task 8, such as `Cause-Effect(e1,e2)`."""
    return all(_DIRECTED.fullmatch(name) for name in names if name != no_relation)


def semeval_macro_f1(gold: list[str], predicted: list[str], no_relation: str | None) -> float:
    """Compute the official score of SemEval-2010 Task 8 as a share: macro F1, (9+1)-way, with direction.

    The rules of semeval2010_task8_scorer-v1.2.pl (Hendrickx et al. 2010, https://aclanthology.org/S10-1006):
    - Labels are relations without their direction. A prediction of the right relation in the wrong direction is an
      error of that relation: it counts in the denominators of precision and of recall.
    - The mean is over the relations of the gold labels, without the label for no relation. A relation that is predicted
      and never gold does not count, other than as a miss of another relation.
    - Precision, recall and F1 are 0 if their denominator is 0.
    """

    def relation(label: str) -> str:
        directed = _DIRECTED.fullmatch(label)
        return directed[1] if directed else label

    correct = Counter(relation(a) for a, b in zip(gold, predicted, strict=True) if a == b)
    proposed, actual = Counter(map(relation, predicted)), Counter(map(relation, gold))
    each = [
        2 * correct[name] / (proposed[name] + actual[name]) if correct[name] else 0.0
        for name in actual
        if name != no_relation
    ]
    return sum(each) / len(each) if each else 0.0


def most_frequent(train: Dataset, test: Dataset) -> list[str]:
    """Return, for each test row, the most frequent relation of the training rows with its pair of types (baseline).

    Pairs of types that training lacks, and rows without types, get the most frequent relation of all rows.
    """
    counts: dict[tuple | None, Counter] = {}
    for row in train:
        for key in (_types(row), None):
            counts.setdefault(key, Counter())[row["label"]] += 1
    best = {key: min(of_key, key=lambda label: (-of_key[label], label)) for key, of_key in counts.items()}
    return [best.get(_types(row), best[None]) for row in test]


def _types(row: Row) -> tuple:
    return tuple(row[name]["type"] for name in MENTIONS)


class Scorer:
    """Score the outputs of the trainer. `names` are the relations; `no_relation` is the label without a relation."""

    def __init__(self, names: list[str], no_relation: str | None):
        self.relations, self.no_relation = names, no_relation

    def __call__(self, output: EvalPrediction | PredictionOutput) -> dict[str, float]:
        """Return the `scores` of an output."""
        return scores(
            np.array(output.label_ids), self.probabilities(output).argmax(-1), self.relations, self.no_relation
        )

    def probabilities(self, output: EvalPrediction | PredictionOutput) -> np.ndarray:
        """Return the probability of each relation, (rows, relations)."""
        return softmax(np.stack(output.predictions).astype(np.float64), axis=-1)

    def names(self, labels: list[int]) -> list[str]:
        """Return the names of the scores of rows with these `labels`."""
        return list(scores(np.array(labels), np.array(labels), self.relations, self.no_relation))

    def baseline(self, name: str, predicted: list[str], gold: list[str]) -> dict[str, float]:
        """Return micro and macro F1 of a baseline's predictions."""
        number = {relation: i for i, relation in enumerate(self.relations)}
        pair = (np.array([number[label] for label in labels]) for labels in (gold, predicted))
        found = scores(*pair, self.relations, self.no_relation)
        kept = ("micro_f1", "macro_f1", "semeval_macro_f1")
        return {f"{name}_{key}": found[key] for key in kept if key in found}

    def write(self, folder: str, rows: Dataset, output: PredictionOutput) -> None:
        """Write `predictions_test.jsonl`, and the confusion picture."""
        probs = self.probabilities(output)
        predicted = predictions(rows.to_list(), probs, self.relations)
        write_json_lines(Path(folder, "predictions_test.jsonl"), predicted)

    def draw(self, folder: str, output: PredictionOutput) -> None:
        """Draw the confusion matrix, from the main process only."""
        if is_main_process():
            decided = self.probabilities(output).argmax(-1)
            names = [short_name(name) for name in self.relations]
            draw_confusion(Path(folder, "confusion.png"), np.array(output.label_ids), decided, names)


def predictions(rows: list[Row], probs: np.ndarray, names: list[str], every: bool = False) -> Iterator[Row]:
    """Yield the rows with `predicted` and `probability`; with `every` the probability of each relation."""
    for row, of_row in zip(rows, probs, strict=True):
        each = {name: round(float(p), 4) for name, p in zip(names, of_row, strict=True)}
        best = names[int(of_row.argmax())]
        yield row | {"predicted": best, "probability": each if every else each[best]}


def print_scores(metrics: dict[str, float], split: str, names: list[str], no_relation: str | None) -> None:
    """Print the scores of each relation, the averages, and the baselines if `metrics` has them."""
    keys = ("precision", "recall", "f1")
    real = [name for name in names if name != no_relation]
    rows = [[n, *(metrics[f"{split}_relation_{n}_{k}"] for k in (*keys, "support"))] for n in real]
    total = sum(row[-1] for row in rows)
    rows += [[f"all ({a})", *(metrics[f"{split}_{a}_{k}"] for k in keys), total] for a in ("micro", "macro")]
    official = f"{split}_semeval_macro_f1"
    rows += [["all (official SemEval macro)", "", "", metrics[official], total]] if official in metrics else []
    for name, title in BASELINES.items():
        if f"{split}_{name}_micro_f1" in metrics:
            rows.append([f"{title} (micro)", "", "", metrics[f"{split}_{name}_micro_f1"], total])
    without = f" (without {no_relation})" if no_relation else ""
    tell(f"\n{rows_named(split)} scores of relations{without}; accuracy {metrics[f'{split}_accuracy']:.4f}")
    print_table(["relation", "precision", "recall", "F1", "pairs"], rows, last=len(rows) - len(real))
