"""Read long texts in overlapping windows, and pool the predictions of the windows of a text."""

import numpy as np
import torch
from datasets import DatasetDict
from scipy.special import expit, softmax
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from common import training
from common.data.domains import carry
from common.errors import tell, warn
from common.models.room import room_of

from .texts import cut, encoded, inputs_of, part_of


def read(
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    pairs: list[str] | None,
    max_seq_length: int,
    keep: str = "head",
    long_texts: str = "truncate",
    doc_stride: int | None = None,
) -> dict[str, list]:
    """Encode texts or text pairs: one row a text, or under `long_texts` "windows" one row a window.

    Returns:
        The columns of the model's inputs; `cut`: whether a part of the text is in no row; `first_window`: whether the
        row is the first one of its text.
    """
    if long_texts == "windows":
        return cut_windows(tokenizer, texts, pairs, max_seq_length, doc_stride)
    return cut(tokenizer, texts, pairs, max_seq_length, keep) | {"first_window": [True] * len(texts)}


def cut_windows(
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    pairs: list[str] | None,
    max_seq_length: int,
    doc_stride: int | None,
) -> dict[str, list]:
    """Encode each text or pair in windows of at most `max_seq_length` tokens, special tokens included.

    Neighbouring windows share `doc_stride` tokens (None: a quarter of `max_seq_length`), but at most half of a window.
    Of a pair, the longer text is read in windows. Each window also has the other text, of which the head is read if it
    is longer than half of the tokens.

    Returns:
        The columns of `read`.
    """
    pair = pairs is not None
    room = room_of(tokenizer, max_seq_length, pair=pair, least=1 + pair)
    stride = max_seq_length // 4 if doc_stride is None else doc_stride
    rows: list[Encoding] = []
    flags: dict[str, list[bool]] = {"cut": [], "first_window": []}
    for one, other in encoded(tokenizer, texts, pairs):
        is_cut = False
        if other is None:
            windows = [(part, None) for part in _windows(one, room, stride)]
        else:
            short, long = sorted((one, other), key=len)
            is_cut = len(short) > room // 2 and len(short) + len(long) > room
            short = part_of(short, room // 2, "head") if is_cut else short
            parts = _windows(long, room - len(short), stride)
            windows = [(short, part) if long is other else (part, short) for part in parts]
        rows += [tokenizer.backend_tokenizer.post_process(*window) for window in windows]
        flags["cut"] += [is_cut] * len(windows)
        flags["first_window"] += [True] + [False] * (len(windows) - 1)
    return inputs_of(tokenizer, rows) | flags


def _windows(encoding: Encoding, size: int, stride: int) -> list[Encoding]:
    """Cut an encoding into windows of `size` tokens; the last window may be shorter."""
    encoding.truncate(size, stride=min(stride, size // 2))
    return [encoding, *encoding.overflowing]


def text_numbers(first_window: list[bool]) -> list[int]:
    """Return the number of the text of each row."""
    return (np.cumsum(first_window) - 1).tolist()


def with_domain(columns: dict[str, list], rows: dict[str, list]) -> dict[str, list]:
    """Add the domains of texts to their encoded `columns`, if `rows` has them."""
    return carry(columns, rows, text_numbers(columns["first_window"]))


def report_long(rows: DatasetDict, max_seq_length: int, keep: str, long_texts: str, doc_stride: int | None) -> None:
    """Print how many texts exceed `max_seq_length` tokens, and how they are read."""
    first = np.concatenate([split["first_window"][:] for split in rows.values()])
    shortened = np.concatenate([split["cut"][:] for split in rows.values()])[first].sum()
    several = np.count_nonzero(np.bincount(text_numbers(first)) > 1)
    of_all = f"of {first.sum():,} texts exceed --max_seq_length {max_seq_length}"
    if several:
        tell(f"{several:,} {of_all} and are read in windows: {len(first):,} windows in all")
    if shortened and long_texts == "windows":
        warn(f"{shortened:,} of {first.sum():,} pairs have two long texts: of the shorter one, only the head is read")
    elif shortened:
        warn(f"{shortened:,} {of_all}: only their {keep} is read; --long_texts windows reads all")


def pool(logits: np.ndarray, first_window: list[bool], multi_label: bool) -> np.ndarray:
    """Return logits of each text whose probabilities are the means over the windows of the text.

    The mean of the predictions of all segments is the baseline of Pappagari et al. 2019
    (https://arxiv.org/abs/1910.10781).

    Args:
        logits: scores of each window, (windows, classes).
        first_window: whether a window is the first one of its text.
        multi_label: whether the probability of a class is a sigmoid instead of the softmax over the classes.

    Returns:
        Scores (texts, classes); those of a text with one window are unchanged.
    """
    starts = np.flatnonzero(first_window)
    sizes = np.diff([*starts, len(logits)])[:, None]
    scores = logits.astype(np.float64)
    if multi_label:
        yes, no = (np.add.reduceat(expit(sign * scores), starts) / sizes for sign in (1, -1))
        pooled = np.log(yes) - np.log(no)
    else:
        pooled = np.log(np.add.reduceat(softmax(scores, axis=-1), starts) / sizes)
    return np.where(sizes > 1, pooled, scores[starts]).astype(logits.dtype)


class Trainer(training.Trainer):
    """Train on each window with the label of its text; evaluate and predict one result a text.

    `eval_loss` is the loss of the pooled predictions. Evaluation sets have a column `first_window` (see `read`).
    """

    def __init__(self, *args, multi_label: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.multi_label = multi_label

    def rows_of(self, predictions: list, labels: list | None) -> tuple:
        """Return predictions, labels and mean loss as the parent does, for texts instead of windows."""
        logits, labels, loss = super().rows_of(predictions, labels)
        first = self._evaluated["first_window"][:]
        if all(first):
            return logits, labels, loss
        logits = list(pool(np.stack(logits), first, self.multi_label))
        if labels is None:
            return logits, None, None
        labels = [label for label, is_first in zip(labels, first, strict=True) if is_first]
        gold = torch.tensor(np.stack(labels))
        losses = self.losses["labels"](torch.tensor(np.stack(logits)), gold, self.args.label_smoothing_factor)
        return logits, labels, float(losses.sum() / (gold != -100).sum())
