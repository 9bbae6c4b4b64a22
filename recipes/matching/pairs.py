"""Rows of texts as batches: encode, number equal texts, and collate."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.tokens import encodings
from common.errors import warn
from common.models.room import room_of

from .vectors import Reading


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], max_seq_length: int
) -> tuple[list[list[int]], int]:
    """Return the tokens of each text, cut to `max_seq_length`, and the number of texts that were cut."""
    room = room_of(tokenizer, max_seq_length)
    rows, cut = [], 0
    for encoding in encodings(tokenizer, texts, offsets=False):
        cut += len(encoding) > room
        encoding.truncate(room)
        rows.append(tokenizer.backend_tokenizer.post_process(encoding).ids)
    return rows, cut


def encoded_rows(
    tokenizer: PreTrainedTokenizerFast, rows: list[list[str]], labels: Sequence[float], max_seq_length: int
) -> Dataset:
    """Return a data set of rows with one or several texts, and print how many texts were cut.

    Its columns: `input_ids` has the tokens of all texts of a row, one after the other; `lengths` the tokens of each
    text; `labels` a number.
    """
    distinct = list(dict.fromkeys(text for texts in rows for text in texts))
    tokens, cut = encode_texts(tokenizer, distinct, max_seq_length)
    ids = dict(zip(distinct, tokens, strict=True))
    columns = {
        "input_ids": [[token for text in texts for token in ids[text]] for texts in rows],
        "lengths": [[len(ids[text]) for text in texts] for texts in rows],
        "labels": list(labels),
    }
    if cut:
        warn(f"{cut:,} of {len(distinct):,} texts exceed --max_seq_length {max_seq_length}: only their head is read")
    return Dataset.from_dict(columns)


def training_rows(
    tokenizer: PreTrainedTokenizerFast, rows: Dataset, kind: str, reading: Reading, max_seq_length: int
) -> Dataset:
    """Return the training rows as `encoded_rows`.

    `labels` is the number of a row of queries or of a translation, or the gold value of a pair.
    """
    if kind == "ranking":
        texts = [
            [reading.query_prefix + query, *(reading.passage_prefix + text for text in (positive, *negatives))]
            for query, positive, negatives in zip(
                rows["query"][:], rows["positive"][:], rows["negatives"][:], strict=True
            )
        ]
        return encoded_rows(tokenizer, texts, range(len(rows)), max_seq_length)
    texts = [list(pair) for pair in zip(rows["text"][:], rows["text_pair"][:], strict=True)]
    labels = range(len(rows)) if kind == "translation" else rows[kind][:]
    return encoded_rows(tokenizer, texts, labels, max_seq_length)


class TextCollator:
    """Collate rows of texts: all first texts, then all second texts, then the other texts of all rows.

    The batch has `input_ids` and `attention_mask` of shape (texts, length), and `labels` of shape (rows,).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pad_multiple: int):
        self.padding, self.pad_multiple = tokenizer.pad_token_id, pad_multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        columns: list[list[list[int]]] = [[], [], []]
        for row in rows:
            ends = np.cumsum(row["lengths"]).tolist()
            texts = [row["input_ids"][end - length : end] for end, length in zip(ends, row["lengths"], strict=True)]
            for place, text in enumerate(texts):
                columns[min(place, 2)].append(text)
        texts = [text for column in columns for text in column]
        length = -(-max(map(len, texts)) // self.pad_multiple) * self.pad_multiple
        ids = torch.full((len(texts), length), self.padding)
        mask = torch.zeros((len(texts), length), dtype=torch.int64)
        for number, text in enumerate(texts):
            ids[number, : len(text)] = torch.tensor(text)
            mask[number, : len(text)] = 1
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Identities:
    """The numbers of equal texts in rows of queries and passages, and which passages answer which query.

    Attributes:
        queries: number of the query of each row, (rows,).
        positives: number of the positive passage of each row, (rows,).
    """

    def __init__(self, queries: list[str], positives: list[str], negatives: list[list[str]]):
        asked: dict[str, int] = {}
        passages: dict[str, int] = {}
        self.queries = np.array([asked.setdefault(text, len(asked)) for text in queries])
        self.positives = np.array([passages.setdefault(text, len(passages)) for text in positives])
        self.negatives = [
            np.array([passages.setdefault(text, len(passages)) for text in texts], dtype=np.int64)
            for texts in negatives
        ]
        self.count = len(passages)
        self.known = np.unique(self.queries * self.count + self.positives)

    def also_answers(self, rows: np.ndarray) -> np.ndarray:
        """Return whether a passage of a batch answers a query of the batch.

        Args:
            rows: numbers of the rows of the batch.

        Returns:
            An array of shape (rows, passages), for all positives and then the negatives of all rows.
        """
        passages = np.concatenate([self.positives[rows], *(self.negatives[row] for row in rows)])
        return np.isin(self.queries[rows][:, None] * self.count + passages, self.known)

    def duplicates(self) -> tuple[int, int]:
        """Return the number of rows whose query, and whose positive, another row above has too."""
        return tuple(len(numbers) - len(np.unique(numbers)) for numbers in (self.queries, self.positives))
