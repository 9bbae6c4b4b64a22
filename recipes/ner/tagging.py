"""Words, windows, tags and entities: what training and prediction share."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import regex
from transformers import PreTrainedTokenizerFast

from common.errors import tell
from common.run.report import print_table

from .scoring import invalid_tags

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


def stitch(sentence_of: Iterable[int], values: Iterable[np.ndarray], labels: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Per sentence the values of its words, from windows: `values[i]` where `labels[i]` is not -100, window by window.

    `sentence_of` gives each window's sentence, windows in order; `values` and `labels` are arrays of equal length.
    """
    parts: dict[int, list[np.ndarray]] = defaultdict(list)
    for sentence, value, label in zip(sentence_of, values, labels, strict=True):
        parts[sentence].append(value[label != -100])
    return [np.concatenate(parts[sentence]) for sentence in sorted(parts)]


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


class Gazetteer:
    """Baseline: tags what was tagged in training, the longest match first, with the type it had most often."""

    def __init__(self, sentences: list[list[str]], tags: list[list[str]]):
        types: dict[tuple[str, ...], Counter] = defaultdict(Counter)
        for words, sequence in zip(sentences, tags, strict=True):
            for name, start, end in entity_spans(sequence):
                types[tuple(words[start:end])][name] += 1
        self.types = {entry: counts.most_common(1)[0][0] for entry, counts in types.items()}
        self.longest = max(map(len, self.types), default=0)

    def tag(self, words: list[str]) -> list[str]:
        """One tag a word."""
        tags: list[str] = []
        while len(tags) < len(words):
            i = len(tags)
            for size in range(min(self.longest, len(words) - i), 0, -1):
                name = self.types.get(tuple(words[i : i + size]))
                if name:
                    tags += [f"B-{name}"] + [f"I-{name}"] * (size - 1)
                    break
            else:
                tags.append("O")
        return tags


def compare(rows: Iterable[dict], predicted: list[list[str]]) -> Iterator[dict]:
    """The rows of a split with their predicted tags, and the positions where these differ from the gold ones."""
    for row, tags in zip(rows, predicted, strict=True):
        differ = [i for i, (a, b) in enumerate(zip(row["ner_tags"], tags, strict=True)) if a != b]
        kept = {name: row[name] for name in ("id", "tokens", "ner_tags")}
        yield kept | {"predicted_tags": tags, "differ_at": differ}


def print_scores(metrics: dict[str, float], split: str) -> None:
    """A line for each entity type, the averages, and the baseline where it was scored."""
    keys = ("precision", "recall", "f1")
    types = [
        k.removeprefix(f"{split}_").removesuffix("_support")
        for k in metrics
        if k.startswith(split) and k.endswith("_support")
    ]
    rows = [[t, *(metrics[f"{split}_{t}_{k}"] for k in keys), metrics[f"{split}_{t}_support"]] for t in sorted(types)]
    total = sum(row[-1] for row in rows)
    rows.append(["all (micro)", *(metrics[f"{split}_{k}"] for k in keys), total])
    rows.append(["all (macro)", *(metrics[f"{split}_macro_{k}"] for k in keys), total])
    if f"{split}_gazetteer_f1" in metrics:
        rows.append(["gazetteer of train", "", "", metrics[f"{split}_gazetteer_f1"], total])
    tell(f"\n{split} scores, entities in strict IOB2 (seqeval)")
    print_table(["type", "precision", "recall", "F1", "entities"], rows, last=3)
