"""Augment texts without breaking labels: character spans are protected or moved exactly.

`augment_text` is the plain function. `common.inference.augmentation` has the arguments of recipes and the training set
that makes augmented copies while rows are fetched.
"""

from typing import Literal

import numpy as np

from common.data.augment.arguments import AugmentedDataArguments
from common.data.augment.mentions import mentions_of, replace_mentions
from common.data.augment.pieces import Pieces, SpanText
from common.data.augment.rows import AugmentedRows
from common.data.augment.words import eda, synonym

#: default share of the words that change, and probability that a mention is replaced
WORDS_CHANGED, MENTIONS_CHANGED = 0.1, 0.5
_KINDS = {"synonym": synonym, "eda": eda}


def augment_text(
    text: str, kind: Literal["synonym", "eda"], rng: np.random.Generator, share: float = WORDS_CHANGED
) -> str:
    """Return an augmented copy of a text.

    Args:
        text: the text.
        kind: `synonym` is weak: it keeps order and length. `eda` is stronger, the more so with a larger share.
        rng: source of random numbers; the result depends only on it and the other arguments.
        share: share of the words that change, at least one.
    """
    return _KINDS[kind](SpanText(text), share, rng).text


__all__ = [
    "MENTIONS_CHANGED",
    "WORDS_CHANGED",
    "AugmentedDataArguments",
    "AugmentedRows",
    "Pieces",
    "SpanText",
    "augment_text",
    "eda",
    "mentions_of",
    "replace_mentions",
    "synonym",
]
