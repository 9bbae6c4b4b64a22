"""Metrics as `evaluate.Metric` objects that need no network: lists of labels in, plain floats out."""

import datasets
import evaluate
import numpy as np
from seqeval.metrics import accuracy_score, classification_report
from seqeval.scheme import IOB2

_TAGS = datasets.Features(
    {"predictions": datasets.List(datasets.Value("string")), "references": datasets.List(datasets.Value("string"))}
)


#: an entity type of such a name would overwrite an average, or a baseline's score; it is called `type_macro` instead
RESERVED = ("macro", "gazetteer")


class StrictSeqeval(evaluate.Metric):
    """Entity precision, recall and F1 of seqeval in strict IOB2 mode, per type, micro and macro; token accuracy.

    `compute(predictions=..., references=...)` takes lists of tag sequences, one tag a word. An entity counts when its
    first word, last word and type are all right. A predicted `I-X` that continues no `X` is no part of any entity, as
    in seqeval's strict mode; `invalid_predicted_tags` counts the `I-X` that follow neither `B-X` nor `I-X`. Returns

        precision recall f1                      micro averages over all entities
        macro_precision macro_recall macro_f1    means over the types
        accuracy                                 share of words with the right tag, O included
        TYPE_precision TYPE_recall TYPE_f1 TYPE_support
        invalid_predicted_tags

    Works across processes like any `evaluate.Metric`. seqeval: Nakayama 2018, https://github.com/chakki-works/seqeval;
    the score: Tjong Kim Sang and De Meulder 2003, https://aclanthology.org/W03-0419/.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__, citation="https://github.com/chakki-works/seqeval", features=_TAGS
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        if not any(tag != "O" for tags in (*references, *predictions) for tag in tags):
            nothing = dict.fromkeys(("precision", "recall", "f1"), 0.0)
            return nothing | {f"macro_{k}": 0.0 for k in nothing} | {"accuracy": 1.0, "invalid_predicted_tags": 0}
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


def invalid_tags(tags: list[str]) -> list[int]:
    """Positions of each `I-X` that follows neither `B-X` nor `I-X`: no such tag can stand in IOB2."""
    return [
        i for i, tag in enumerate(tags) if tag.startswith("I-") and (i == 0 or tags[i - 1] not in (tag, "B-" + tag[2:]))
    ]
