"""Windows over contexts, answers as positions in them, and the best spans of characters from a model's scores."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import regex
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from common.errors import tell, warn

#: starts and ends of a window that leave the device
CANDIDATES = 20
#: position whose scores stand for "no answer": the first, in most models the classification token
NULL = 0
NOT_POSSIBLE = float("-inf")


def cut_windows(
    questions: list[str],
    contexts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    doc_stride: int,
    max_question_length: int,
) -> dict[str, list]:
    """Encode question and context together, long contexts in windows that overlap by `doc_stride` sub-tokens.

    As in Devlin et al. 2019, https://arxiv.org/abs/1810.04805. A question keeps its first `max_question_length`
    sub-tokens. Returns the columns of the tokenizer, one row a window, windows of a context one after the other, and

        row               index of the question
        begin             position in `input_ids` of the first sub-token of the context
        starts, ends      first character, and the one after the last, of each sub-token of the context in this window:
                          whole graphemes, so that an accent which the tokenizer drops stays with its letter
        question_cut      whether the question lost its end
    """
    questions, cut = _cut_questions(questions, tokenizer, max_question_length)
    encoded = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=max_seq_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    columns: dict[str, list] = {
        name: encoded[name] for name in encoded if name not in ("overflow_to_sample_mapping", "offset_mapping")
    }
    columns |= {"row": encoded["overflow_to_sample_mapping"], "begin": [], "starts": [], "ends": []}
    whole = None
    for window, row in enumerate(columns["row"]):
        if window == 0 or row != columns["row"][window - 1]:
            whole = _graphemes(contexts[row])
        in_context = [i for i, part in enumerate(encoded.sequence_ids(window)) if part == 1]
        begin, end = (in_context[0], in_context[-1] + 1) if in_context else (1, 1)
        offsets = np.array(encoded["offset_mapping"][window][begin:end], dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets.T if whole is None else (whole[0][offsets[:, 0]], whole[1][offsets[:, 1]])
        columns["begin"].append(begin)
        columns["starts"].append(starts.tolist())
        columns["ends"].append(ends.tolist())
    columns["question_cut"] = [cut[row] for row in columns["row"]]
    return columns


def _cut_questions(questions: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[list, list[bool]]:
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cut = [len(spans) > length for spans in offsets]
    return [q[: spans[length - 1][1]] if c else q for q, spans, c in zip(questions, offsets, cut, strict=True)], cut


def _graphemes(text: str) -> tuple[np.ndarray, np.ndarray] | None:
    """For each character offset where its grapheme begins, and, as an end, where the last one before it ends."""
    if text.isascii():
        return None
    begins = np.array([match.start() for match in regex.finditer(r"\X", text)] + [len(text)])
    at = np.arange(len(text) + 1)
    return begins[np.searchsorted(begins, at, "right") - 1], begins[np.searchsorted(begins, at, "left")]


def positions(
    starts: list[int], ends: list[int], start: int, end: int, first: bool, last: bool
) -> tuple[int, int] | None:
    """Which of a window's context sub-tokens hold the first and the last of the characters from `start` to `end`.

    None where the window does not hold them all. `first` and `last` say whether the window is that of its context.
    """
    if not starts or (start < starts[0] and not first) or (end > ends[-1] and not last):
        return None
    i, j = bisect_right(ends, start), bisect_left(starts, end) - 1
    return (i, j) if i <= j else None


def trimmed(context: str, start: int, end: int) -> tuple[int, int]:
    """The span without the blanks at its ends, which some tokenizers count to their sub-tokens."""
    text = context[start:end]
    return end - len(text.lstrip()) if text.strip() else start, start + len(text.rstrip())


def label_windows(windows: dict[str, list], answers: list[dict], indices: list[int]) -> dict[str, list]:
    """Add `labels`, `lost` and `row` to windows of `cut_windows`.

    `labels` are the positions of the first and the last token of the first answer: `NULL` twice in a window that does
    not hold it, and -100 twice if no window of the context holds it as a whole, which makes the row `lost`. `row` is
    the number of the question among `indices`.
    """
    labels, answered, of = [], set(), windows["row"]
    context = (windows[name] for name in ("begin", "starts", "ends"))
    for i, (row, begin, starts, ends) in enumerate(zip(of, *context, strict=True)):
        labels.append([NULL, NULL])
        if answers[row]["text"]:
            start = answers[row]["answer_start"][0]
            end = start + len(answers[row]["text"][0])
            first, last = i == 0 or of[i - 1] != row, i + 1 == len(of) or of[i + 1] != row
            found = positions(starts, ends, start, end, first, last)
            if found is not None:
                labels[-1] = [begin + position for position in found]
                answered.add(row)
    windows["lost"] = [bool(answers[row]["text"]) and row not in answered for row in of]
    windows["labels"] = [[-100, -100] if lost else own for own, lost in zip(labels, windows["lost"], strict=True)]
    windows["row"] = [indices[row] for row in of]
    return windows


@dataclass
class SpanCollator:
    """Batches of windows, padded to the longest, with `labels` (windows, 2) and a `context_mask` (windows, length).

    The mask is True where an answer may begin or end: on the context, and at `NULL`, which says that there is none.
    """

    tokenizer: PreTrainedTokenizerFast
    pad_to_multiple_of: int = 8

    def __call__(self, windows: list[dict[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in self.tokenizer.model_input_names if name in windows[0]]
        batch = self.tokenizer.pad(
            [{name: window[name] for name in names} for window in windows],
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
        )
        batch["context_mask"] = context_mask(
            [window["begin"] for window in windows],
            [len(window["starts"]) for window in windows],
            batch["input_ids"].shape[1],
        )
        batch["labels"] = torch.tensor([window["labels"] for window in windows])
        return dict(batch)


def print_limits(windows: Dataset, rows: int) -> None:
    """Say how many windows the training rows make, and what the limits on lengths left out."""
    columns = windows.select_columns(["row", "question_cut", "lost"]).with_format("numpy")[:]
    cut, lost = (len(np.unique(columns["row"][columns[name]])) for name in ("question_cut", "lost"))
    tell(f"training: {rows} questions in {len(windows)} windows")
    if cut:
        warn(f"{cut} questions are longer than --max_question_length, so their ends are not read")
    if lost:
        warn(f"{lost} answers lie in no window as a whole and are not learned; raise --doc_stride or --max_seq_length")


def context_mask(begins: list[int], sizes: list[int], length: int) -> Tensor:
    """True at the context and at `NULL`; shape (windows, length)."""
    at, begin = torch.arange(length), torch.tensor(begins)[:, None]
    return (at == NULL) | ((at >= begin) & (at < begin + torch.tensor(sizes)[:, None]))


def answer_in_context(model: nn.Module) -> None:
    """Let `model` take a `context_mask`, and set its scores to minus infinity where that is False.

    Padding then has no share in the loss, so that it does not depend on which windows make a batch; and no answer
    begins or ends in the question.
    """

    def take(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        module.context_mask = kwargs.pop("context_mask", None)
        return args, kwargs

    def hide(module: nn.Module, args: tuple, outputs: Any) -> Any:
        if module.context_mask is not None:
            for name in ("start_logits", "end_logits"):
                outputs[name] = outputs[name].float().masked_fill(~module.context_mask, NOT_POSSIBLE)
        return outputs

    model.register_forward_pre_hook(take, with_kwargs=True)
    model.register_forward_hook(hide)


def span_losses(logits: tuple[Tensor, Tensor], labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of first and last position, each of shape (windows, length) in `logits`; the shape of `labels`.

    0 where the label is -100. Label smoothing gives each possible position a share.
    """
    scores = torch.stack(logits, dim=1)
    logs = F.log_softmax(scores.float(), dim=-1)
    losses = -logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    if label_smoothing:
        possible = torch.isfinite(scores)
        mean = -logs.masked_fill(~possible, 0).sum(-1) / possible.sum(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * mean
    return losses.masked_fill(labels == -100, 0)


def best_positions(logits: tuple[Tensor, Tensor], labels: Tensor | None = None) -> Tensor:
    """What an evaluation keeps of a window: the score of "no answer", and the best starts and ends with their scores.

    From logits of (windows, length) to (windows, 1 + 4 x `CANDIDATES`), whatever the length: score of no answer,
    scores of starts, starts, scores of ends, ends.
    """
    kept = [sum(part[:, NULL] for part in logits).float()[:, None]]
    for part in logits:
        part = part.float().clone()
        part[:, NULL] = NOT_POSSIBLE
        found = part.topk(min(CANDIDATES, part.shape[1]), dim=-1)
        for values, fill in ((found.values, NOT_POSSIBLE), (found.indices.float(), 0.0)):
            kept.append(F.pad(values, (0, CANDIDATES - values.shape[1]), value=fill))
    return torch.cat(kept, dim=1)


@dataclass
class Spans:
    """The best spans of each question, the best first, as flat arrays.

    `first[i]` to `first[i + 1]` are those of question i: `start` and `end` are characters of its context, `score` the
    sum of the two logits. `null` has the score of "no answer", one a question.
    """

    start: np.ndarray
    end: np.ndarray
    score: np.ndarray
    first: np.ndarray
    null: np.ndarray

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start, end and score of the best span of each question; 0, 0 and minus infinity where there is none."""
        any_ = self.first[:-1] < self.first[1:]
        at = np.where(any_, self.first[:-1], 0)
        if not len(self.start):
            return np.zeros(len(at), int), np.zeros(len(at), int), np.full(len(at), NOT_POSSIBLE)
        return tuple(np.where(any_, x[at], e) for x, e in ((self.start, 0), (self.end, 0), (self.score, NOT_POSSIBLE)))


def best_spans(
    found: np.ndarray,
    windows: Dataset,
    max_answer_length: int,
    n_best: int = CANDIDATES,
    at_once: int = 4096,
) -> Spans:
    """The `n_best` spans of each question over all its windows, in numpy throughout.

    `found` has a row of `best_positions` for each row of `windows`, which has the columns of `cut_windows` with
    questions numbered 0, 0, 1, ... No span has more than `max_answer_length` sub-tokens. "No answer" scores as in the
    window where it scores least (Devlin et al. 2019; https://github.com/google-research/bert run_squad.py).
    """
    columns = windows.select_columns(["row", "begin", "starts", "ends"]).with_format("arrow")[:]
    row, begin = (columns[name].to_numpy() for name in ("row", "begin"))
    lists = columns["starts"].combine_chunks(), columns["ends"].combine_chunks()
    token_start, token_end = (x.flatten().to_numpy() for x in lists)
    sizes = pc.list_value_length(lists[0]).to_numpy()
    tokens_before = np.cumsum(sizes) - sizes
    parts = []
    for low in range(0, len(found), at_once):
        part = slice(low, low + at_once)
        starts, ends = found[part, 1 : 2 * CANDIDATES + 1], found[part, 2 * CANDIDATES + 1 :]
        scores = starts[:, :CANDIDATES, None] + ends[:, None, :CANDIDATES]
        first, last = (x[:, CANDIDATES:].astype(np.int32) for x in (starts, ends))
        length = last[:, None, :] - first[:, :, None]
        scores[(length < 0) | (length >= max_answer_length)] = NOT_POSSIBLE
        scores = scores.reshape(len(scores), -1)
        top = np.argpartition(-scores, n_best, axis=1)[:, :n_best]
        window, kept = np.nonzero(np.isfinite(np.take_along_axis(scores, top, 1)))
        top = top[window, kept]
        at = (tokens_before[part] - begin[part])[window]
        parts.append(
            (
                row[part][window],
                scores[window, top],
                token_start[at + first[window, top // CANDIDATES]],
                token_end[at + last[window, top % CANDIDATES]],
            )
        )
    rows, score, start, end = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.lexsort((-score, end, start, rows))  # windows that overlap find the same span twice
    rows, score, start, end = (x[order] for x in (rows, score, start, end))
    new = np.ones(len(rows), bool)
    new[1:] = (np.diff(rows) != 0) | (np.diff(start) != 0) | (np.diff(end) != 0)
    rows, score, start, end = (x[new] for x in (rows, score, start, end))
    order = np.lexsort((-score, rows))
    rows, score, start, end = (x[order] for x in (rows, score, start, end))
    opens = np.flatnonzero(np.r_[True, np.diff(row) != 0])
    count = len(opens)
    first = np.searchsorted(rows, np.arange(count + 1))
    keep = np.arange(len(rows)) - first[rows] < n_best
    sizes = np.bincount(rows[keep], minlength=count)
    return Spans(
        start[keep],
        end[keep],
        score[keep],
        first=np.r_[0, np.cumsum(sizes)],
        null=np.minimum.reduceat(found[:, 0], opens),
    )
