"""Order found passages again by a classifier of text pairs, which reads query and passage together."""

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from common.errors import InputError
from common.inference.predictor import Predictor

from .index import Hit


def check_reads_heads(config: PretrainedConfig, where: str) -> None:
    """Raise `InputError` for a classifier that was trained on windows or on tails of long texts.

    The classifiers of this recipe read the first tokens only, and cut the longer text of a pair first.

    Args:
        config: configuration of the classifier, with the settings that its training saved.
        where: the argument that names it, for the message.
    """
    long_texts, part = getattr(config, "long_texts", "truncate"), getattr(config, "keep", "head")
    asked = f"--long_texts {long_texts}" if long_texts != "truncate" else f"--keep_part {part}"
    if (long_texts, part) != ("truncate", "head"):
        raise InputError(
            f"{where}: was trained with {asked}, but this command reads only the first tokens of a long text; train "
            f"the classifier without {asked.split()[0]}"
        )


class Reranker(Predictor):
    """A classifier of pairs (query, passage), such as one of the classification recipe.

    Attributes:
        label: number of the class of passages that answer the query.
    """

    def __init__(self, model: str, label: str | None = None, **settings):
        """Load the classifier.

        Args:
            model: its folder, or a hub id.
            label: name of the class of passages that answer; None for the only score, or the second of two classes.
            **settings: see `Predictor`.

        Raises:
            InputError: the class is unknown, or is not named and there are more than two; or see `check_reads_heads`.
        """
        super().__init__(AutoModelForSequenceClassification, "ForSequenceClassification", model, **settings)
        check_reads_heads(self.config, f"--rerank {model}")
        names = [self.labels[i] for i in range(len(self.labels))]
        if label is not None and label not in names:
            raise InputError(f"--rerank_label {label}: {model} has the classes {', '.join(names)}; name one of them")
        if label is None and len(names) > 2:
            raise InputError(f"--rerank {model}: has {len(names)} classes; name the one that answers by --rerank_label")
        self.label = len(names) - 1 if label is None else names.index(label)

    def scores(self, queries: list[str], passages: list[str]) -> np.ndarray:
        """Return the score of each pair: the probability of the class, or the sigmoid of the only score."""
        encoded = self.tokenizer(queries, passages, truncation="longest_first", max_length=self.max_length)
        found = np.empty(len(queries))
        for batch, logits in self.logits(dict(encoded)):
            several = logits.shape[1] > 1
            probabilities = logits.softmax(-1)[:, self.label] if several else torch.sigmoid(logits[:, 0])
            found[batch] = probabilities.cpu().numpy()
        return found

    def reorder(self, queries: list[str], hits: list[list[Hit]], count: int) -> list[list[Hit]]:
        """Return the `count` best hits of each query by `scores`; equal scores keep their order."""
        pairs = [(query, hit) for query, of_query in zip(queries, hits, strict=True) for hit in of_query]
        if not pairs:
            return hits
        scores = iter(self.scores([query for query, _ in pairs], [hit.row["text"] for _, hit in pairs]).tolist())
        scored = [[Hit(hit.row, next(scores)) for hit in of_query] for of_query in hits]
        return [sorted(of_query, key=lambda hit: -hit.score)[:count] for of_query in scored]
