"""Say which texts of a row `--augment` may change."""

from collections.abc import Callable
from functools import partial

from datasets import Dataset

from common.args import TrainingArguments
from common.data.augment import AugmentedRows, SpanText
from common.data.source import Row
from common.inference import augmentation

from .arguments import SentimentDataArguments
from .windows import text_numbers

NAMES = ("text", "text_pair")


def texts_of(row: Row) -> list[SpanText]:
    """Return the text of a row, and its second text if it has one."""
    return [SpanText(row[name]) for name in NAMES if name in row]


def with_texts(row: Row, texts: list[SpanText]) -> Row:
    """Return a row with other texts and the same labels."""
    return row | {name: text.text for name, text in zip(NAMES, texts, strict=False)}


def augmented(
    windows: Dataset,
    rows: Dataset,
    encode: Callable,
    how: dict,
    data_args: SentimentDataArguments,
    args: TrainingArguments,
) -> Dataset | AugmentedRows:
    """Return the training windows, with augmented copies under `--augment`; see `common.inference.augmentation`.

    Args:
        windows: the encoded rows.
        rows: the rows before encoding.
        encode: `encode` of the recipe.
        how: its arguments besides rows.
        data_args: the arguments of augmentation.
        args: seed and output folder.
    """
    numbers, encode_one = text_numbers(windows["first_window"][:]), partial(encode, **how)
    return augmentation.augmented(windows, rows, numbers, encode_one, texts_of, with_texts, data_args, args)
