"""Rows of a causal language model: texts or prompts with completions, each sub-token labelled by the next."""

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.args import TrainingArguments
from common.data.corpus import SHORTEST_TEXT, CorpusArguments, Marked, pieces, rows_of
from common.data.files import TABLES, Row
from common.data.packing import Blocks, to_batch
from common.data.rows import load_splits
from common.data.stream import Corpus, TextStream
from common.errors import InputError, tell

from .arguments import ClmDataArguments

COUNTED = 10_000_000  # sub-tokens of the training rows that the five-grams are counted on
LEARNED, GIVEN = 1, 0  # marks of sub-tokens: in the loss, or only read


def beginning(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The sub-token that every piece begins with, so that its first real one is predicted from something."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise InputError("the tokenizer has neither a bos nor an eos token; take a decoder")
    return [first]


def check_causal(model: PreTrainedModel) -> None:
    """Raise `InputError` where the model sees what comes after a sub-token, and so what it is to predict."""
    ids = torch.arange(1, 9, device=model.device).repeat(2, 1)
    ids[1, 5:] = 0
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :5]
    model.train()
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4):
        raise InputError(f"{type(model).__name__}: sees what comes after a sub-token; take a decoder, such as a GPT")


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[Marked]:
    """Sub-tokens of each text and of its end, all to be learned."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    found = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [(e.ids + end, [LEARNED] * (len(e.ids) + len(end))) for e in found]


def shortest(tokenizer: PreTrainedTokenizerFast) -> int:
    """The sub-tokens of the shortest text that something is learned from, its end included."""
    return SHORTEST_TEXT + (tokenizer.eos_token_id is not None)


def to_rows(data: DatasetDict, tokenizer: PreTrainedTokenizerFast, args: CorpusArguments, loss_on: str) -> DatasetDict:
    """The texts of each split as rows of `common.data.corpus.blocks_of`; `marks` tells which tokens are in the
    loss.

    A text ends with the tokenizer's eos. Under `loss_on="completion"` the rows have `prompt` and `completion`: only the
    completion is in the loss, and a row is never divided. Of one that is too long the end of the prompt is kept, or of
    a completion that is too long by itself the beginning; both are counted and said.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ends = beginning(tokenizer), []
    room = args.max_seq_length - 1
    if loss_on == "all":
        return rows_of(data, lambda rows: encode_texts(rows["text"], tokenizer), ends, args, least=shortest(tokenizer))

    cut: Counter = Counter()

    def divided(texts: dict[str, list]) -> list[tuple[list[int], list[int]]]:
        encode = tokenizer.backend_tokenizer.encode_batch_fast
        prompts, completions = (encode(texts[name], add_special_tokens=False) for name in ("prompt", "completion"))
        rows = []
        for prompt, completion in zip((e.ids for e in prompts), (e.ids + end for e in completions), strict=True):
            kept = prompt[max(0, len(prompt) + len(completion) - room) :] if len(completion) < room else []
            cut["prompt"] += len(kept) < len(prompt)
            cut["completion"] += len(completion) > room
            ids = (kept + completion)[:room]
            rows.append((ids, [GIVEN] * len(kept) + [LEARNED] * (len(ids) - len(kept))))
        return rows

    made = rows_of(data, divided, ends, args, least=1, whole=True)
    for name, count in cut.items():
        if count:
            tell(f"{count} rows are longer than --max_seq_length: only a part of their {name} is read")
    return made


def encode_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, args: ClmDataArguments, training: TrainingArguments
) -> DatasetDict:
    """Encode each split as rows of tokens; see `to_rows`. Training rows that are streamed become a `TextStream`."""
    rows = to_rows(corpus.texts, tokenizer, args, args.loss_on)
    if corpus.stream:
        encode, ends = partial(encode_texts, tokenizer=tokenizer), (beginning(tokenizer), [])
        rows["train"] = TextStream(corpus.stream, encode, ends, shortest(tokenizer), args, training)
    return rows


def texts_to_learn(corpus: Corpus, args: ClmDataArguments) -> Dataset:
    """Return the texts that a new tokenizer learns from; prompts and completions are joined."""
    texts = corpus.training_texts(args)
    return texts.map(joined) if args.loss_on == "completion" else texts


def load_completions(args: ClmDataArguments) -> Corpus:
    """Load rows with `prompt` and `completion`.

    Raises:
        InputError: for broken rows, with file and line.
    """
    if not (args.train_file or args.dataset_name):
        raise InputError("--loss_on completion: needs rows with prompt and completion; give --train_file")
    columns = {"prompt": args.prompt_column_name, "completion": args.completion_column_name}
    return Corpus(load_splits(args, columns, check_completion, readers=TABLES))


def check_completion(row: Row) -> Iterator[str]:
    """A sentence for each thing that is wrong with a row of prompt and completion."""
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            yield f"{name} is {row[name]!r}; needed: a text"
    if isinstance(row["completion"], str) and not row["completion"].strip():
        yield "completion is blank; needed: what is to be learned"


class NextTokenCollator:
    """Collator of rows of `to_rows`: gives a batch of `common.data.packing.to_batch`. A label is the next token."""

    def __init__(self, pad_id: int, blocks: Blocks | None = None):
        self.pad_id, self.blocks = pad_id, blocks

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        return to_batch([self._labelled(row) for row in rows], self.pad_id, self.blocks)

    @staticmethod
    def _labelled(row: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, lengths = row["input_ids"], row["lengths"]
        labels = np.append(np.where(row["marks"][1:] == LEARNED, ids[1:], -100), -100)
        labels[np.cumsum(lengths) - 1] = -100  # what comes after the last of a piece is another text
        return ids, labels, lengths


def joined(row: Row) -> Row:
    """A row of prompt and completion with both as `text`."""
    return {"text": row["prompt"] + row["completion"]}


def _pieces(blocks: Dataset, limit: int | None) -> Iterator[np.ndarray]:
    """The pieces of all rows, or of the first ones that have `limit` sub-tokens together."""
    count = 0
    for row in blocks:
        yield from pieces(row["input_ids"], row["lengths"])
        count += len(row["input_ids"])
        if limit is not None and count >= limit:
            return


def bits_of(
    blocks: DatasetDict, texts: DatasetDict, metrics: dict[str, float], split: str, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Bits a byte of UTF-8 of the texts of `split`, before and after, and of five-grams of the training rows,
    of which the first `COUNTED` sub-tokens; these are left out where the training rows are a stream.

    The end of a text is a byte, as a newline would be. Unlike perplexity they compare models of other tokenizers.
    """
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts[split]["text"][:], add_special_tokens=False)
    kept = [text for text, e in zip(texts[split]["text"][:], encoded, strict=True) if len(e.ids) >= SHORTEST_TEXT]
    size = sum(len(text.encode("utf-8", "surrogatepass")) + 1 for text in kept)
    rows = list(_pieces(blocks[split], None))
    labels = sum(len(ids) - 1 for ids in rows)
    losses = {when: metrics[f"{when}_{split}_loss"] for when in ("before", "after")}
    if isinstance(blocks["train"], Dataset):
        losses["five_grams"] = FiveGrams(list(_pieces(blocks["train"], COUNTED)), len(tokenizer)).loss(rows)
    found = {f"{name}_{split}_bits_per_byte": float(loss * labels / np.log(2) / size) for name, loss in losses.items()}
    shown = ", ".join(f"{name.replace('_', ' ')} {found[f'{name}_{split}_bits_per_byte']:.3f}" for name in losses)
    tell(f"\nbits a byte of the {split} texts: {shown}")
    return found


class FiveGrams:
    """Baseline: sub-tokens by the four before them, interpolated by Witten and Bell (1991) down to a uniform guess."""

    LONGEST = 4  # sub-tokens of a context

    def __init__(self, rows: list[np.ndarray], vocabulary: int):
        self.vocabulary = vocabulary
        tokens, places = self._flat(rows)
        self.levels: list[tuple[np.ndarray, ...]] = []
        at = np.flatnonzero(places > 0)
        contexts = np.zeros(len(tokens), dtype=np.int64)  # of each position, a number
        for size in range(self.LONGEST + 1):
            at = at[places[at] >= size]
            keys, contexts[at] = np.unique(self._keys(contexts, tokens, at, size), return_inverse=True)
            grams, counts = np.unique(contexts[at] * vocabulary + tokens[at], return_counts=True)
            totals = np.bincount(contexts[at], minlength=len(keys))
            kinds = np.bincount(grams // vocabulary, minlength=len(keys))
            self.levels.append((keys, grams, counts, totals, kinds))

    def loss(self, rows: list[np.ndarray]) -> float:
        """Mean loss in nats of the sub-tokens of rows, after the first of each."""
        tokens, places = self._flat(rows)
        chances = np.full(len(tokens), 1 / self.vocabulary)
        contexts = np.zeros(len(tokens), dtype=np.int64)
        at = np.flatnonzero(places > 0)
        all_of_them = at
        for size, (keys, grams, counts, totals, kinds) in enumerate(self.levels):
            at = at[places[at] >= size]
            context, seen = _find(keys, self._keys(contexts, tokens, at, size))
            at, context = at[seen], context[seen]  # where a context was never seen, no longer one was
            contexts[at] = context
            gram, known = _find(grams, context * self.vocabulary + tokens[at])
            count = np.where(known, counts[gram], 0)
            chances[at] = (count + kinds[context] * chances[at]) / (totals[context] + kinds[context])
        return float(-np.log(chances[all_of_them]).mean())

    def _flat(self, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The sub-tokens of all rows one after the other, and the place of each in its row."""
        return np.concatenate(rows).astype(np.int64), np.concatenate([np.arange(len(row)) for row in rows])

    def _keys(self, contexts: np.ndarray, tokens: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
        """A number for the context of `size` sub-tokens at each position: the shorter one, and one sub-token more."""
        return contexts[at] * self.vocabulary + (tokens[at - size] if size else 0)


def _find(there: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `wanted` stands in the sorted `there`, and whether it does."""
    where = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
    return where, there[where] == wanted
