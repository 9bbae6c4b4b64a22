"""Words, windows, tags and entities, shared by training and prediction."""

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

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}"  # written without spaces: a character is a word
_PART = rf"(?:(?![{_CJK}])[\p{{L}}\p{{M}}\p{{N}}_])+"
WORD = regex.compile(
    rf"""https?://\S+ | www\.\S+                        # addresses
    | [@\#]{_PART}                                      # names and tags of social media
    | (?:\p{{L}}\.){{2,}}                               # U.S.
    | ['’](?:s|re|ve|ll|d|m)\b                          # clitics are words of their own
    | {_PART}(?:(?:[-.&,:]|['’](?!(?:s|re|ve|ll|d|m)\b)){_PART})*   # O'Neill, AT&T, well-known, 1,000.5
    | \S""",
    regex.VERBOSE | regex.IGNORECASE,
)


def invalid_tags(tags: list[str]) -> list[int]:
    """Positions of each `I-X` that follows neither `B-X` nor `I-X`: no such tag can stand in IOB2."""
    return [
        i for i, tag in enumerate(tags) if tag.startswith("I-") and (i == 0 or tags[i - 1] not in (tag, "B-" + tag[2:]))
    ]


def split_words(text: str) -> list[tuple[int, int]]:
    """Character spans of the words of `text`; punctuation marks and clitics are words, as in CoNLL and OntoNotes."""
    return [match.span() for match in WORD.finditer(text)]


def check_row(row: dict, repair_bio: bool = False) -> Iterator[str]:
    """A sentence for each thing that is wrong with a row of `tokens` and `ner_tags`."""
    tokens, tags = row["tokens"], row["ner_tags"]
    for name, values in row.items():
        if not isinstance(values, list):
            yield f"{name} is no list but {type(values).__name__}; needed: a list of texts, one a word"
            return
    if not tokens:
        yield "empty sentence: no tokens; take the row out"
    for i, token in enumerate(tokens, 1):
        if not isinstance(token, str) or not token.strip():
            yield f"token {i} is {token!r}; needed: a text that is not blank"
            return
    if len(tokens) != len(tags):
        yield f"{len(tokens)} tokens but {len(tags)} tags; needed: one tag a word"
        return
    for i, tag in enumerate(tags, 1):
        if isinstance(tag, int):
            yield f"tag {i} is the number {tag}; needed: names such as B-PER, or a column of ClassLabel"
            return
        if not isinstance(tag, str) or not TAG.fullmatch(tag):
            yield f"tag {i} is {tag!r}; needed: O, B-TYPE or I-TYPE (other schemes: convert to BIO first)"
            return
    orphans = [] if repair_bio else invalid_tags(tags)
    for i in orphans[:1]:
        yield (
            f"tag {i + 1} ({tags[i]} on {tokens[i]!r}) continues no {tags[i][2:]} entity; write B-{tags[i][2:]}, or "
            "pass --repair_bio to read every such tag so (right for IOB1 files)"
        )


def repair_tags(row: dict) -> dict:
    """The row with `B-X` for each `I-X` that continues no `X`: turns IOB1 and stray I- tags into IOB2."""
    tags = list(row["ner_tags"])
    for i in invalid_tags(tags):
        tags[i] = "B-" + tags[i][2:]
    return {"ner_tags": tags, "repaired": len(invalid_tags(row["ner_tags"]))}


def load_tagged(args: DataArguments) -> DatasetDict:
    """Load the splits with columns `tokens` and `ner_tags`, every row checked, and tags repaired if asked for."""
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
    """Encode word lists in windows of at most `max_seq_length` sub-tokens; each word belongs to one window.

    Where a sentence needs several windows, neighbours overlap by `doc_stride` sub-tokens, and the words in an overlap
    belong to the window in which they stand farther from the edge (as in the SQuAD code of Devlin et al. 2019,
    https://arxiv.org/abs/1810.04805). Returns the columns of the tokenizer, one row a window, and

        sentence     index of its sentence in `sentences`
        positions    where its words begin, as positions in `input_ids`; all windows of a sentence one after the
                     other give each of its words exactly once, in order
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
    found = [0] * len(sentences)
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
        found[sentence] += len(positions)
    if found != [len(words) for words in sentences]:  # some word, such as a lone variation selector, has no sub-token
        return cut_windows(_name_unseen_words(sentences, tokenizer), tokenizer, max_seq_length, doc_stride)
    return columns


def _name_unseen_words(sentences: list[list[str]], tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    """The sentences with the unknown token for each word that the tokenizer drops."""
    unknown = tokenizer.unk_token or "?"
    named = []
    for words in sentences:
        seen = set(tokenizer(words, is_split_into_words=True, add_special_tokens=False).word_ids())
        named.append([word if i in seen else unknown for i, word in enumerate(words)])
    return named


def entity_spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """Entities of a tag sequence in strict IOB2: (type, first word, word after the last). A stray `I-X` is no part."""
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
