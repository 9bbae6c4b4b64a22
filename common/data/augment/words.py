"""Change the words of a text outside its spans: synonyms, and the four operations of EDA.

EDA: Wei and Zou 2019, https://arxiv.org/abs/1901.11196. One of the operations makes each copy, and changes a share of
the words (alpha in the paper), at least one: synonym replacement, random insertion of a synonym, random swap of two
words, random deletion.
"""

from collections.abc import Callable

import numpy as np

from common.data.augment.pieces import Pieces, SpanText
from common.data.augment.synonyms import synonyms_of


def replace_synonyms(pieces: Pieces, share: float, rng: np.random.Generator) -> None:
    """Replace a share of the words by a synonym, of those that have one."""
    free = pieces.free()
    found = [(i, others) for i in free if (others := synonyms_of(pieces.pieces[i].text))]
    for k in rng.permutation(len(found))[: number_of(share, len(free))]:
        i, others = found[k]
        pieces.pieces[i].text = others[rng.integers(len(others))]


def insert_synonyms(pieces: Pieces, share: float, rng: np.random.Generator) -> None:
    """Insert synonyms of words of the text at random places."""
    free = pieces.free()
    found = [others for i in free if (others := synonyms_of(pieces.pieces[i].text))]
    for _ in range(number_of(share, len(free)) if found else 0):
        others = found[rng.integers(len(found))]
        pieces.insert(int(rng.integers(len(pieces.pieces) + 1)), others[rng.integers(len(others))].lower())


def swap_words(pieces: Pieces, share: float, rng: np.random.Generator) -> None:
    """Swap two random words, for a share of the words."""
    free = pieces.free()
    for _ in range(number_of(share, len(free)) if len(free) > 1 else 0):
        a, b = (pieces.pieces[i] for i in rng.choice(free, 2, replace=False))
        a.text, b.text = b.text, a.text


def delete_words(pieces: Pieces, share: float, rng: np.random.Generator) -> None:
    """Delete a share of the words; one word or span is left."""
    free = pieces.free()
    left = 0 if any(piece.spans for piece in pieces.pieces) else 1
    most = min(number_of(share, len(free)), len(free) - left)
    for i in sorted(rng.permutation(free)[: max(most, 0)].tolist(), reverse=True):
        pieces.delete(i)


def number_of(share: float, words: int) -> int:
    """Return the number of words to change: a share of them, and at least one."""
    return max(1, round(share * words)) if words else 0


EDA = (replace_synonyms, insert_synonyms, swap_words, delete_words)


def synonym(row: SpanText, share: float, rng: np.random.Generator) -> SpanText:
    """Return a copy of a text with synonyms."""
    return _changed(row, replace_synonyms, share, rng)


def eda(row: SpanText, share: float, rng: np.random.Generator) -> SpanText:
    """Return a copy of a text that one operation of EDA has made."""
    return _changed(row, EDA[rng.integers(len(EDA))], share, rng)


def _changed(row: SpanText, operation: Callable, share: float, rng: np.random.Generator) -> SpanText:
    pieces = Pieces(row)
    operation(pieces, share, rng)
    return pieces.joined()
