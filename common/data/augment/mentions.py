"""Replace mentions by other mentions with the same label from the training rows.

Mention replacement of Dai and Adel 2020, https://arxiv.org/abs/2010.11683.
"""

from collections.abc import Iterable

import numpy as np

from common.data.augment.pieces import Pieces, SpanText


def mentions_of(rows: Iterable[SpanText]) -> dict[str, list[str]]:
    """Return label -> the different mentions with this label, in the order of the rows."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for label, (start, end) in zip(row.labels, row.spans, strict=True):
            found.setdefault(label, {})[row.text[start:end]] = None
    return {label: list(texts) for label, texts in found.items()}


def replace_mentions(row: SpanText, mentions: dict[str, list[str]], share: float, rng: np.random.Generator) -> SpanText:
    """Return a copy of a text in which each mention is replaced with probability `share`, and at least one.

    Spans that overlap another span stay as they are.

    Args:
        row: the text, with a label for each span.
        mentions: label -> mentions to draw from.
        share: probability that a mention is replaced.
        rng: source of random numbers.
    """
    pieces = Pieces(row)
    alone = [piece for piece in pieces.pieces if len(piece.spans) == 1]
    drawn = rng.random(len(alone)) < share
    if alone and not drawn.any():
        drawn[rng.integers(len(alone))] = True
    for piece, is_drawn in zip(alone, drawn, strict=True):
        number, *_ = piece.spans[0]
        others = [text for text in mentions.get(row.labels[number], ()) if text != piece.text]
        if is_drawn and others:
            piece.text = others[rng.integers(len(others))]
            piece.spans = [(number, 0, len(piece.text))]
    return pieces.joined()
