"""Entity scores, the gazetteer baseline and the printed table of results."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import Dataset
from seqeval.metrics import accuracy_score, classification_report
from seqeval.scheme import IOB2

from common.args import TrainingArguments
from common.data import domains
from common.errors import tell
from common.run.report import print_table, rows_named

from .schemes import invalid_tags
from .tagging import entity_spans, stitch

_TAGS = datasets.Features(
    {"predictions": datasets.List(datasets.Value("string")), "references": datasets.List(datasets.Value("string"))}
)


#: these entity types would overwrite an average or the baseline's score; their scores are named `type_macro_f1`, ...
RESERVED = ("macro", "gazetteer", "probe")


class StrictSeqeval(evaluate.Metric):
    """Compute precision, recall and F1 of entities with seqeval in strict IOB2 mode, and the accuracy of tags.

    `compute(predictions=..., references=...)` takes lists of tag sequences, one tag per word. An entity is correct when
    its first word, last word and type are correct. As in seqeval's strict mode, a predicted `I-X` that does not
    continue an `X` belongs to no entity. `compute` returns

        precision recall f1                      micro averages over all entities
        macro_precision macro_recall macro_f1    means over the types
        accuracy                                 share of words with the correct tag, O included
        TYPE_precision TYPE_recall TYPE_f1 TYPE_support
        invalid_predicted_tags                   predicted `I-X` that follow neither `B-X` nor `I-X`

    With `tag_scheme="none"`, each word with a tag other than O is an entity.

    Works across processes like any `evaluate.Metric`. seqeval: Nakayama 2018, https://github.com/chakki-works/seqeval;
    the score: Tjong Kim Sang and De Meulder 2003, https://aclanthology.org/W03-0419/.
    """

    def __init__(self, tag_scheme: str = "iob2", **options: Any):
        super().__init__(**options)
        self.single_words = tag_scheme == "none"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__, citation="https://github.com/chakki-works/seqeval", features=_TAGS
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        if self.single_words:
            predictions, references = map(word_entities, predictions), map(word_entities, references)
            predictions, references = list(predictions), list(references)
        if not any(tag != "O" for tags in (*references, *predictions) for tag in tags):
            zeros = dict.fromkeys(("precision", "recall", "f1"), 0.0)
            return zeros | {f"macro_{k}": 0.0 for k in zeros} | {"accuracy": 1.0, "invalid_predicted_tags": 0}
        report = classification_report(
            references, predictions, mode="strict", scheme=IOB2, output_dict=True, zero_division=0
        )
        micro, macro = report.pop("micro avg"), report.pop("macro avg")
        report.pop("weighted avg")
        scores = {
            "precision": micro["precision"],
            "recall": micro["recall"],
            "f1": micro["f1-score"],
            "macro_precision": macro["precision"],
            "macro_recall": macro["recall"],
            "macro_f1": macro["f1-score"],
            "accuracy": accuracy_score(references, predictions),
            "invalid_predicted_tags": sum(len(invalid_tags(tags)) for tags in predictions),
        }
        for name, of_type in report.items():
            name = f"type_{name}" if name in RESERVED else name
            for key in ("precision", "recall", "f1-score", "support"):
                scores[f"{name}_{key.removesuffix('-score')}"] = of_type[key]
        return {key: value.item() if isinstance(value, np.generic) else value for key, value in scores.items()}


def word_entities(tags: list[str]) -> list[str]:
    """Return IOB2 tags in which each word with a tag other than O is an entity."""
    return [tag if tag == "O" else f"B-{tag}" for tag in tags]


def predicted_tags(windows: Dataset, predictions: list[np.ndarray], labels: list[str]) -> list[list[str]]:
    """Return the predicted tags of each sentence. `predictions` has an array for each window: a label id per token."""
    return [[labels[i] for i in ids] for ids in stitch(windows, predictions)]


def gold_tags(windows: Dataset, labels: list[str]) -> list[list[str]]:
    """Return the gold tags of each sentence, from column `tags` of the windows."""
    sentences: dict[int, list[str]] = defaultdict(list)
    for sentence, tags in zip(windows["sentence"], windows["tags"], strict=True):
        sentences[sentence].extend(labels[i] for i in tags)
    return [sentences[sentence] for sentence in sorted(sentences)]


def by_domain(
    metric: StrictSeqeval,
    windows: Dataset,
    predicted: list[list[str]],
    gold: list[list[str]],
    args: TrainingArguments,
) -> dict[str, float]:
    """Return the scores of `metric` for the sentences of `windows`, and those of their domains."""
    return domains.by_domain(
        windows, lambda select: metric.compute(predictions=select(predicted), references=select(gold)), args
    )


class Gazetteer:
    """Tag the entities of the training rows wherever their words occur (baseline).

    The longest match wins. An entity gets its most frequent type.
    """

    def __init__(self, sentences: list[list[str]], tags: list[list[str]]):
        types: dict[tuple[str, ...], Counter] = defaultdict(Counter)
        for words, sequence in zip(sentences, tags, strict=True):
            for name, start, end in entity_spans(sequence):
                types[tuple(words[start:end])][name] += 1
        self.types = {entry: counts.most_common(1)[0][0] for entry, counts in types.items()}
        self.longest = max(map(len, self.types), default=0)

    def tag(self, words: list[str]) -> list[str]:
        """Return a tag for each word."""
        tags: list[str] = []
        while len(tags) < len(words):
            i = len(tags)
            for size in range(min(self.longest, len(words) - i), 0, -1):
                name = self.types.get(tuple(words[i : i + size]))
                if name:
                    tags += [f"B-{name}"] + [f"I-{name}"] * (size - 1)
                    break
            else:
                tags.append("O")
        return tags


def gazetteer_f1(train: Dataset, test: Dataset, metric: StrictSeqeval) -> float:
    """Return the F1 of the gazetteer of the training rows on the test rows."""
    tags = train["ner_tags"][:]
    gazetteer = Gazetteer(train["tokens"][:], [word_entities(row) for row in tags] if metric.single_words else tags)
    predicted = [gazetteer.tag(words) for words in test["tokens"][:]]
    if metric.single_words:
        predicted = [[tag.removeprefix("B-") for tag in tags] for tags in predicted]
    return metric.compute(predictions=predicted, references=test["ner_tags"][:])["f1"]


def compare(rows: Iterable[dict], predicted: list[list[str]]) -> Iterator[dict]:
    """Yield the rows of a split with `predicted_tags` and `differ_at`, the positions of the wrong tags."""
    for row, tags in zip(rows, predicted, strict=True):
        differ = [i for i, (a, b) in enumerate(zip(row["ner_tags"], tags, strict=True)) if a != b]
        kept = {name: row[name] for name in ("id", "domain", "tokens", "ner_tags") if name in row}
        yield kept | {"predicted_tags": tags, "differ_at": differ}


def print_scores(metrics: dict[str, float], split: str) -> None:
    """Print the scores of each entity type, the averages, and the baselines that `metrics` has."""
    keys = ("precision", "recall", "f1")
    types = [
        k.removeprefix(f"{split}_").removesuffix("_support")
        for k in metrics
        if k.startswith(split) and k.endswith("_support")
    ]
    rows = [[t, *(metrics[f"{split}_{t}_{k}"] for k in keys), metrics[f"{split}_{t}_support"]] for t in sorted(types)]
    total = sum(row[-1] for row in rows)
    rows.append(["all (micro)", *(metrics[f"{split}_{k}"] for k in keys), total])
    rows.append(["all (macro)", *(metrics[f"{split}_macro_{k}"] for k in keys), total])
    baselines = {"gazetteer of train": f"{split}_gazetteer_f1", "linear probe": f"{split}_probe_f1"}
    rows += [[name, "", "", metrics[key], total] for name, key in baselines.items() if key in metrics]
    tell(f"\n{rows_named(split)} scores of entities (seqeval, strict IOB2)")
    print_table(["type", "precision", "recall", "F1", "entities"], rows, last=len(rows) - len(types))
