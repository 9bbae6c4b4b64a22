"""Encode texts, or prompts with completions, as rows whose labels are the next tokens."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.args import TrainingArguments
from common.data.blocks import SHORTEST_TEXT, Marked, pieces, rows_of
from common.data.corpus import PLAIN, CorpusArguments, files_of
from common.data.files import TABLES, read_file
from common.data.mapping import map_rows
from common.data.packing import Blocks, to_batch
from common.data.rows import load_splits, read_dataset
from common.data.source import Located, Row, ending_of
from common.data.stream import Corpus, TextStream, open_corpus
from common.data.tokens import encodings
from common.errors import InputError, tell, warn
from common.models.trial import trial

from . import dialogues
from .arguments import ClmDataArguments

COUNTED = 10_000_000  # training tokens that the five-gram model counts
LEARNED, GIVEN = 1, 0  # marks of tokens: in the loss, or context only


def beginning(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the token that starts every text, as context for the prediction of the first real token.

    Raises:
        InputError: the tokenizer has neither a bos nor an eos token.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise InputError("the tokenizer has neither a bos nor an eos token; choose a decoder")
    return [first]


def check_causal(model: PreTrainedModel) -> None:
    """Raise `InputError` if the model sees the tokens that it must predict."""
    ids = torch.arange(1, 9, device=model.device).repeat(2, 1)
    ids[1, 5:] = 0
    with trial(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :5]
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-4):
        raise InputError(f"{type(model).__name__}: sees the tokens after each token; choose a decoder, such as a GPT")


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[Marked]:
    """Encode each text with an eos token; all tokens are in the loss."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = encodings(tokenizer, texts, offsets=False)
    return [(e.ids + end, [LEARNED] * (len(e.ids) + len(end))) for e in encoded]


def shortest(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the number of tokens in the shortest text that is used, eos included."""
    return SHORTEST_TEXT + (tokenizer.eos_token_id is not None)


def to_rows(data: DatasetDict, tokenizer: PreTrainedTokenizerFast, args: CorpusArguments, loss_on: str) -> DatasetDict:
    """Encode the texts of each split as rows of `common.data.corpus.blocks_of`.

    The column `marks` says which tokens are in the loss. A text ends with the eos token. With `loss_on="completion"`
    the rows have `prompt` and `completion`, only the completion is in the loss, and no row is split. Both are encoded
    as one text, and a token with characters of both is in the loss. A row that is too long loses the beginning of its
    prompt, or the end of its completion; the number of these rows is printed.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ends = beginning(tokenizer), []
    room = args.max_seq_length - 1
    if loss_on == "all":
        return rows_of(data, lambda rows: encode_texts(rows["text"], tokenizer), ends, args, least=shortest(tokenizer))

    cut: Counter = Counter()
    shared = 0  # tokens that predict cannot form, because it encodes the prompt alone

    def encode_completions(texts: dict[str, list]) -> list[tuple[list[int], list[int]]]:
        joined = [prompt + completion for prompt, completion in zip(texts["prompt"], texts["completion"], strict=True)]
        nonlocal shared
        rows = []
        for given, encoding in zip(texts["prompt"], encodings(tokenizer, joined), strict=True):
            first = next((i for i, (_, after) in enumerate(encoding.offsets) if after > len(given)), len(encoding))
            prompt, completion = encoding.ids[:first], encoding.ids[first:] + end
            shared += first < len(encoding) and encoding.offsets[first][0] < len(given.removesuffix(" "))
            kept = prompt[max(0, len(prompt) + len(completion) - room) :] if len(completion) < room else []
            cut["prompt"] += len(kept) < len(prompt)
            cut["completion"] += len(completion) > room
            ids = (kept + completion)[:room]
            rows.append((ids, [GIVEN] * len(kept) + [LEARNED] * (len(ids) - len(kept))))
        return rows

    def encode_dialogues(rows: dict[str, list]) -> list[Marked]:
        encoder = dialogues.DialogueEncoder(tokenizer)
        return [_cut_dialogue(*encoder.marked(messages, LEARNED, GIVEN), room, cut) for messages in rows["messages"]]

    encode = encode_completions
    if "messages" in data["train"].column_names:
        if dialogues.set_template(tokenizer, args.chat_template):
            tell("dialogues are written with '### User:' and '### Assistant:', a plain chat template that is saved")
        encode = encode_dialogues
    encoded = rows_of(data, encode, ends, args, least=1, whole=True)
    if shared:
        warn(
            f"{shared} completions begin inside a token of prompt and completion, but predict encodes prompts alone; "
            "end each prompt with a whole word or a newline"
        )
    for name, count in cut.items():
        if count:
            tell(f"{count} rows exceed --max_seq_length: their {name} is cut")
    return encoded


def encode_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, args: ClmDataArguments, training: TrainingArguments
) -> DatasetDict:
    """Encode each split as rows of tokens (see `to_rows`); streamed training rows become a `TextStream`."""
    rows = to_rows(corpus.texts, tokenizer, args, args.loss_on)
    if corpus.stream:
        encode, ends = partial(encode_texts, tokenizer=tokenizer), (beginning(tokenizer), [])
        rows["train"] = TextStream(corpus.stream, encode, ends, shortest(tokenizer), args, training)
    return rows


def texts_to_learn(corpus: Corpus, args: ClmDataArguments) -> Dataset:
    """Return the texts for training a new tokenizer, prompts joined with their completions."""
    texts = corpus.training_texts(args)
    return texts if "text" in texts.column_names else map_rows(texts, joined)


def load(args: ClmDataArguments, training: TrainingArguments) -> Corpus:
    """Load texts, prompts with completions, or dialogues; replace `--loss_on auto` by its meaning for these rows.

    Raises:
        InputError: a row is invalid; the message names file and line.
    """
    first = _first_row(args)
    kind = "texts" if first is None else kind_of(first, args)
    if kind != "texts" and args.text_column_name in first and args.loss_on == "auto":
        tell(f"rows have {args.text_column_name} and {kind}: training on all of {args.text_column_name}; --loss_on "
             "completion trains on the answers")  # fmt: skip
        kind = "texts"
    if args.loss_on == "auto":
        args.loss_on = "all" if kind == "texts" else "completion"
        if kind != "texts":
            tell(f"rows have {kind}: the loss is on the answers (--loss_on completion)")
    if args.loss_on == "all":
        if kind == "dialogues" and args.text_column_name not in first:
            raise InputError("--loss_on all: the rows are dialogues without a text; give --loss_on completion")
        return open_corpus(args, training)
    if args.streaming:
        raise InputError("--streaming: does not work with prompts and dialogues; leave --streaming out")
    if args.forgetting_file:
        raise InputError("--forgetting_file: does not work with prompts and dialogues; leave it out")
    if not (args.train_file or args.dataset_name):
        raise InputError("--loss_on completion: needs rows with prompt and completion; add --train_file")
    read = partial(_read, args=args)
    if kind == "dialogues":
        prepare = partial(dialogues.prepare, domain=args.domain_column)
        columns = {"messages": "messages"}
        return Corpus(
            load_splits(args, columns, lambda row: (), read=read, carve_by=dialogues.question, prepare=prepare)
        )
    columns = {"prompt": args.prompt_column_name, "completion": args.completion_column_name}
    return Corpus(load_splits(args, columns, check_completion, read=read, carve_by="prompt"))


def kind_of(row: Row, args: ClmDataArguments) -> str:
    """Return whether rows like `row` are "texts", "prompts" with completions, or "dialogues"."""
    prompt = all(isinstance(row.get(name), str) for name in (args.prompt_column_name, args.completion_column_name))
    if dialogues.is_dialogue(row) and not (prompt and not {"input", "context"} & row.keys()):
        return "dialogues"
    return "prompts" if prompt else "texts"


def _read(path: str, args: ClmDataArguments) -> Iterator[Located]:
    """Read the rows of a table, or of all files of a folder or pattern."""
    return chain.from_iterable(read_file(file, TABLES, args) for file in files_of(path))


def _first_row(args: ClmDataArguments) -> Row | None:
    """Return the first training row of a table or data set; None for texts and unreadable files."""
    if args.streaming:
        return None
    if args.dataset_name:
        rows = read_dataset(args).get("train", iter(()))
    elif args.train_file and ending_of(files_of(args.train_file)[0]) not in PLAIN:
        rows = read_file(files_of(args.train_file)[0], args=args)
    else:
        return None
    return next((row for _, row in rows if isinstance(row, dict)), None)


def check_completion(row: Row) -> Iterator[str]:
    """Yield a message for each problem in a row of prompt and completion."""
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            yield f"{name} is {row[name]!r}, not a string; change the value or remove the row"
    if isinstance(row["completion"], str) and not row["completion"].strip():
        yield "completion is blank; fill it or remove the row"


def _cut_dialogue(ids: list[int], marks: list[int], room: int, cut: Counter) -> Marked:
    """Leave out the begin of a dialogue that is too long, up to its last answer, then the end of that answer."""
    last = len(marks) - 1 - marks[::-1].index(LEARNED)  # the last token in the loss
    begin = next((i + 1 for i in range(last, -1, -1) if marks[i] == GIVEN), 0)
    first = min(max(0, len(ids) - room), begin)
    cut["begin"] += first > 0
    cut["completion"] += len(ids) - first > room
    return ids[first : first + room], marks[first : first + room]


class NextTokenCollator:
    """Collate rows of `to_rows` into a batch of `common.data.packing.to_batch`; each label is the next token."""

    def __init__(self, pad_id: int, blocks: Blocks | None = None, multiple: int = 8):
        self.pad_id, self.blocks, self.multiple = pad_id, blocks, multiple

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        return to_batch([self._labelled(row) for row in rows], self.pad_id, self.blocks, self.multiple)

    @staticmethod
    def _labelled(row: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, lengths = row["input_ids"], row["lengths"]
        labels = np.append(np.where(row["marks"][1:] == LEARNED, ids[1:], -100), -100)
        labels[np.cumsum(lengths) - 1] = -100  # the next token belongs to another text
        return ids, labels, lengths


def joined(row: Row) -> Row:
    """Join prompt and completion, or the messages of a dialogue, as `text`."""
    if "messages" in row:
        return {"text": dialogues.plain_text(row["messages"])}
    return {"text": row["prompt"] + row["completion"]}


def _pieces(blocks: Dataset, limit: int | None) -> Iterator[np.ndarray]:
    """Yield the pieces of all rows, or of the first rows up to `limit` tokens."""
    count = 0
    for row in blocks:
        yield from pieces(row["input_ids"], row["lengths"])
        count += len(row["input_ids"])
        if limit is not None and count >= limit:
            return


def bits_of(
    blocks: DatasetDict, texts: DatasetDict, metrics: dict[str, float], split: str, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Compute and print bits per UTF-8 byte of the texts of `split`, before and after training.

    Unlike perplexity, bits per byte compare models with different tokenizers. The end of a text counts as one byte,
    like a newline. A five-gram model of the first `COUNTED` training tokens is the baseline, unless training rows are
    streamed.

    Args:
        blocks: encoded rows of each split.
        texts: texts of each split.
        metrics: losses in nats per token, as `before_SPLIT_loss` and `after_SPLIT_loss`.
        split: the split to score.
        tokenizer: the tokenizer of `blocks`.
    """
    encoded = encodings(tokenizer, texts[split]["text"][:], offsets=False)
    kept = [text for text, e in zip(texts[split]["text"][:], encoded, strict=True) if len(e.ids) >= SHORTEST_TEXT]
    size = sum(len(text.encode("utf-8", "surrogatepass")) + 1 for text in kept)
    rows = list(_pieces(blocks[split], None))
    labels = sum(len(ids) - 1 for ids in rows)
    losses = {when: metrics[f"{when}_{split}_loss"] for when in ("before", "after")}
    if isinstance(blocks["train"], Dataset):
        losses["five_grams"] = FiveGrams(list(_pieces(blocks["train"], COUNTED)), len(tokenizer)).loss(rows)
    bits = {f"{name}_{split}_bits_per_byte": float(loss * labels / np.log(2) / size) for name, loss in losses.items()}
    shown = ", ".join(f"{name.replace('_', ' ')} {bits[f'{name}_{split}_bits_per_byte']:.3f}" for name in losses)
    tell(f"\nbits per byte of the {split} texts: {shown}")
    return bits


class FiveGrams:
    """Five-gram language model as a baseline, interpolated down to a uniform distribution (Witten and Bell 1991)."""

    LONGEST = 4  # tokens of a context

    def __init__(self, rows: list[np.ndarray], vocabulary: int):
        self.vocabulary = vocabulary
        tokens, places = self._concatenate(rows)
        self.levels: list[tuple[np.ndarray, ...]] = []
        at = np.flatnonzero(places > 0)
        contexts = np.zeros(len(tokens), dtype=np.int64)  # the number of each position's context
        for size in range(self.LONGEST + 1):
            at = at[places[at] >= size]
            keys, contexts[at] = np.unique(self._keys(contexts, tokens, at, size), return_inverse=True)
            grams, counts = np.unique(contexts[at] * vocabulary + tokens[at], return_counts=True)
            totals = np.bincount(contexts[at], minlength=len(keys))
            kinds = np.bincount(grams // vocabulary, minlength=len(keys))
            self.levels.append((keys, grams, counts, totals, kinds))

    def loss(self, rows: list[np.ndarray]) -> float:
        """Return the mean loss in nats per token, without the first token of each row."""
        tokens, places = self._concatenate(rows)
        probabilities = np.full(len(tokens), 1 / self.vocabulary)
        contexts = np.zeros(len(tokens), dtype=np.int64)
        at = np.flatnonzero(places > 0)
        predicted = at
        for size, (keys, grams, counts, totals, kinds) in enumerate(self.levels):
            at = at[places[at] >= size]
            context, seen = _find(keys, self._keys(contexts, tokens, at, size))
            at, context = at[seen], context[seen]  # if a context is unseen, every longer context is unseen
            contexts[at] = context
            gram, known = _find(grams, context * self.vocabulary + tokens[at])
            count = np.where(known, counts[gram], 0)
            probabilities[at] = (count + kinds[context] * probabilities[at]) / (totals[context] + kinds[context])
        return float(-np.log(probabilities[predicted]).mean())

    def _concatenate(self, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of all rows, concatenated, and the position of each token in its row."""
        return np.concatenate(rows).astype(np.int64), np.concatenate([np.arange(len(row)) for row in rows])

    def _keys(self, contexts: np.ndarray, tokens: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
        """Return a number for the context of `size` tokens at each position: the shorter context and one more token."""
        return contexts[at] * self.vocabulary + (tokens[at - size] if size else 0)


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of each of `wanted` in the sorted `keys`, and whether `keys` contains it."""
    indices = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return indices, keys[indices] == wanted
