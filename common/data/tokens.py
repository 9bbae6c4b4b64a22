"""Encode texts as the tokenizer of the checkpoint does; special tokens come from the tokenizer, never from a text."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate

from tokenizers import Encoding, Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, allowed: bool) -> None:
    """Choose what a special token in a text is, such as `</s>`: a special token if `allowed`, else plain text.

    Added tokens that are not special are part of the vocabulary and stay as they are.
    """
    tokenizer.split_special_tokens = not allowed
    if not tokenizer.is_fast:
        return
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not allowed
    if allowed:
        return
    ids = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder.items()
    unmarked = [token for i, token in added if i in ids and not token.special]
    if unmarked:  # such as an end token that tokenizer.json lists without the mark
        backend.add_special_tokens(unmarked)
    special = {token.content: i for i, token in added if i in ids or token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    in_vocabulary = [token for token, i in special.items() if len(token) > 1 and _read_by_model(backend, token, i)]
    if in_vocabulary:
        parts = [_split_within(in_vocabulary)]
        if backend.pre_tokenizer is not None:
            parts.insert(0, backend.pre_tokenizer)
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)


def _read_by_model(backend: Tokenizer, token: str, number: int) -> bool:
    """Return whether the vocabulary of the model has this special token as a piece of text, as in SentencePiece."""
    for text in (token, f"a{token}a", f"a {token} a"):
        encoding = backend.encode(text, add_special_tokens=False)
        if any(i == number and token in text[slice(*at)] for i, at in zip(encoding.ids, encoding.offsets, strict=True)):
            return True
    return False


def _split_within(tokens: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """Split a text after the first character of each of `tokens`. Any other text is left as it is."""
    rests: dict[str, list[str]] = defaultdict(list)
    for token in tokens:
        rests[token[0]].append(re.escape(token[1:]))
    pattern = "|".join(f"{re.escape(first)}(?={'|'.join(after)})" for first, after in rests.items())
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def with_masks(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the backend that reads the mask token in texts; other special tokens as `tokenizer` does."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in described["added_tokens"]:
        if token["content"] == tokenizer.mask_token:
            token["special"] = False
    copy = Tokenizer.from_str(json.dumps(described))
    return _plain(copy, tokenizer.split_special_tokens)


def _plain(backend: Tokenizer, split_special_tokens: bool) -> Tokenizer:
    backend.no_truncation()  # tokenizer.json may set both
    backend.no_padding()
    backend.encode_special_tokens = split_special_tokens  # lost when a tokenizer is copied to a worker
    return backend


def encodings(tokenizer: PreTrainedTokenizerFast, texts: list[str], offsets: bool = True) -> list[Encoding]:
    """Return the whole encoding of each text, without special tokens; without `offsets` it takes less time."""
    backend = _plain(tokenizer.backend_tokenizer, tokenizer.split_special_tokens)
    return (backend.encode_batch if offsets else backend.encode_batch_fast)(texts, add_special_tokens=False)


def ends_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens that the tokenizer puts before and after a text."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(inside)] == inside)
    return whole[:start], whole[start + len(inside) :]


class Ends:
    """The special tokens that a tokenizer puts around a text.

    Attributes:
        before, after: ids of the tokens before and after a text.
        columns: names of the columns of the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.before, self.after = ends_of(tokenizer)
        whole = tokenizer("a")
        self.columns = list(whole)
        at, types = len(self.before), whole.get("token_type_ids", [0])
        self._types = types[:at], types[at : at + 1], types[len(types) - len(self.after) :]

    def around(self, ids: list[int]) -> dict[str, list[int]]:
        """Return the columns of a row: `ids` with the special tokens around them."""
        before, inside, after = self._types
        row = {
            "input_ids": [*self.before, *ids, *self.after],
            "attention_mask": [1] * (len(self.before) + len(ids) + len(self.after)),
            "token_type_ids": [*before, *inside * len(ids), *after],
        }
        return {name: row[name] for name in self.columns}


def encode_parts(tokenizer: PreTrainedTokenizerFast, rows: list[list[str]]) -> list[list[list[int]]]:
    """Return the tokens of each part of each row, without special tokens.

    The parts of a row, such as words or sentences, are joined by single spaces and encoded as one text. A token belongs
    to the part of its first character that is no space. A part has no tokens if the tokenizer drops all its
    characters, or if they are in a token of the part before.
    """
    joined = [" ".join(parts) for parts in rows]
    results = []
    for parts, text, encoding in zip(rows, joined, encodings(tokenizer, joined), strict=True):
        ends = list(accumulate(len(part) + 1 for part in parts))
        tokens: list[list[int]] = [[] for _ in parts]
        part = 0
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            while start < len(text) - 1 and text[start].isspace():
                start += 1
            while part < len(parts) - 1 and start >= ends[part]:
                part += 1
            tokens[part].append(token)
        results.append(tokens)
    return results
