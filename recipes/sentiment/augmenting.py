"""Say which texts of a row `--augment` may change."""

from common.data.augment import SpanText
from common.data.source import Row

NAMES = ("text", "text_pair")


def texts_of(row: Row) -> list[SpanText]:
    """Return the text of a row, and its second text if it has one."""
    return [SpanText(row[name]) for name in NAMES if name in row]


def with_texts(row: Row, texts: list[SpanText]) -> Row:
    """Return a row with other texts and the same labels."""
    return row | {name: text.text for name, text in zip(NAMES, texts, strict=False)}
