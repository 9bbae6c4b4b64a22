"""Make pairs of segments for next-sentence (BERT) and sentence-order (ALBERT) prediction."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, Features, Value
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.data.blocks import BLOCKS, encode, sentences_of
from common.data.domains import DOMAIN, OLD, groups_of, with_groups
from common.errors import InputError, tell
from common.models.room import room_of
from common.models.trial import trial

from .masking import SPECIAL, word_marks

PAIRS_SEED = 0  # not --seed: all runs evaluate on the same pairs
Sentence = list[tuple[int, int]]  # tokens with their marks


def to_pairs(data: DatasetDict, tokenizer: PreTrainedTokenizerFast, length: int, objective: str) -> DatasetDict:
    """Make rows of two segments with at most `length` tokens.

    Each text is cut into runs of whole sentences, and each run into two segments at a random sentence. Half of the rows
    have `pair` 1. Under `mlm+nsp` their second segment comes from another text (Devlin et al. 2019,
    https://arxiv.org/abs/1810.04805). Under `mlm+sop` their segments are swapped (Lan et al. 2020,
    https://arxiv.org/abs/1909.11942). Texts of one sentence are skipped, and their number is printed.

    Both segments are of one domain, and both new or both old.

    Returns:
        The splits with the columns of `to_blocks`, `token_type_ids` and `pair`.

    Raises:
        InputError: a split, or a domain of it, has fewer than two texts with two sentences.
    """
    pairs = {}
    for split, rows in data.items():
        made = []
        for values, some in groups_of(rows):
            place = (
                "--replay_file" if values.get(OLD) else f"{split}{f', domain {d}' if (d := values.get(DOMAIN)) else ''}"
            )
            made.append((values, _pairs_of(some["text"][:], tokenizer, length, objective, place)))
        whole = with_groups(made)
        pairs[split] = whole.add_column("row", np.arange(len(whole))).with_format("numpy")
    return DatasetDict(pairs)


def _pairs_of(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int, objective: str, place: str) -> Dataset:
    """Make the rows of one group of texts; `place` names it in messages."""
    before, between, after = _ends(tokenizer)
    room = room_of(tokenizer, length, pair=True, least=2)
    features = Features(BLOCKS | {"token_type_ids": BLOCKS["marks"], "pair": Value("int64")})
    sentences = [_sentences(text, tokenizer, room // 2) for text in texts]
    usable = [some for some in sentences if len(some) > 1]
    if len(usable) < 2:
        raise InputError(
            f"{place}: {len(usable)} texts of two sentences or more; pairs need at least 2; give whole "
            "paragraphs or documents (--text_unit paragraph)"
        )
    if len(usable) < len(texts):
        tell(f"{place}: {len(texts) - len(usable)} of {len(texts)} texts have one sentence and are left out")
    pair_rows = []
    for first, second, pair in segments(usable, room, objective):
        ids, marks = (
            [*ends[0], *[s[i] for s in first], *ends[1], *[s[i] for s in second], *ends[2]]
            for i, ends in ((0, (before, between, after)), (1, _marks_of(before, between, after)))
        )
        types = [0] * (len(before) + len(first) + len(between)) + [1] * (len(second) + len(after))
        pair_rows.append(
            {"input_ids": ids, "marks": marks, "lengths": [len(ids)], "token_type_ids": types, "pair": pair}
        )
    return Dataset.from_list(pair_rows, features=features)


def segments(texts: list[list[Sentence]], room: int, objective: str) -> Iterator[tuple[Sentence, Sentence, int]]:
    """Yield first segment, second segment, and `pair`: 1 if the second is random or the two are swapped, else 0.

    A sentence has at most half of `room` tokens. Segments are whole sentences, except that the first sentence of a
    random segment may be cut. Sentences replaced by a random segment begin the next pair.
    """
    rng = np.random.default_rng(PAIRS_SEED)
    for number, sentences in enumerate(texts):
        at = 0
        while at < len(sentences) - 1:
            end, size = at, 0
            while end < len(sentences) and size + len(sentences[end]) <= room:
                size += len(sentences[end])
                end += 1
            cut = at + int(rng.integers(1, end - at))
            first = [token for sentence in sentences[at:cut] for token in sentence]
            changed = bool(rng.random() < 0.5)
            if changed and objective == "mlm+nsp":
                other = int(rng.integers(len(texts) - 1))
                other += other >= number
                begin = int(rng.integers(len(texts[other])))
                second: Sentence = []
                for sentence in texts[other][begin:]:
                    if second and len(first) + len(second) + len(sentence) > room:
                        break
                    second = [*second, *sentence]
                yield first, second[: room - len(first)], 1
                at = cut
                continue
            second = [token for sentence in sentences[cut:end] for token in sentence]
            yield (second, first, 1) if changed else (first, second, 0)
            at = end


def _sentences(text: str, tokenizer: PreTrainedTokenizerFast, longest: int) -> list[Sentence]:
    sentences = []
    for ids, marks in encode(sentences_of(text), tokenizer, word_marks):
        tokens = list(zip(ids, marks, strict=True))
        sentences += [tokens[i : i + longest] for i in range(0, len(tokens), longest)]
    return sentences


def _ends(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int], list[int]]:
    """Return the special tokens before, between and after the two texts of a pair."""
    one, other = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", "b"))
    whole = tokenizer("a", "b")["input_ids"]
    i = next(i for i in range(len(whole)) if whole[i : i + len(one)] == one)
    j = next(j for j in range(i + len(one), len(whole)) if whole[j : j + len(other)] == other)
    return whole[:i], whole[i + len(one) : j], whole[j + len(other) :]


def _marks_of(*ends: list[int]) -> tuple[list[int], ...]:
    return tuple([SPECIAL] * len(ids) for ids in ends)


def pair_scores(outputs: Iterable[Tensor]) -> Tensor | None:
    """Return the logits (rows, 2) of the pair head from the outputs of a model; None without a pair head."""
    return next((v for v in outputs if isinstance(v, Tensor) and v.ndim == 2 and v.shape[1] == 2), None)


def check_pair_head(model: PreTrainedModel) -> None:
    """Raise `InputError` if the model has no pair head."""
    with trial(model):
        if pair_scores(model(input_ids=torch.tensor([[1, 2, 3]], device=model.device)).values()) is None:
            raise InputError(
                f"--objective: {type(model).__name__} has no head for pairs; give a BERT or ALBERT as "
                "--model_name_or_path"
            )


def pair_losses(outputs: tuple[Tensor, ...], pairs: Tensor, label_smoothing: float) -> Tensor:
    """Compute the cross-entropy of each pair, (rows,); `label_smoothing` is ignored."""
    return F.cross_entropy(pair_scores(outputs).float(), pairs, reduction="none")


def pair_hits(outputs: tuple[Tensor, ...], pairs: Tensor) -> Tensor:
    """Return 1 for each correct prediction of a pair, else 0; (rows,)."""
    return (pair_scores(outputs).argmax(-1) == pairs).long()
