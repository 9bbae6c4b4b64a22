"""Extract summaries: score each sentence in a window of whole sentences, and select the best.

A sentence's score is one linear layer on the mean of its token vectors. As the layer is linear, that equals the mean
of the token scores. The model is therefore a token classifier with one label, of any family with this head. BERTSum
(Liu and Lapata 2019, https://aclanthology.org/D19-1387) uses a [CLS] token for each sentence instead of the mean.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.domains import carry
from common.data.mapping import Splits
from common.data.tokens import encode_parts, ends_of
from common.models.decoding import padded
from common.models.room import room_of

from .articles import units
from .scoring import Rouge, extract, oracle

LABEL = "IN_SUMMARY"
#: prefix of later windows, which tells the model that the document does not start here
CONTINUES = "..."


def marked(data: DatasetDict, rouge: Rouge) -> DatasetDict:
    """Return the sentences of each document (`parts`), and the sentence numbers of the greedy oracle (`oracle`)."""
    splits = {}
    for name, rows in data.items():
        parts = [units(text) for text in rows["document"]]
        chosen = [oracle(p, r, rouge) for p, r in zip(parts, rows["references"], strict=True)]
        splits[name] = Dataset.from_dict(carry({"parts": parts, "oracle": chosen}, rows[:]))
    return Splits(splits)


def encode_windows(
    rows: dict[str, list], indices: list[int], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> dict[str, list]:
    """Encode documents as windows.

    Args:
        rows: columns `parts` (sentences) and `oracle` (numbers of the sentences in the oracle summary).
        indices: row numbers of the documents.
        tokenizer: the tokenizer.
        max_length: maximum number of tokens in a window, with special tokens.

    Returns:
        One row for each window. `input_ids`: tokens. `labels`: start, end (exclusive) and oracle label (0 or 1) of each
        scored sentence. `sentences`: numbers of these sentences. `row`: number of the document.
    """
    windows: dict[str, list] = {"input_ids": [], "labels": [], "sentences": [], "row": []}
    before, after = ends_of(tokenizer)
    mark = tokenizer(CONTINUES, add_special_tokens=False)["input_ids"]
    room = room_of(tokenizer, max_length, least=len(mark) + 1, argument="max_source_length")
    encoded = encode_parts(tokenizer, rows["parts"])
    for row, parts, chosen in zip(indices, encoded, rows["oracle"], strict=True):
        for ids, spans, numbers in cut(parts, room, mark):
            labels = [
                [start + len(before), end + len(before), int(number in chosen)]
                for (start, end), number in zip(spans, numbers, strict=True)
            ]
            windows["input_ids"].append(before + ids + after)
            windows["labels"].append(labels)
            windows["sentences"].append(numbers)
            windows["row"].append(row)
    return carry(windows, rows, np.searchsorted(indices, windows["row"]).tolist())


def cut(parts: list[list[int]], room: int, mark: list[int]) -> list[tuple[list[int], list[tuple[int, int]], list[int]]]:
    """Divide sentences (lists of tokens) into windows of at most `room` tokens.

    Every window but the first starts with `mark` and with preceding sentences as context, up to a quarter of `room`.
    A sentence that is too long for a window is divided over several windows. Each token is scored in one window.

    Returns:
        For each window: its tokens, the spans of its scored sentences, and the numbers of these sentences.
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
    """Collate windows: padded `input_ids` and `attention_mask`, and `labels` of shape (windows, sentences, 3)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, multiple: int = 8):
        self.pad, self.multiple = tokenizer.pad_token_id, multiple

    def __call__(self, rows: list[dict[str, list]]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        most = max(1, *(len(row["labels"]) for row in rows))
        labels = [row["labels"] + [[-100] * 3] * (most - len(row["labels"])) for row in rows]
        mask = padded([[1] * len(row) for row in ids], 0, self.multiple)
        return {
            "input_ids": padded(ids, self.pad, self.multiple),
            "attention_mask": mask,
            "labels": torch.tensor(labels),
        }


def sentence_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Average token scores (windows, length, 1) over sentences; returns shape (windows, sentences)."""
    positions = torch.arange(logits.shape[1], device=logits.device)
    inside = (positions >= labels[..., :1]) & (positions < labels[..., 1:2])
    return ((inside.float() @ logits.float()) / inside.sum(-1, keepdim=True).clamp(min=1)).squeeze(-1)


def sentence_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the binary cross-entropy of each sentence, repeated three times to match the shape of `labels`."""
    targets = labels[..., 2].float() * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(sentence_logits(logits, labels), targets, reduction="none")
    return losses[..., None].expand(labels.shape).masked_fill(labels == -100, 0.0)


def document_scores(
    window_scores: Sequence[np.ndarray], windows: Dataset | dict, sizes: Sequence[int]
) -> list[np.ndarray]:
    """Return the scores of all sentences of each document.

    A sentence in several windows gets the mean over its tokens. A sentence without tokens gets minus infinity.

    Args:
        window_scores: scores of the sentences in each window.
        windows: the windows from `encode_windows`.
        sizes: number of sentences in each document.
    """
    totals, counts = ([np.zeros(size) for size in sizes] for _ in range(2))
    for of_window, row, numbers, labels in zip(
        window_scores, windows["row"], windows["sentences"], windows["labels"], strict=True
    ):
        for score, number, (start, end, _) in zip(of_window, numbers, labels, strict=False):
            totals[row][number] += score * (end - start)
            counts[row][number] += end - start
    return [np.where(c > 0, t / np.maximum(c, 1), -np.inf) for t, c in zip(totals, counts, strict=True)]


def best_sentences(scores: np.ndarray, count: int) -> list[int]:
    """Return the numbers of the `count` best sentences, in document order."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


class Picker:
    """Select summary sentences from the scores of the `windows` of `documents`."""

    def __init__(self, documents: list[str], windows: Dataset):
        self.documents = documents
        self.windows = {name: windows[name][:] for name in ("row", "sentences", "labels")}
        self.sizes = [len(units(text)) for text in documents]

    def sentences(self, window_scores: Sequence[np.ndarray], count: int) -> list[list[int]]:
        """Return the numbers of the `count` best sentences of each document."""
        return [best_sentences(scores, count) for scores in document_scores(window_scores, self.windows, self.sizes)]

    def summaries(self, window_scores: Sequence[np.ndarray], count: int) -> list[str]:
        """Return the summary of each document, with `count` sentences."""
        return [extract(*pair) for pair in zip(self.documents, self.sentences(window_scores, count), strict=True)]
