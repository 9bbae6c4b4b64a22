"""Cut long texts, and weight the classes in the loss."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.data.tokens import encodings
from common.errors import InputError
from common.models.room import room_of
from common.training import label_losses


def one_hot(labels: list[str], label2id: dict[str, int]) -> list[float]:
    """Return a 0 or 1 for each class."""
    row = [0.0] * len(label2id)
    for label in labels:
        row[label2id[label]] = 1.0
    return row


def cut(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], pairs: list[str] | None, max_seq_length: int, keep: str
) -> dict[str, list]:
    """Encode texts or text pairs in at most `max_seq_length` tokens.

    `keep` selects the part of a long text to read: head, tail, or half of each (head+tail; best for reviews in Sun et
    al. 2019, https://arxiv.org/abs/1905.05583). In a pair, the longer text is cut first.

    Returns:
        The columns of the model's inputs, and `cut`: whether the row was cut.
    """
    pair = pairs is not None
    room = room_of(tokenizer, max_seq_length, pair=pair, least=1 + pair)
    rows: list[Encoding] = []
    is_cut = []
    for one, other in encoded(tokenizer, texts, pairs):
        lengths = [len(one), len(other) if other else 0]
        is_cut.append(sum(lengths) > room)
        if sum(lengths) > room:
            short = min(min(lengths), room // 2)  # 0 for a single text
            kept = [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]
            one = part_of(one, kept[0], keep)
            other = part_of(other, kept[1], keep) if other else None
        rows.append(tokenizer.backend_tokenizer.post_process(one, other))
    return inputs_of(tokenizer, rows) | {"cut": is_cut}


def encoded(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], pairs: list[str] | None
) -> Iterator[tuple[Encoding, Encoding | None]]:
    """Yield the whole encodings of each text and its second text, without special tokens."""
    first = encodings(tokenizer, texts, offsets=False)
    second = encodings(tokenizer, pairs, offsets=False) if pairs else [None] * len(texts)
    yield from zip(first, second, strict=True)


def inputs_of(tokenizer: PreTrainedTokenizerFast, rows: list[Encoding]) -> dict[str, list]:
    """Return the columns of the model's inputs from the encodings of `rows`."""
    columns = {
        "input_ids": [row.ids for row in rows],
        "token_type_ids": [row.type_ids for row in rows],
        "attention_mask": [row.attention_mask for row in rows],
    }
    return {name: values for name, values in columns.items() if name in tokenizer.model_input_names}


def part_of(encoding: Encoding, size: int, keep: str) -> Encoding:
    """Keep `size` tokens of an encoding: the head, the tail, or half of each."""
    if len(encoding) <= size:
        return encoding
    head = size if keep == "head" else (size + 1) // 2 if keep == "head+tail" else 0
    parts = []
    for length, side in ((head, "right"), (size - head, "left")):
        if length:
            part = Encoding.merge([encoding], growing_offsets=False)  # a copy: truncate changes the encoding in place
            part.truncate(length, direction=side)
            parts.append(part)
    return Encoding.merge(parts, growing_offsets=False)


def class_weights(given: list[str] | None, labels: list, names: list[str], multi_label: bool) -> Tensor | None:
    """Return the weight of each class in the loss, with mean 1 over the training rows; None for equal weights.

    Args:
        given: `["balanced"]` for weights inverse to the class frequency, or a number for each class.
        labels: labels of the training rows.
        names: names of the classes.
        multi_label: whether rows have several labels.

    Raises:
        InputError: the weights are not numbers of at least 0, or not one per class.
    """
    if given is None:
        return None
    counts = np.sum(labels, axis=0) if multi_label else np.bincount(labels, minlength=len(names))
    if given == ["balanced"]:
        weights = np.where(counts > 0, counts.sum() / np.maximum(counts, 1), 0.0)
    else:
        try:
            weights = np.array([float(weight) for weight in given])
        except ValueError:
            raise InputError(f"--class_weights {' '.join(given)}: must be balanced or numbers") from None
        if len(weights) != len(names) or (weights < 0).any() or not weights.any():
            raise InputError(
                f"--class_weights: {len(weights)} weights; needed: a number of at least 0 for each of the {len(names)} "
                f"classes, in this order: {', '.join(names)}"
            )
    return torch.tensor(weights / (weights * counts).sum() * counts.sum(), dtype=torch.float32)


def loss_with(weights: Tensor | None, multi_label: bool) -> Callable[..., Tensor]:
    """Return the loss: cross-entropy, or for multi-label rows the binary cross-entropy of each class."""
    return partial(_binary_losses if multi_label else _class_losses, weights=weights)


def _class_losses(logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None) -> Tensor:
    losses = label_losses(logits, labels, label_smoothing)
    return losses if weights is None else losses * weights.to(losses.device)[labels.clamp(min=0)]


def _binary_losses(logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None) -> Tensor:
    target = labels * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    losses = losses.masked_fill(labels == -100, 0)
    return losses if weights is None else losses * torch.where(labels > 0, weights.to(losses.device), 1.0)
