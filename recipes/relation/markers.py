"""Mark the two mentions of a text by new tokens, and classify a pair by the states at the markers.

The model is a token classifier with 2 R outputs for R relations, of any family with this head. Its weight consists of
two blocks, W = [A; B], and the score of the relations is

    score = A h(head marker) + B h(tail marker) + biases,

which equals one linear layer on the two concatenated states of the start markers (Soares et al. 2019,
https://arxiv.org/abs/1906.03158, "entity start"). Markers carry the types of the mentions, if known (Zhou and Chen
2022, https://arxiv.org/abs/2102.01373, "typed entity marker").
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from common.data.source import Row
from common.data.tokens import Ends, encodings
from common.errors import tell
from common.models import LoadedModel
from common.models.room import room_of
from common.models.structure import input_embeddings, transformer_of

from .mentions import MENTIONS

#: words for the initial embeddings of markers
ROLES = {"head": "subject", "tail": "object"}
#: short names of types in common data sets -> words for them
TYPES = {"PER": "person", "ORG": "organization", "LOC": "location", "MISC": "name", "GPE": "country", "FAC": "building"}
#: fewest tokens of the text in a row
LEAST = 6


def output_names(relations: list[str]) -> list[str]:
    """Return the names of the model's 2 R outputs: first the block of the head, then that of the tail."""
    return [f"{role} {relation}" for role in MENTIONS for relation in relations]


def relations_of(outputs: list[str]) -> list[str]:
    """Return the relations from the names of the outputs."""
    return [name.removeprefix(f"{MENTIONS[0]} ") for name in outputs[: len(outputs) // 2]]


def types_of(rows: Dataset) -> list[str]:
    """Return the sorted types of the mentions."""
    return sorted({row[name]["type"] for row in rows for name in MENTIONS} - {None})


@dataclass
class Markers:
    """The marker tokens of a tokenizer. `types` are the types with markers of their own."""

    types: list[str] = field(default_factory=list)

    def names(self, role: str, kind: str | None) -> tuple[str, str]:
        """Return the tokens before and after a mention; a type without markers is marked as no type."""
        name = f"{role}:{kind}" if kind in self.types else role
        return f"<{name}>", f"</{name}>"

    def tokens(self) -> dict[str, str]:
        """Return each token, and words for its initial embedding."""
        found = {}
        for role, word in ROLES.items():
            for kind in (None, *self.types):
                words = f"{word} {TYPES.get(kind, kind).lower().replace('_', ' ')}" if kind else word
                before, after = self.names(role, kind)
                found |= {before: words, after: f"end {words}"}
        return found

    def add(self, loaded: LoadedModel) -> None:
        """Add the tokens to tokenizer and embeddings; a new embedding is the mean of those of its words.

        Methods of LoRA train the embeddings of all markers too.
        """
        tokenizer: PreTrainedTokenizerFast = loaded.tokenizer
        known, words = tokenizer.get_vocab(), self.tokens()
        vectors = input_embeddings(transformer_of(loaded.model)).weight.detach()
        new = {name: text for name, text in words.items() if name not in known}
        initial = {name: vectors[encodings(tokenizer, [text])[0].ids].mean(0) for name, text in new.items()}
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True)
        if len(tokenizer) > len(vectors):
            loaded.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weight = input_embeddings(transformer_of(loaded.model)).weight
        with torch.no_grad():
            for name, vector in initial.items():
                weight[tokenizer.convert_tokens_to_ids(name)] = vector
        loaded.trained_tokens = tuple(sorted(tokenizer.convert_tokens_to_ids(list(words))))


def encode_pairs(
    rows: dict[str, list], tokenizer: PreTrainedTokenizerFast, markers: Markers | None, max_seq_length: int
) -> dict[str, list]:
    """Encode texts with a marker before and after each mention.

    Of a text that is too long, the part around both mentions is read, or a part around each (see `window`).

    Args:
        rows: columns `text`, `head` and `tail`.
        tokenizer: the tokenizer, with the marker tokens.
        markers: the markers; None to mark nothing.
        max_seq_length: longest row, in tokens.

    Returns:
        The columns of the tokenizer, one row a pair, and
        at: positions of the start markers of head and tail; without markers the first token of each mention.
        spans: positions of the tokens of head and tail, from first to the one after the last, markers left out.
        cut: whether a part of the text is left out.
    """
    ends, extra = Ends(tokenizer), 4 if markers else 0
    room = room_of(tokenizer, max_seq_length, least=LEAST + extra) - extra
    columns: dict[str, list] = {name: [] for name in (*ends.columns, "at", "spans", "cut")}
    encoded = encodings(tokenizer, rows["text"])
    for encoding, head, tail in zip(encoded, rows["head"], rows["tail"], strict=True):
        found = [_tokens_of(mention, encoding.offsets) for mention in (head, tail)]
        kept = window(len(encoding.ids), found, room)
        found = [(int(np.searchsorted(kept, first)), int(np.searchsorted(kept, last))) for first, last in found]
        marks: list[list[int]] = [[], []]
        if markers:
            names = (markers.names(role, mention["type"]) for role, mention in zip(ROLES, (head, tail), strict=True))
            marks = [tokenizer.convert_tokens_to_ids(list(pair)) for pair in names]
        ids, at, spans = _with_marks([encoding.ids[i] for i in kept], found, marks)
        for name, values in ends.around(ids).items():
            columns[name].append(values)
        shift = len(ends.before)
        columns["at"].append([position + shift for position in at])
        columns["spans"].append([[first + shift, last + shift] for first, last in spans])
        columns["cut"].append(len(kept) < len(encoding.ids))
    return columns


def _tokens_of(mention: Row, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the first token of a mention and the one after the last; equal if the tokenizer drops the mention."""
    inside = [i for i, (start, end) in enumerate(offsets) if start < mention["end"] and end > mention["start"]]
    if inside:
        return inside[0], inside[-1] + 1
    place = sum(end <= mention["start"] for _, end in offsets)
    return place, place


def window(length: int, mentions: list[tuple[int, int]], room: int) -> np.ndarray:
    """Return the numbers of the tokens that are read: all, or `room` of them with both mentions in view.

    If both mentions fit in one stretch of `room` tokens, the stretch has the same context on both sides, as far as the
    text goes. Otherwise each mention gets half of `room`: its first tokens, and the context around them.
    """
    if length <= room:
        return np.arange(length)
    low, high = min(first for first, _ in mentions), max(last for _, last in mentions)
    if high - low <= room:
        return _around(low, high, room, length)
    half = room // 2
    return np.union1d(*(_around(first, min(last, first + half), half, length) for first, last in mentions))


def _around(first: int, last: int, size: int, length: int) -> np.ndarray:
    start = max(0, min(first - (size - (last - first)) // 2, length - size))
    return np.arange(start, start + size)


def _with_marks(
    ids: list[int], mentions: list[tuple[int, int]], marks: list[list[int]]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Insert the marks before and after each mention; return the ids, the places of the marks, and of the mentions."""
    # (place, order there, mention, whether it is the mark after): ends precede beginnings, empty mentions are between
    inserted = []
    for number, ((first, last), pair) in enumerate(zip(mentions, marks, strict=True)):
        if pair:
            empty = first == last
            inserted += [(first, 1 if empty else 2, number, False), (last, 1 if empty else 0, number, True)]
    result, at, spans, done = [], [0, 0], [[0, 0], [0, 0]], 0
    for place, _, number, after in sorted(inserted):
        result += ids[done:place]
        done = place
        if after:
            spans[number][1] = len(result)
        else:
            at[number], spans[number][0] = len(result), len(result) + 1
        result.append(marks[number][after])
    result += ids[done:]
    if not inserted:
        return result, [first for first, _ in mentions], mentions
    return result, at, [(first, last) for first, last in spans]


def report_cut(rows: Iterable[list[bool]], max_seq_length: int) -> None:
    """Print how many texts exceed `max_seq_length` tokens."""
    flags = [flag for split in rows for flag in split]
    if any(flags):
        tell(
            f"{sum(flags):,} of {len(flags):,} texts exceed --max_seq_length {max_seq_length}: the parts around their "
            "mentions are read"
        )


@dataclass
class PairCollator:
    """Pad rows to a batch with `labels` (rows,) and, for a head at the markers, `markers_at` (rows, 2)."""

    tokenizer: PreTrainedTokenizerFast
    at_markers: bool
    pad_to_multiple_of: int = 8

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in self.tokenizer.model_input_names if name in rows[0]]
        batch = self.tokenizer.pad(
            [{name: row[name] for name in names} for row in rows],
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
        )
        if self.at_markers:
            batch["markers_at"] = torch.tensor([row["at"] for row in rows])
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return dict(batch)


def pair_logits(logits: Tensor, at: Tensor) -> Tensor:
    """Add the first R scores at the head's marker and the last R scores at the tail's marker.

    Args:
        logits: scores of all tokens, (rows, length, 2 R).
        at: positions of the two markers, (rows, 2).

    Returns:
        Scores of the relations, (rows, R).
    """
    rows = torch.arange(len(logits), device=logits.device)
    one, other = logits[rows, at[:, 0]], logits[rows, at[:, 1]]
    size = logits.shape[-1] // 2
    return one[:, :size] + other[:, size:]


def score_at_markers(model: nn.Module) -> None:
    """Make `model` accept `markers_at` and return the scores of the pairs as its logits."""

    def take(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        module.markers_at = kwargs.pop("markers_at", None)
        return args, kwargs

    def choose(module: nn.Module, args: tuple, outputs: Any) -> Any:
        if module.markers_at is not None:
            outputs["logits"] = pair_logits(outputs["logits"], module.markers_at)
        return outputs

    model.register_forward_pre_hook(take, with_kwargs=True)
    model.register_forward_hook(choose)
