"""Pairs of segments: is the second the next one (BERT), are the two in order (ALBERT)."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, Features, Value
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.data.corpus import BLOCKS, encode, sentences_of
from common.errors import InputError, tell

from .masking import SPECIAL, word_marks

PAIRS_SEED = 0  # not --seed: the pairs of evaluations are the same in every run
Sentence = list[tuple[int, int]]  # sub-tokens with their marks


def to_pairs(data: DatasetDict, tokenizer: PreTrainedTokenizerFast, length: int, objective: str) -> DatasetDict:
    """Two segments a row of at most `length` sub-tokens: columns as of `to_blocks`, `token_type_ids` and `pair`.

    A text is cut into runs of whole sentences, and each run in two at a random sentence. Of half the rows `pair` is 1:
    under `mlm+nsp` the second segment is from another text (Devlin et al. 2019, https://arxiv.org/abs/1810.04805),
    under `mlm+sop` the two are exchanged (Lan et al. 2020, https://arxiv.org/abs/1909.11942). Texts of one sentence
    make no pair and are counted, and a last sentence that is left alone makes none. Raises `InputError` where fewer
    than two texts are left.
    """
    before, between, after = _ends(tokenizer)
    room = length - len(before) - len(between) - len(after)
    features = Features(BLOCKS | {"token_type_ids": BLOCKS["marks"], "pair": Value("int64"), "row": Value("int64")})
    made = {}
    for split, rows in data.items():
        texts = [_sentences(text, tokenizer, room // 2) for text in rows["text"][:]]
        usable = [sentences for sentences in texts if len(sentences) > 1]
        if len(usable) < 2:
            raise InputError(
                f"{split}: {len(usable)} texts of two sentences or more, from which pairs are made; give whole "
                "paragraphs or documents (--text_unit paragraph)"
            )
        if len(usable) < len(texts):
            tell(f"{split}: {len(texts) - len(usable)} of {len(texts)} texts are one sentence and make no pair")
        found = []
        for first, second, pair in segments(usable, room, objective):
            ids, marks = (
                [*ends[0], *[s[i] for s in first], *ends[1], *[s[i] for s in second], *ends[2]]
                for i, ends in ((0, (before, between, after)), (1, _marks_of(before, between, after)))
            )
            types = [0] * (len(before) + len(first) + len(between)) + [1] * (len(second) + len(after))
            found.append(
                {"input_ids": ids, "marks": marks, "lengths": [len(ids)], "token_type_ids": types, "pair": pair}
                | {"row": len(found)}
            )
        made[split] = Dataset.from_list(found, features=features).with_format("numpy")
    return DatasetDict(made)


def segments(texts: list[list[Sentence]], room: int, objective: str) -> Iterator[tuple[Sentence, Sentence, int]]:
    """First segment, second segment, and whether the second is a random one (or the two are exchanged): 0 or 1.

    A sentence has at most half of `room`. What a random segment takes the place of begins the next pair.
    """
    chance = np.random.default_rng(PAIRS_SEED)
    for number, sentences in enumerate(texts):
        at = 0
        while at < len(sentences) - 1:
            end, size = at, 0
            while end < len(sentences) and size + len(sentences[end]) <= room:
                size += len(sentences[end])
                end += 1
            cut = at + int(chance.integers(1, end - at))
            first = [token for sentence in sentences[at:cut] for token in sentence]
            changed = bool(chance.random() < 0.5)
            if changed and objective == "mlm+nsp":
                other = int(chance.integers(len(texts) - 1))
                other += other >= number
                begin = int(chance.integers(len(texts[other])))
                second: Sentence = []
                for sentence in texts[other][begin:]:
                    second = [*second, *sentence]
                    if len(second) >= room - len(first):
                        break
                yield first, second[: room - len(first)], 1
                at = cut
                continue
            second = [token for sentence in sentences[cut:end] for token in sentence]
            yield (second, first, 1) if changed else (first, second, 0)
            at = end


def _sentences(text: str, tokenizer: PreTrainedTokenizerFast, longest: int) -> list[Sentence]:
    found = []
    for ids, marks in encode(sentences_of(text), tokenizer, word_marks):
        both = list(zip(ids, marks, strict=True))
        found += [both[i : i + longest] for i in range(0, len(both), longest)]
    return found


def _ends(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before, between and after the two texts of a pair."""
    one, other = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", "b"))
    whole = tokenizer("a", "b")["input_ids"]
    i = next(i for i in range(len(whole)) if whole[i : i + len(one)] == one)
    j = next(j for j in range(i + len(one), len(whole)) if whole[j : j + len(other)] == other)
    return whole[:i], whole[i + len(one) : j], whole[j + len(other) :]


def _marks_of(*ends: list[int]) -> tuple[list[int], ...]:
    return tuple([SPECIAL] * len(ids) for ids in ends)


def pair_scores(outputs: Iterable[Tensor]) -> Tensor | None:
    """Return the scores (rows, 2) of the head for pairs among the outputs of a model; None if it has no such head."""
    return next((v for v in outputs if isinstance(v, Tensor) and v.ndim == 2 and v.shape[1] == 2), None)


def check_pair_head(model: PreTrainedModel) -> None:
    """Raise `InputError` unless the model has a head for pairs."""
    with torch.no_grad():
        if pair_scores(model(input_ids=torch.tensor([[1, 2, 3]], device=model.device)).values()) is None:
            raise InputError(
                f"--objective: {type(model).__name__} has no head for pairs of segments; take a BERT or an ALBERT"
            )


def pair_losses(outputs: tuple[Tensor, ...], pairs: Tensor, label_smoothing: float) -> Tensor:
    """Compute the cross-entropy of each pair, (rows,), without label smoothing."""
    return F.cross_entropy(pair_scores(outputs).float(), pairs, reduction="none")


def pair_hits(outputs: tuple[Tensor, ...], pairs: Tensor) -> Tensor:
    """Return 1 for each pair that has the highest score, else 0; shape (rows,)."""
    return (pair_scores(outputs).argmax(-1) == pairs).long()
