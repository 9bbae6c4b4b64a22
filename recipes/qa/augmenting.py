"""Say what `--augment` may change of a row: the context outside its answers."""

from collections.abc import Callable
from functools import partial

from datasets import Dataset

from common.args import TrainingArguments
from common.data.augment import AugmentedRows, SpanText
from common.data.source import Row
from common.inference import augmentation

from .arguments import QaDataArguments


def texts_of(row: Row) -> list[SpanText]:
    """Return the context of a row, with a span for each answer. The question stays as it is."""
    answers = row["answers"]
    pairs = zip(answers["answer_start"], answers["text"], strict=True)
    return [SpanText(row["context"], tuple((start, start + len(text)) for start, text in pairs))]


def with_texts(row: Row, texts: list[SpanText]) -> Row:
    """Return a row with another context, and the answers at their new places."""
    (context,) = texts
    answers = {
        "text": [context.text[start:end] for start, end in context.spans],
        "answer_start": [start for start, _ in context.spans],
    }
    return row | {"context": context.text, "answers": answers}


def augmented(
    windows: Dataset, rows: Dataset, encode: Callable, how: dict, data_args: QaDataArguments, args: TrainingArguments
) -> Dataset | AugmentedRows:
    """Return the training windows, with augmented copies under `--augment`; see `common.inference.augmentation`.

    Args:
        windows: the encoded rows.
        rows: the rows before encoding.
        encode: `encode` of the recipe.
        how: its arguments besides rows and indices.
        data_args: the arguments of augmentation.
        args: seed and output folder.
    """
    encode_one = partial(encode, indices=[0], **how)
    return augmentation.augmented(windows, rows, windows["row"][:], encode_one, texts_of, with_texts, data_args, args)
