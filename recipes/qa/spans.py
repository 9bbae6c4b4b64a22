"""Cut windows over contexts, label answers as token positions, and select the best spans from logits."""

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

#: number of starts and of ends that an evaluation keeps of a window
CANDIDATES = 20
#: position whose logits score "no answer": the first token, in most models the classification token
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
    """Encode questions with their contexts, long contexts in windows that overlap by `doc_stride` tokens.

    As in Devlin et al. 2019, https://arxiv.org/abs/1810.04805. A question keeps its first `max_question_length` tokens.

    Returns:
        The columns of the tokenizer, one row per window, the windows of a context in order, with more columns:
        row: index of the question.
        begin: position in `input_ids` of the first token of the context.
        starts, ends: first character, and the character after the last, of each context token in the window. The
            characters form whole graphemes: an accent that the tokenizer drops stays with its letter.
        question_cut: whether the question was cut.
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
    graphemes = None
    for window, row in enumerate(columns["row"]):
        if window == 0 or row != columns["row"][window - 1]:
            graphemes = _graphemes(contexts[row])
        in_context = [i for i, part in enumerate(encoded.sequence_ids(window)) if part == 1]
        begin, end = (in_context[0], in_context[-1] + 1) if in_context else (1, 1)
        offsets = np.array(encoded["offset_mapping"][window][begin:end], dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets.T if graphemes is None else (graphemes[0][offsets[:, 0]], graphemes[1][offsets[:, 1]])
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
    """Return, for each character offset, the begin of its grapheme and the end of the grapheme before it."""
    if text.isascii():
        return None
    begins = np.array([match.start() for match in regex.finditer(r"\X", text)] + [len(text)])
    at = np.arange(len(text) + 1)
    return begins[np.searchsorted(begins, at, "right") - 1], begins[np.searchsorted(begins, at, "left")]


def positions(
    starts: list[int], ends: list[int], start: int, end: int, first: bool, last: bool
) -> tuple[int, int] | None:
    """Return the context tokens of a window that hold the first and the last character from `start` to `end`.

    Returns None if the window does not hold all characters. `first` and `last` tell whether the window is the first or
    the last window of its context.
    """
    if not starts or (start < starts[0] and not first) or (end > ends[-1] and not last):
        return None
    i, j = bisect_right(ends, start), bisect_left(starts, end) - 1
    return (i, j) if i <= j else None


def trimmed(context: str, start: int, end: int) -> tuple[int, int]:
    """Remove the spaces at both ends of a span; some tokenizers include spaces in their tokens."""
    text = context[start:end]
    return end - len(text.lstrip()) if text.strip() else start, start + len(text.rstrip())


def label_windows(windows: dict[str, list], answers: list[dict], indices: list[int]) -> dict[str, list]:
    """Add `labels` and `lost` to the windows of `cut_windows`, and replace `row` by its value in `indices`.

    `labels` holds the positions of the first and the last token of the first answer. In a window without the answer,
    both labels are `NULL`. If no window of the context holds the whole answer, the row is `lost` and both are -100.
    """
    labels, answered, of = [], set(), windows["row"]
    context = (windows[name] for name in ("begin", "starts", "ends"))
    for i, (row, begin, starts, ends) in enumerate(zip(of, *context, strict=True)):
        labels.append([NULL, NULL])
        if answers[row]["text"]:
            start = answers[row]["answer_start"][0]
            end = start + len(answers[row]["text"][0])
            first, last = i == 0 or of[i - 1] != row, i + 1 == len(of) or of[i + 1] != row
            tokens = positions(starts, ends, start, end, first, last)
            if tokens is not None:
                labels[-1] = [begin + position for position in tokens]
                answered.add(row)
    windows["lost"] = [bool(answers[row]["text"]) and row not in answered for row in of]
    windows["labels"] = [[-100, -100] if lost else pair for pair, lost in zip(labels, windows["lost"], strict=True)]
    windows["row"] = [indices[row] for row in of]
    return windows


@dataclass
class SpanCollator:
    """Pad windows to a batch with `labels` (windows, 2) and `context_mask` (windows, length).

    The mask is True where an answer may begin or end: in the context and at `NULL`, the position of "no answer".
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


def print_limits(windows: Dataset, rows: int, max_answer_length: int) -> None:
    """Print the number of training windows; warn of questions that are cut and of answers that are lost or too long."""
    columns = windows.select_columns(["row", "question_cut", "lost", "labels"]).with_format("numpy")[:]
    too_long = np.diff(columns["labels"])[:, 0] >= max_answer_length
    cut, lost, long = (len(np.unique(columns["row"][x])) for x in (columns["question_cut"], columns["lost"], too_long))
    tell(f"training: {rows} questions in {len(windows)} windows")
    if cut:
        warn(f"{cut} questions are longer than --max_question_length and are cut; raise --max_question_length")
    if lost:
        warn(f"{lost} answers fit in no window and are not learned; raise --doc_stride or --max_seq_length")
    if long:
        warn(f"{long} answers exceed --max_answer_length {max_answer_length} and cannot be predicted; raise it")


def context_mask(begins: list[int], sizes: list[int], length: int) -> Tensor:
    """Return a mask (windows, length) that is True in the context and at `NULL`."""
    at, begin = torch.arange(length), torch.tensor(begins)[:, None]
    return (at == NULL) | ((at >= begin) & (at < begin + torch.tensor(sizes)[:, None]))


def answer_in_context(model: nn.Module) -> None:
    """Make `model` accept a `context_mask` and set its logits to minus infinity where the mask is False.

    The loss then excludes padding and does not depend on the other windows of a batch. No answer begins or ends in the
    question.
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
    """Compute the cross-entropy of the first and the last position of each answer.

    Args:
        logits: logits of starts and of ends, each (windows, length).
        labels: positions (windows, 2); the loss is 0 where the label is -100.
        label_smoothing: share of the target that is spread over all positions with finite logits.

    Returns:
        The losses, (windows, 2).
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
    """Select the best starts and ends of each window, and the score of "no answer".

    Evaluation keeps only this array (windows, 1 + 4 x `CANDIDATES`) of the logits, each (windows, length). The columns:
    score of "no answer", scores of starts, starts, scores of ends, ends.
    """
    kept = [sum(part[:, NULL] for part in logits).float()[:, None]]
    for part in logits:
        part = part.float().clone()
        part[:, NULL] = NOT_POSSIBLE
        best = part.topk(min(CANDIDATES, part.shape[1]), dim=-1)
        for values, fill in ((best.values, NOT_POSSIBLE), (best.indices.float(), 0.0)):
            kept.append(F.pad(values, (0, CANDIDATES - values.shape[1]), value=fill))
    return torch.cat(kept, dim=1)


@dataclass
class Spans:
    """The best spans of each question, the best first, as flat arrays.

    Attributes:
        start, end: characters of the context.
        score: sum of the logits of start and end.
        first: the spans of question i are those from `first[i]` to `first[i + 1]`.
        null: score of "no answer" of each question.
    """

    start: np.ndarray
    end: np.ndarray
    score: np.ndarray
    first: np.ndarray
    null: np.ndarray

    def best(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return start, end and score of the best span of each question; 0, 0 and minus infinity without a span."""
        any_ = self.first[:-1] < self.first[1:]
        at = np.where(any_, self.first[:-1], 0)
        if not len(self.start):
            return np.zeros(len(at), int), np.zeros(len(at), int), np.full(len(at), NOT_POSSIBLE)
        return tuple(np.where(any_, x[at], e) for x, e in ((self.start, 0), (self.end, 0), (self.score, NOT_POSSIBLE)))


def best_spans(
    candidates: np.ndarray,
    windows: Dataset,
    max_answer_length: int,
    n_best: int = CANDIDATES,
    at_once: int = 4096,
) -> Spans:
    """Return the best spans of each question over all its windows.

    The score of "no answer" is its lowest score over the windows of a question (Devlin et al. 2019;
    https://github.com/google-research/bert run_squad.py).

    Args:
        candidates: a row of `best_positions` for each window.
        windows: the columns of `cut_windows`; `row` numbers the questions 0, 0, 1, ...
        max_answer_length: maximum tokens of a span.
        n_best: maximum spans of a question.
        at_once: windows processed at a time, which bounds memory.
    """
    columns = windows.select_columns(["row", "begin", "starts", "ends"]).with_format("arrow")[:]
    row, begin = (columns[name].to_numpy() for name in ("row", "begin"))
    lists = columns["starts"].combine_chunks(), columns["ends"].combine_chunks()
    token_start, token_end = (x.flatten().to_numpy() for x in lists)
    sizes = pc.list_value_length(lists[0]).to_numpy()
    tokens_before = np.cumsum(sizes) - sizes
    parts = []
    for low in range(0, len(candidates), at_once):
        part = slice(low, low + at_once)
        starts, ends = candidates[part, 1 : 2 * CANDIDATES + 1], candidates[part, 2 * CANDIDATES + 1 :]
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
    order = np.lexsort((-score, end, start, rows))  # overlapping windows yield the same span twice
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
        null=np.minimum.reduceat(candidates[:, 0], opens),
    )
