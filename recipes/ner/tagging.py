"""Split words, cut windows and find entities, for training and prediction."""

import regex
from transformers import PreTrainedTokenizerFast

from common.data.words import NO_SPACES
from common.errors import InputError
from common.models.room import room_of

from .schemes import invalid_tags

_PART = rf"(?:(?![{NO_SPACES}])[\p{{L}}\p{{M}}\p{{N}}_])+"
WORD = regex.compile(
    rf"""https?://\S+ | www\.\S+                        # addresses
    | [@\#]{_PART}                                      # user names and hashtags
    | (?:\p{{L}}\.){{2,}}                               # U.S.
    | ['’](?:s|re|ve|ll|d|m)\b                          # clitics are separate words
    | {_PART}(?:(?:[-.&,:]|['’](?!(?:s|re|ve|ll|d|m)\b)){_PART})*   # O'Neill, AT&T, well-known, 1,000.5
    | \S\p{{M}}*""",
    regex.VERBOSE | regex.IGNORECASE,
)


def split_words(text: str) -> list[tuple[int, int]]:
    """Return the character span of each word. Punctuation and clitics are words, as in CoNLL and OntoNotes."""
    return [match.span() for match in WORD.finditer(text)]


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

    Raises:
        InputError: a window has no room for `doc_stride` tokens and one more.
    """
    room = room_of(tokenizer, max_seq_length)
    if doc_stride >= room:
        raise InputError(
            f"--doc_stride {doc_stride}: a window of --max_seq_length {max_seq_length} has {room} tokens that are not "
            f"special; give at most {room - 1}"
        )
    encoded = tokenizer(
        sentences,
        is_split_into_words=True,
        truncation=True,
        max_length=max_seq_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
    )
    step = room - doc_stride
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


def word_spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return each word with a tag other than O as an entity, in the form of `entity_spans`."""
    return [(tag, i, i + 1) for i, tag in enumerate(tags) if tag != "O"]
