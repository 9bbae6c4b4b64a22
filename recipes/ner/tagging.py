"""Split words, cut windows and read tags, for training and prediction."""

import re
from collections.abc import Iterator
from functools import partial

import regex
from datasets import DatasetDict
from transformers import PreTrainedTokenizerFast

from common.args import DataArguments
from common.data.rows import load_splits
from common.errors import tell

from .conll import TAGGED

TAG = re.compile(r"O|[BI]-\S+")

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}"  # scripts without spaces: each character is a word
_PART = rf"(?:(?![{_CJK}])[\p{{L}}\p{{M}}\p{{N}}_])+"
WORD = regex.compile(
    rf"""https?://\S+ | www\.\S+                        # addresses
    | [@\#]{_PART}                                      # user names and hashtags
    | (?:\p{{L}}\.){{2,}}                               # U.S.
    | ['’](?:s|re|ve|ll|d|m)\b                          # clitics are separate words
    | {_PART}(?:(?:[-.&,:]|['’](?!(?:s|re|ve|ll|d|m)\b)){_PART})*   # O'Neill, AT&T, well-known, 1,000.5
    | \S""",
    regex.VERBOSE | regex.IGNORECASE,
)


def invalid_tags(tags: list[str]) -> list[int]:
    """Return the position of each `I-X` that follows neither `B-X` nor `I-X`, which IOB2 does not allow."""
    return [
        i for i, tag in enumerate(tags) if tag.startswith("I-") and (i == 0 or tags[i - 1] not in (tag, "B-" + tag[2:]))
    ]


def split_words(text: str) -> list[tuple[int, int]]:
    """Return the character span of each word. Punctuation and clitics are words, as in CoNLL and OntoNotes."""
    return [match.span() for match in WORD.finditer(text)]


def check_row(row: dict, repair_bio: bool = False) -> Iterator[str]:
    """Yield a message for each error in a row of `tokens` and `ner_tags`."""
    tokens, tags = row["tokens"], row["ner_tags"]
    for name, values in row.items():
        if not isinstance(values, list):
            yield f"{name} is not a list but {type(values).__name__}; needed: a list of texts, one per word"
            return
    if not tokens:
        yield "empty sentence: no tokens; remove the row"
    for i, token in enumerate(tokens, 1):
        if not isinstance(token, str) or not token.strip():
            yield f"token {i} is {token!r}; needed: a non-blank text"
            return
    if len(tokens) != len(tags):
        yield f"{len(tokens)} tokens but {len(tags)} tags; needed: one tag per word"
        return
    for i, tag in enumerate(tags, 1):
        if isinstance(tag, int):
            yield f"tag {i} is the number {tag}; needed: names such as B-PER, or a ClassLabel column"
            return
        if not isinstance(tag, str) or not TAG.fullmatch(tag):
            yield f"tag {i} is {tag!r}; needed: O, B-TYPE or I-TYPE (convert other schemes to BIO first)"
            return
    orphans = [] if repair_bio else invalid_tags(tags)
    for i in orphans[:1]:
        yield (
            f"tag {i + 1} ({tags[i]} on {tokens[i]!r}) does not follow B-{tags[i][2:]} or I-{tags[i][2:]}; write "
            f"B-{tags[i][2:]}, or pass --repair_bio to repair all these tags (for IOB1 files)"
        )


def repair_tags(row: dict) -> dict:
    """Replace each `I-X` that does not continue an `X` by `B-X`: converts IOB1 to IOB2. `repaired` counts them."""
    tags = list(row["ner_tags"])
    for i in invalid_tags(tags):
        tags[i] = "B-" + tags[i][2:]
    return {"ner_tags": tags, "repaired": len(invalid_tags(row["ner_tags"]))}


def load_tagged(args: DataArguments) -> DatasetDict:
    """Load and check the splits with columns `tokens` and `ner_tags`; with --repair_bio repair the tags."""
    columns = {"tokens": args.text_column_name, "ner_tags": args.label_column_name}
    check = partial(check_row, repair_bio=args.repair_bio)
    data = load_splits(args, columns, check, list_columns=columns, readers=TAGGED)
    if args.repair_bio:
        data = data.map(repair_tags)
        tell(f"--repair_bio: {sum(sum(split['repaired']) for split in data.values())} tags I-X became B-X")
    return data


def cut_windows(
    sentences: list[list[str]], tokenizer: PreTrainedTokenizerFast, max_seq_length: int, doc_stride: int
) -> dict[str, list]:
    """Encode lists of words in windows of at most `max_seq_length` tokens; each word belongs to one window.

    Neighbouring windows of a sentence overlap by `doc_stride` tokens. A word in an overlap belongs to the window where
    the word has more context (as in the SQuAD code of Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

    Returns:
        The columns of the tokenizer, one row per window, with two more columns:
        sentence: index of the sentence in `sentences`.
        positions: positions in `input_ids` of the first tokens of the window's words. The windows of a sentence give
            each word exactly once, in order.
    """
    encoded = tokenizer(
        sentences,
        is_split_into_words=True,
        truncation=True,
        max_length=max_seq_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
    )
    step = max_seq_length - tokenizer.num_special_tokens_to_add() - doc_stride
    columns = {name: encoded[name] for name in encoded if name != "overflow_to_sample_mapping"}
    columns["sentence"] = encoded["overflow_to_sample_mapping"]
    columns["positions"] = []
    word_counts = [0] * len(sentences)
    word_before = None
    for window, sentence in enumerate(columns["sentence"]):
        opens = window == 0 or columns["sentence"][window - 1] != sentence
        closes = window + 1 == len(columns["sentence"]) or columns["sentence"][window + 1] != sentence
        content = [(p, word) for p, word in enumerate(encoded.word_ids(window)) if word is not None]
        word_before = None if opens else word_before
        positions = []
        for position, word in content[0 if opens else doc_stride // 2 : None if closes else step + doc_stride // 2]:
            if word != word_before:
                positions.append(position)
            word_before = word
        columns["positions"].append(positions)
        word_counts[sentence] += len(positions)
    if word_counts != [len(words) for words in sentences]:  # a word, such as a lone variation selector, has no token
        return cut_windows(_replace_dropped_words(sentences, tokenizer), tokenizer, max_seq_length, doc_stride)
    return columns


def _replace_dropped_words(sentences: list[list[str]], tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    """Replace each word that the tokenizer drops by the unknown token."""
    unknown = tokenizer.unk_token or "?"
    replaced = []
    for words in sentences:
        encoded_words = set(tokenizer(words, is_split_into_words=True, add_special_tokens=False).word_ids())
        replaced.append([word if i in encoded_words else unknown for i, word in enumerate(words)])
    return replaced


def entity_spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return the entities of a tag sequence in strict IOB2 as (type, first word, word after the last)."""
    spans: list[tuple[str, int, int]] = []
    stray = set(invalid_tags(tags))
    inside = False
    for i, tag in enumerate(tags):
        if tag.startswith("B-"):
            spans.append((tag[2:], i, i + 1))
            inside = True
        elif tag.startswith("I-") and inside and i not in stray:
            spans[-1] = (spans[-1][0], spans[-1][1], i + 1)
        else:
            inside = False
    return spans
