"""Which sub-tokens are masked: single ones, whole words or spans of words, as seed, epoch and row decide."""

import unicodedata
from functools import partial
from typing import Literal

import numpy as np
import regex
import torch
from datasets import DatasetDict
from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.args import TrainingArguments
from common.data.corpus import SHORTEST_TEXT, CorpusArguments, encode, ends_of, padded, to_blocks
from common.data.packing import Blocks, to_batch
from common.data.stream import Corpus, TextStream

SPECIAL, START, INSIDE = 0, 1, 2  # marks of sub-tokens: special, beginning a word, going on with it
#: SpanBERT's lengths of spans in words: geometric, cut at ten, of mean 3.8
SPAN_SHARES = 0.2 * 0.8 ** np.arange(10)
SPAN_SHARES /= SPAN_SHARES.sum()
EVALUATION_SEED = 0  # not --seed: the masks of evaluations are the same in every run
_ALONE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")

Masking = Literal["token", "whole_word", "span"]


def word_marks(text: str, encoding: Encoding) -> list[int]:
    """START or INSIDE for each sub-token of `text`.

    Letters and digits in a row are a word, every other character is one by itself, as in BERT's basic tokenizer. It is
    read off the text, not off the tokenizer's own marks (##, Ġ, ▁), which each kind sets in another way: SentencePiece
    keeps a comma in the word before it, byte-level BPE cuts a character into bytes, and a ▁ may stand alone.
    """
    marks = []
    reached, blank_before = 0, False
    for start, end in encoding.offsets:
        first = next((i for i in range(start, end) if not text[i].isspace()), None)
        if first is None:  # the space before a word, as a sub-token of its own: the word's first
            marks.append(START)
        elif start < reached or blank_before:  # a further byte of a character, or after a space of its own
            marks.append(INSIDE)
        else:
            marks.append(INSIDE if first > 0 and _in_word(text[first - 1]) and _in_word(text[first]) else START)
        reached, blank_before = end, first is None
    return marks


def _in_word(character: str) -> bool:
    in_word = character.isalnum() or unicodedata.category(character).startswith("M")
    return in_word and not _ALONE.match(character)


class Masker:
    """Masks rows of sub-tokens: Devlin et al. 2019, https://arxiv.org/abs/1810.04805.

    `masking` chooses what is masked with `probability`: `token`, single sub-tokens; `whole_word`, all of a word or
    nothing; `span`, runs of words of geometric lengths (Joshi et al. 2020, https://arxiv.org/abs/1907.10529). Of what
    is chosen a share `replaced` becomes the mask token, a share `random` a random sub-token, and the rest stays; spans
    are treated as one, as there.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        masking: Masking,
        probability: float,
        replaced: float = 0.8,
        random: float = 0.1,
    ):
        self.masking, self.probability, self.replaced, self.random = masking, probability, replaced, random
        self.mask_id = tokenizer.mask_token_id
        special = set(tokenizer.all_special_ids)
        self.ordinary = np.array(sorted(i for i in tokenizer.get_vocab().values() if i not in special))

    def __call__(
        self, ids: np.ndarray, marks: np.ndarray, chance: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids with masks, labels: the sub-token where it was chosen, else -100), each of shape (sub-tokens,).

        At least one sub-token is chosen in a row that has any that is not special.
        """
        unit = self._units(ids, marks, chance)  # number of the unit each sub-token is chosen with; -1: not chosen
        chosen = np.flatnonzero(unit >= 0)
        labels = np.full(len(ids), -100, dtype=np.int64)
        labels[chosen] = ids[chosen]
        draws = chance.random(len(ids))
        fate = draws[unit[chosen]] if self.masking == "span" else draws[chosen]
        found = ids.astype(np.int64)
        found[chosen[fate < self.replaced]] = self.mask_id
        randomized = chosen[(fate >= self.replaced) & (fate < self.replaced + self.random)]
        found[randomized] = chance.choice(self.ordinary, len(randomized))
        return found, labels

    def _units(self, ids: np.ndarray, marks: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        unit = np.full(len(ids), -1)
        ordinary = np.flatnonzero(marks != SPECIAL)
        if len(ordinary) == 0:
            return unit
        if self.masking == "token":
            starts = ordinary
        else:  # a word that a row's end cut begins with whatever is left of it
            after_special = np.r_[True, marks[:-1] == SPECIAL]
            starts = np.flatnonzero((marks != SPECIAL) & ((marks == START) | after_special))
        word = np.full(len(ids), -1)
        word[ordinary] = np.searchsorted(starts, ordinary, side="right") - 1
        if self.masking == "span":
            taken = self._spans(starts, word, len(ordinary), chance)
        else:
            drawn = chance.random(len(starts)) < self.probability
            if not drawn.any():
                drawn[chance.integers(len(starts))] = True
            taken = np.where(drawn, np.arange(len(starts)), -1)
        unit[ordinary] = taken[word[ordinary]]
        return unit

    def _spans(self, starts: np.ndarray, word: np.ndarray, ordinary: int, chance: np.random.Generator) -> np.ndarray:
        """For each word the number of the span that takes it, or -1. Spans overlap no other and end where a piece does.

        The number of sub-tokens to take is rounded up or down at random, so that the rate is right on average; the last
        span is shortened to it.
        """
        sizes = np.bincount(word[word >= 0], minlength=len(starts))
        joined = np.r_[starts[1:] == starts[:-1] + sizes[:-1], False]  # whether the next word follows in the same piece
        taken = np.full(len(starts), -1)
        budget = max(1, int(self.probability * ordinary + chance.random()))
        span = 0
        for _ in range(20 * len(starts)):
            if budget <= 0:
                break
            first, length = chance.integers(len(starts)), chance.choice(10, p=SPAN_SHARES) + 1
            last = first
            while last - first + 1 < length and joined[last]:
                last += 1
            if (taken[first : last + 1] >= 0).any():
                continue
            while last > first and sizes[first : last + 1].sum() > budget:
                last -= 1
            taken[first : last + 1] = span
            budget -= sizes[first : last + 1].sum()
            span += 1
        return taken


def encode_texts(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, args: CorpusArguments, training: TrainingArguments
) -> DatasetDict:
    """Encode each split as rows of tokens with marks of words; streamed training rows become a `TextStream`."""
    rows = to_blocks(corpus.texts, tokenizer, args, word_marks)
    if corpus.stream:
        encoded = partial(encode, tokenizer=tokenizer, marks=word_marks)
        rows["train"] = TextStream(corpus.stream, encoded, ends_of(tokenizer), SHORTEST_TEXT, args, training)
    return rows


class MaskedBatches:
    """Collator of rows of `common.data.corpus.blocks_of` that masks them anew in each epoch: an `EpochSeeded`.

    What is drawn for a row follows from `seed`, the epoch and the number of the row alone. A row that has `labels` is
    masked already. Returns what `common.data.packing.to_batch` does, and for rows of `pairs.to_pairs` also
    token_type_ids, and pair, of shape (rows,).
    """

    def __init__(self, masker: Masker, pad_id: int, seed: int, blocks: Blocks | None = None):
        self.masker, self.pad_id, self.seed, self.blocks, self.epoch = masker, pad_id, seed, blocks, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        found = []
        for row in rows:
            if "labels" in row:
                found.append((row["input_ids"], row["labels"], row["lengths"]))
            else:
                chance = np.random.default_rng([self.seed, self.epoch, int(row["row"])])
                found.append((*self.masker(row["input_ids"], row["marks"], chance), row["lengths"]))
        batch = to_batch(found, self.pad_id, self.blocks)
        if "pair" in rows[0]:
            longest = batch["input_ids"].shape[1]
            batch["token_type_ids"] = padded([row["token_type_ids"] for row in rows], longest, 0)
            batch["pair"] = torch.tensor([int(row["pair"]) for row in rows])
        return batch


def mask_once(rows: dict[str, list], masker: Masker) -> dict[str, list]:
    """Rows of a split for evaluation: masked by their number alone, so that perplexities of two runs compare."""
    found = [
        masker(np.array(ids), np.array(marks), np.random.default_rng([EVALUATION_SEED, int(row)]))
        for ids, marks, row in zip(rows["input_ids"], rows["marks"], rows["row"], strict=True)
    ]
    return {"input_ids": [ids for ids, _ in found], "labels": [labels for _, labels in found]}
