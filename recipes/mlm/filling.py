"""Compare how masks are filled before and after training."""

from collections.abc import Callable

import numpy as np
import regex
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.data.blocks import sentences_of
from common.data.tokens import encodings
from common.errors import printable, tell
from common.inference.filling import Filler, Fills
from common.speed import Speed

_WORD = regex.compile(r"(?:\p{L}\p{M}*){5,}")


def sentences_with_a_gap(texts: list[str], tokenizer: PreTrainedTokenizerFast, count: int = 5) -> list[tuple[str, str]]:
    """Return `count` sentences of `texts` with one masked word of a single token, and the word.

    The choice depends only on `texts`.
    """
    rng = np.random.default_rng(0)
    gaps: list[tuple[str, str]] = []
    for i in rng.permutation(len(texts)):
        sentences = [s for s in sentences_of(texts[i]) if 6 <= len(s.split()) <= 25 and len(s) <= 160]
        sentences = [s for s in sentences if tokenizer.mask_token not in s]
        if not sentences:
            continue
        sentence = sentences[rng.integers(len(sentences))]
        (encoding,) = encodings(tokenizer, [sentence])
        whole = {tuple(span) for span in encoding.offsets} | {(a + 1, b) for a, b in encoding.offsets}
        words = [m for m in _WORD.finditer(sentence) if m.span() in whole]
        if words:
            word = words[rng.integers(len(words))]
            gap = f"{sentence[: word.start()]}{tokenizer.mask_token}{sentence[word.end() :]}"
            gaps.append((gap, word.group()))
        if len(gaps) == count:
            break
    return gaps


def gap_filler(
    gaps: list[tuple[str, str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    speed: Speed,
    max_length: int,
) -> Callable[[], list[list[Fills]]]:
    """Return a function that fills the gaps of `sentences_with_a_gap` with the model as it then is."""
    fill = Filler(model, tokenizer, speed, max_length)
    return lambda: fill([text for text, _ in gaps], top=5)


def compare_fills(gaps: list[tuple[str, str]], before: list[list[Fills]], after: list[list[Fills]]) -> list[dict]:
    """Print and return the sentences with the masked word and the fills before and after training."""
    rows = []
    if gaps:
        tell("\nmost probable fills of the mask, before and after training")
    for (text, word), (old,), (new,) in zip(gaps, before, after, strict=True):
        tell(f"{printable(text)}  ({printable(word)})")
        for name, fills in (("before", old), ("after", new)):
            tell(f"  {name:7} {', '.join(printable(fill) for fill, _ in fills)}")
        rows.append({"text": text, "word": word, "before": old, "after": new})
    return rows
