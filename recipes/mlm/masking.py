"""Mask tokens, whole words or spans of words, determined by seed, epoch and row."""

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
from common.data.blocks import SHORTEST_TEXT, encode, padded, to_blocks
from common.data.corpus import CorpusArguments
from common.data.mapping import map_rows
from common.data.packing import Blocks, to_batch
from common.data.stream import Corpus, TextStream
from common.data.tokens import ends_of

SPECIAL, START, INSIDE = 0, 1, 2  # marks of tokens: special, first of a word, inside a word
#: probabilities of span lengths of 1 to 10 words in SpanBERT: geometric, mean 3.8
SPAN_SHARES = 0.2 * 0.8 ** np.arange(10)
SPAN_SHARES /= SPAN_SHARES.sum()
EVALUATION_SEED = 0  # not --seed: all runs evaluate on the same masks
_ALONE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")

Masking = Literal["token", "whole_word", "span"]


def word_marks(text: str, encoding: Encoding) -> list[int]:
    """Return START or INSIDE for each token of `text`.

    A run of letters and digits is a word, and each other character is a word, as in BERT's basic tokenizer. The words
    come from the text, because the markers of tokenizers (##, Ġ, ▁) differ: SentencePiece keeps a comma in the word
    before the comma, byte-level BPE splits a character into bytes, and a ▁ may be a separate token.
    """
    marks = []
    covered, after_space = 0, False
    for start, end in encoding.offsets:
        first = next((i for i in range(start, end) if not text[i].isspace()), None)
        if first is None:  # the space before a word as a separate token: first token of the word
            marks.append(START)
        elif start < covered or after_space:  # another byte of a character, or after a separate space
            marks.append(INSIDE)
        else:
            marks.append(INSIDE if first > 0 and _in_word(text[first - 1]) and _in_word(text[first]) else START)
        covered, after_space = end, first is None
    return marks


def _in_word(character: str) -> bool:
    in_word = character.isalnum() or unicodedata.category(character).startswith("M")
    return in_word and not _ALONE.match(character)


class Masker:
    """Mask rows of tokens as BERT does (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

    Args:
        tokenizer: gives the mask token and the vocabulary for random tokens.
        masking: unit of masking: `token`; `whole_word`, all tokens of a word; `span`, runs of words with geometric
            lengths (Joshi et al. 2020, https://arxiv.org/abs/1907.10529).
        probability: share of tokens to choose.
        replaced: share of the chosen tokens that become the mask token. All tokens of a span share one decision.
        random: share of the chosen tokens that become a random token. The rest stays unchanged.
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

    def __call__(self, ids: np.ndarray, marks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return ids with masks, and labels: the original id of each chosen token, else -100; each (tokens,).

        At least one token is chosen if the row has any token that is not special.
        """
        unit = self._units(ids, marks, rng)  # index of the chosen unit of each token; -1: not chosen
        chosen = np.flatnonzero(unit >= 0)
        labels = np.full(len(ids), -100, dtype=np.int64)
        labels[chosen] = ids[chosen]
        draws = rng.random(len(ids))
        draw_of_chosen = draws[unit[chosen]] if self.masking == "span" else draws[chosen]
        masked = ids.astype(np.int64)
        masked[chosen[draw_of_chosen < self.replaced]] = self.mask_id
        randomized = chosen[(draw_of_chosen >= self.replaced) & (draw_of_chosen < self.replaced + self.random)]
        masked[randomized] = rng.choice(self.ordinary, len(randomized))
        return masked, labels

    def _units(self, ids: np.ndarray, marks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        unit = np.full(len(ids), -1)
        ordinary = np.flatnonzero(marks != SPECIAL)
        if len(ordinary) == 0:
            return unit
        if self.masking == "token":
            starts = ordinary
        else:  # a word cut by the end of a row starts with its first token in the row
            after_special = np.r_[True, marks[:-1] == SPECIAL]
            starts = np.flatnonzero((marks != SPECIAL) & ((marks == START) | after_special))
        word = np.full(len(ids), -1)
        word[ordinary] = np.searchsorted(starts, ordinary, side="right") - 1
        if self.masking == "span":
            taken = self._spans(starts, word, len(ordinary), rng)
        else:
            drawn = rng.random(len(starts)) < self.probability
            if not drawn.any():
                drawn[rng.integers(len(starts))] = True
            taken = np.where(drawn, np.arange(len(starts)), -1)
        unit[ordinary] = taken[word[ordinary]]
        return unit

    def _spans(self, starts: np.ndarray, word: np.ndarray, ordinary: int, rng: np.random.Generator) -> np.ndarray:
        """Return the index of the span of each word, or -1. Spans do not overlap and do not cross pieces.

        The number of tokens to mask is rounded up or down at random, which keeps the mean rate exact. The last span is
        shortened to this number.
        """
        sizes = np.bincount(word[word >= 0], minlength=len(starts))
        joined = np.r_[starts[1:] == starts[:-1] + sizes[:-1], False]  # whether the next word is in the same piece
        taken = np.full(len(starts), -1)
        budget = max(1, int(self.probability * ordinary + rng.random()))
        span = 0
        for _ in range(20 * len(starts)):
            if budget <= 0:
                break
            first, length = rng.integers(len(starts)), rng.choice(10, p=SPAN_SHARES) + 1
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
    """Encode each split as rows of tokens with word marks; streamed training rows become a `TextStream`."""
    rows = to_blocks(corpus.texts, tokenizer, args, word_marks)
    if corpus.stream:
        encoded = partial(encode, tokenizer=tokenizer, marks=word_marks)
        rows["train"] = TextStream(corpus.stream, encoded, ends_of(tokenizer), SHORTEST_TEXT, args, training)
    return rows


class MaskedBatches:
    """Collate rows of `common.data.corpus.blocks_of` and mask them anew in each epoch: an `EpochSeeded`.

    The masks of a row depend only on `seed`, the epoch and the row number. A row with `labels` is already masked. The
    batch has the columns of `common.data.packing.to_batch`. Rows of `pairs.to_pairs` add token_type_ids (rows, length)
    and pair (rows,).
    """

    def __init__(self, masker: Masker, pad_id: int, seed: int, blocks: Blocks | None = None, multiple: int = 8):
        self.masker, self.pad_id, self.seed, self.blocks, self.epoch = masker, pad_id, seed, blocks, 0
        self.multiple = multiple

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that seeds the masks."""
        self.epoch = epoch

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        masked = []
        for row in rows:
            if "labels" in row:
                masked.append((row["input_ids"], row["labels"], row["lengths"]))
            else:
                rng = np.random.default_rng([self.seed, self.epoch, int(row["row"])])
                masked.append((*self.masker(row["input_ids"], row["marks"], rng), row["lengths"]))
        batch = to_batch(masked, self.pad_id, self.blocks, self.multiple)
        if "pair" in rows[0]:
            longest = batch["input_ids"].shape[1]
            batch["token_type_ids"] = padded([row["token_type_ids"] for row in rows], longest, 0)
            batch["pair"] = torch.tensor([int(row["pair"]) for row in rows])
        return batch


def mask_once(rows: dict[str, list], masker: Masker) -> dict[str, list]:
    """Mask the rows of an evaluation split by row number, which makes the perplexities of runs comparable."""
    masked = [
        masker(np.array(ids), np.array(marks), np.random.default_rng([EVALUATION_SEED, int(row)]))
        for ids, marks, row in zip(rows["input_ids"], rows["marks"], rows["row"], strict=True)
    ]
    return {"input_ids": [ids for ids, _ in masked], "labels": [labels for _, labels in masked]}


def mask_evaluated(rows: DatasetDict, masker: Masker) -> None:
    """Mask the rows of all splits but that of training, once for all evaluations."""
    for split in rows.keys() - {"train"}:
        rows[split] = map_rows(rows[split], mask_once, batched=True, fn_kwargs={"masker": masker})
