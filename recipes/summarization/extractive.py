"""Summaries of a document's own sentences: windows of whole sentences, a score for each, the best ones taken.

An encoder reads a window of sentences, so that each is seen in its context; a sentence is the mean of its sub-tokens,
and one linear layer scores it (as BERTSum, Liu and Lapata 2019, https://aclanthology.org/D19-1387, which takes a
[CLS] before each sentence where this takes the mean). As the layer is linear, that is the mean of the sub-tokens'
scores, and so the model is a token classifier with one label, of any family that has such a head.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.corpus import ends_of
from common.models.decoding import padded

from .articles import units
from .scoring import Rouge, extract, oracle

LABEL = "IN_SUMMARY"
#: what begins a window that is not a document's first: else its first sentences would look like a document's
GOES_ON = "..."


def marked(data: DatasetDict, rouge: Rouge) -> DatasetDict:
    """The sentences of each document (`parts`), and the numbers of those that the greedy oracle takes (`oracle`)."""
    found = {}
    for name, rows in data.items():
        parts = [units(text) for text in rows["document"]]
        chosen = [oracle(p, r, rouge) for p, r in zip(parts, rows["references"], strict=True)]
        found[name] = Dataset.from_dict({"parts": parts, "oracle": chosen})
    return DatasetDict(found)


def encode_windows(
    rows: dict[str, list], indices: list[int], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> dict[str, list]:
    """Windows of the documents in `rows`, whose columns are `parts` (sentences) and `oracle` (numbers of sentences).

    Columns, one row a window: `input_ids`; `labels`, for each sentence that is scored in this window its first
    position, the one after its last, and 1 where it is in the oracle summary; `sentences`, the numbers of these; `row`,
    that of the document.
    """
    windows: dict[str, list] = {"input_ids": [], "labels": [], "sentences": [], "row": []}
    before, after = ends_of(tokenizer)
    mark = tokenizer(GOES_ON, add_special_tokens=False)["input_ids"]
    for row, texts, chosen in zip(indices, rows["parts"], rows["oracle"], strict=True):
        parts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        for ids, spans, numbers in cut(parts, max_length - len(before) - len(after), mark):
            labels = [
                [start + len(before), end + len(before), int(number in chosen)]
                for (start, end), number in zip(spans, numbers, strict=True)
            ]
            windows["input_ids"].append(before + ids + after)
            windows["labels"].append(labels)
            windows["sentences"].append(numbers)
            windows["row"].append(row)
    return windows


def cut(parts: list[list[int]], room: int, mark: list[int]) -> list[tuple[list[int], list[tuple[int, int]], list[int]]]:
    """Sentences, as sub-tokens, to windows of at most `room` sub-tokens: these, and where which sentences stand in it.

    A window but the first begins with `mark` and, up to a quarter of its room, with the sentences before it, as context
    only. A sentence too long for a window is in several, a piece in each. Each sub-token is scored in one window.
    """
    longest = room - len(mark)
    pieces = [(n, ids[i : i + longest]) for n, ids in enumerate(parts) for i in range(0, max(1, len(ids)), longest)]
    windows, start = [], 0
    while start < len(pieces):
        ids = list(mark) if start else []
        first, left = start, room // 4
        while first > 0 and len(pieces[first - 1][1]) <= left:
            first -= 1
            left -= len(pieces[first][1])
        context = [i for _, piece in pieces[first:start] for i in piece]
        if len(ids) + len(context) + len(pieces[start][1]) <= room:
            ids += context
        spans, numbers = [], []
        while start < len(pieces) and len(ids) + len(pieces[start][1]) <= room:
            number, piece = pieces[start]
            spans.append((len(ids), len(ids) + len(piece)))
            numbers.append(number)
            ids += piece
            start += 1
        windows.append((ids, spans, numbers))
    return windows


class WindowCollator:
    """Windows to a batch, padded to the longest: `input_ids`, `attention_mask`, `labels` (windows, sentences, 3)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.pad = tokenizer.pad_token_id

    def __call__(self, rows: list[dict[str, list]]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        most = max(1, *(len(row["labels"]) for row in rows))
        labels = [row["labels"] + [[-100] * 3] * (most - len(row["labels"])) for row in rows]
        mask = padded([[1] * len(row) for row in ids], 0)
        return {"input_ids": padded(ids, self.pad), "attention_mask": mask, "labels": torch.tensor(labels)}


def sentence_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Scores of sentences, (windows, sentences), from those of sub-tokens, (windows, length, 1): their means."""
    places = torch.arange(logits.shape[1], device=logits.device)
    inside = (places >= labels[..., :1]) & (places < labels[..., 1:2])
    return ((inside.float() @ logits.float()) / inside.sum(-1, keepdim=True).clamp(min=1)).squeeze(-1)


def sentence_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of each sentence, in the shape of `labels`: once for each of its three numbers."""
    targets = labels[..., 2].float() * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(sentence_logits(logits, labels), targets, reduction="none")
    return losses[..., None].expand(labels.shape).masked_fill(labels == -100, 0.0)


def document_scores(found: Sequence[np.ndarray], windows: Dataset | dict, sizes: Sequence[int]) -> list[np.ndarray]:
    """Scores of all sentences of each document from those of its windows; `sizes` are the numbers of sentences.

    A sentence in several pieces has their mean, and one without any sub-token the lowest score of all.
    """
    totals, counts = ([np.zeros(size) for size in sizes] for _ in range(2))
    for of_window, row, numbers, labels in zip(
        found, windows["row"], windows["sentences"], windows["labels"], strict=True
    ):
        for score, number, (start, end, _) in zip(of_window, numbers, labels, strict=False):
            totals[row][number] += score * (end - start)
            counts[row][number] += end - start
    return [np.where(c > 0, t / np.maximum(c, 1), -np.inf) for t, c in zip(totals, counts, strict=True)]


def best_sentences(scores: np.ndarray, count: int) -> list[int]:
    """The numbers of the `count` best sentences, in the order of the document."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


class Picker:
    """From the scores that a model gave the `windows` of `documents` to summaries of so many sentences."""

    def __init__(self, documents: list[str], windows: Dataset):
        self.documents = documents
        self.windows = {name: windows[name][:] for name in ("row", "sentences", "labels")}
        self.sizes = [len(units(text)) for text in documents]

    def sentences(self, found: Sequence[np.ndarray], count: int) -> list[list[int]]:
        """For each document the numbers of its sentences in the summary."""
        return [best_sentences(scores, count) for scores in document_scores(found, self.windows, self.sizes)]

    def summaries(self, found: Sequence[np.ndarray], count: int) -> list[str]:
        return [extract(*pair) for pair in zip(self.documents, self.sentences(found, count), strict=True)]
