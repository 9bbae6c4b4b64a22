"""Pack texts into rows of tokens for pretraining."""

import re
from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.corpus import CorpusArguments, check_left
from common.data.domains import groups_of, with_groups
from common.data.mapping import map_rows
from common.data.source import Row
from common.data.tokens import encodings, ends_of
from common.errors import tell

#: tokens of the shortest text, and of the shortest piece of a split text, that is trained on
SHORTEST_TEXT, SHORTEST_PIECE = 3, 8

BLOCKS = Features({"input_ids": List(Value("int32")), "marks": List(Value("int8")), "lengths": List(Value("int32"))})

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")

#: a recipe's function that returns a small integer for each token of a text; 0 is reserved for special tokens
Marks = Callable[[str, Encoding], list[int]]
Marked = tuple[list[int], list[int]]  # tokens of a text, and their marks


def sentences_of(text: str) -> list[str]:
    """Split `text` into sentences at final punctuation and blank lines; whitespace becomes single spaces."""
    return [" ".join(part.split()) for part in _SENTENCE.split(text) if part.strip()]


def blocks_of(
    texts: Iterable[Marked],
    ends: tuple[list[int], list[int]],
    length: int,
    pack: bool,
    whole: bool = False,
) -> Iterator[Row]:
    """Yield rows of at most `length` tokens.

    A text that does not fit into a row is split into pieces. Each piece gets the special tokens `ends`.

    Args:
        texts: tokens and marks of each text.
        ends: special tokens before and after each piece.
        length: most tokens of a row.
        pack: fill a row with several texts; otherwise each text starts a row.
        whole: with `pack`, move a text that does not fit to the next row instead of splitting it.

    Yields:
        Rows with `input_ids`, `marks` (0 at special tokens) and `lengths` (tokens of each piece).
    """
    row = yield from fill_rows(texts, ends, length, pack, whole, row=empty_row())
    if row["lengths"]:
        yield row


def fill_rows(
    texts: Iterable[Marked],
    ends: tuple[list[int], list[int]],
    length: int,
    pack: bool,
    whole: bool = False,
    *,
    row: Row,
) -> Generator[Row, None, Row]:
    """Yield rows as `blocks_of` does, continuing with the unfinished `row`. Return the last, unfinished row."""
    before, after = ends
    extra = len(before) + len(after)
    for ids, marks in texts:
        at = 0
        while at < len(ids):
            room = length - len(row["input_ids"]) - extra
            rest = len(ids) - at - room
            if 0 < rest < SHORTEST_PIECE:  # avoid a short rest, which would be useless as a piece
                room -= SHORTEST_PIECE - rest
            if rest > 0 and row["lengths"] and (whole or room < SHORTEST_PIECE):
                yield row
                row = empty_row()
                continue
            piece, piece_marks = ids[at : at + room], marks[at : at + room]
            row["input_ids"] += [*before, *piece, *after]
            row["marks"] += [0] * len(before) + piece_marks + [0] * len(after)
            row["lengths"].append(len(piece) + extra)
            at += room
            if not pack:
                yield row
                row = empty_row()
    return row


def empty_row() -> Row:
    """Return a row of `blocks_of` without tokens."""
    return {"input_ids": [], "marks": [], "lengths": []}


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, marks: Marks) -> list[Marked]:
    """Return the tokens of each text, without special tokens, and their marks from `marks(text, encoding)`."""
    encoded = encodings(tokenizer, texts)
    return [(encoding.ids, marks(text, encoding)) for text, encoding in zip(texts, encoded, strict=True)]


def to_blocks(
    data: DatasetDict, tokenizer: PreTrainedTokenizerFast, args: CorpusArguments, marks: Marks
) -> DatasetDict:
    """Tokenize the texts of each split and pack them into rows as `blocks_of` does."""
    return rows_of(data, lambda texts: encode(texts["text"], tokenizer, marks), ends_of(tokenizer), args)


def rows_of(
    data: DatasetDict,
    encoded: Callable[[dict[str, list]], list[Marked]],
    ends: tuple[list[int], list[int]],
    args: CorpusArguments,
    least: int = SHORTEST_TEXT,
    whole: bool = False,
) -> DatasetDict:
    """Pack each split into rows as `blocks_of` does, and print how many texts were too short.

    A row has texts of one domain, and either new or old texts.

    Args:
        data: the splits.
        encoded: turns a batch of their rows into tokens and marks of texts.
        ends: special tokens before and after each piece.
        args: length and packing of rows.
        least: fewest tokens of a text; shorter texts are dropped.
        whole: see `blocks_of`.

    Returns:
        The splits, with the columns of `blocks_of`; `row`, the number of the row; and columns `domain` and `old` of the
        texts.

    Raises:
        InputError: all texts of a split are too short.
    """
    features = Features(BLOCKS | {"texts": Value("int64")})

    def rows(batch: dict[str, list]) -> dict[str, list]:
        texts = [pair for pair in encoded(batch) if len(pair[0]) >= least]
        filled = list(blocks_of(texts, ends, args.max_seq_length, args.pack, whole))
        columns = {name: [row[name] for row in filled] for name in BLOCKS}
        # the first row of a batch holds the number of its texts: the sum of the column counts all texts
        return columns | {"texts": [len(texts)] + [0] * (len(filled) - 1) if filled else []}

    def packed(texts: Dataset) -> Dataset:
        return map_rows(texts, rows, batched=True, remove_columns=texts.column_names, features=features)

    blocks = {}
    for split, texts in data.items():
        groups = groups_of(texts)
        made = [(values, packed(some)) for values, some in groups]
        check_left(groups, made, split, f"every text has fewer than {least} tokens; give longer texts")
        joined = with_groups(made)
        short = len(texts) - sum(joined["texts"])
        if short:
            tell(f"{split}: dropped {short} of {len(texts)} texts with fewer than {least} tokens")
        joined = joined.remove_columns("texts").add_column("row", np.arange(len(joined)))
        blocks[split] = joined.with_format("numpy")
    return DatasetDict(blocks)


def pieces(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Split the values of a row, one for each token, into its pieces.

    Args:
        values: array of shape (tokens,).
        lengths: tokens of each piece, of shape (pieces,).
    """
    return np.split(values, np.cumsum(lengths)[:-1])


def padded(rows: list[np.ndarray], longest: int, value: int) -> Tensor:
    """Pad rows with `value` to a tensor of shape (rows, longest)."""
    filled = np.full((len(rows), longest), value, dtype=np.int64)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return torch.from_numpy(filled)
