"""Convert tagged words to a text with mentions, which `--augment` changes, and back."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate

from datasets import Dataset

from common.args import TrainingArguments
from common.data.augment import AugmentedRows, SpanText
from common.data.source import Row
from common.errors import InputError
from common.inference import augmentation

from .arguments import NerDataArguments
from .schemes import Scheme
from .tagging import entity_spans

#: in the place of a space inside a word; of the private use area of Unicode
_SPACE = "\ue000"


def texts_of(row: Row) -> list[SpanText]:
    """Return the words of a row as a text with single spaces, with a span and a label for each mention."""
    words = [word.replace(" ", _SPACE) for word in row["tokens"]]
    ends = [end - 1 for end in accumulate(len(word) + 1 for word in words)]
    starts = [end - len(word) for end, word in zip(ends, words, strict=True)]
    mentions = entity_spans(row["ner_tags"])
    return [
        SpanText(
            " ".join(words),
            tuple((starts[first], ends[last - 1]) for _, first, last in mentions),
            tuple(label for label, _, _ in mentions),
            tuple(zip(starts, ends, strict=True)),
        )
    ]


def with_texts(row: Row, texts: list[SpanText]) -> Row:
    """Return a row with the words of a text, and IOB2 tags for its spans."""
    (text,) = texts
    words: list[str] = []
    tags: list[str] = []
    at = 0
    for (start, end), label in zip((*text.spans, (len(text.text),) * 2), (*text.labels, ""), strict=True):
        outside, inside = ([w for w in part.split(" ") if w] for part in (text.text[at:start], text.text[start:end]))
        words += outside + inside
        tags += ["O"] * len(outside) + [f"{'I' if i else 'B'}-{label}" for i in range(len(inside))]
        at = end
    return row | {"tokens": [word.replace(_SPACE, " ") for word in words], "ner_tags": tags}


def augmented(
    windows: Dataset,
    rows: Dataset,
    encode: Callable,
    how: dict,
    scheme: Scheme,
    data_args: NerDataArguments,
    args: TrainingArguments,
) -> Dataset | AugmentedRows:
    """Return the training windows, with augmented copies under `--augment`; see `common.inference.augmentation`.

    Args:
        windows: the encoded rows.
        rows: the rows before encoding.
        encode: `encode` of the recipe.
        how: its arguments besides rows and indices.
        scheme: scheme of the tags.
        data_args: the arguments of augmentation.
        args: seed and output folder.

    Raises:
        InputError: each word has a tag of its own.
    """
    if data_args.augment is not None and scheme.name == "none":
        raise InputError(
            f"--augment {data_args.augment}: the tags are of single words (--tag_scheme none), which no augmentation "
            "carries; leave it out"
        )
    encode_one = partial(encode, indices=[0], **how)
    sentences = windows["sentence"][:]
    return augmentation.augmented(windows, rows, sentences, encode_one, texts_of, with_texts, data_args, args)
