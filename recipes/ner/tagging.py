"""Cut windows and find entities, for training and prediction."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerFast

from common.data.tokens import Ends, encode_parts, encodings
from common.errors import InputError
from common.models.room import room_of

from .schemes import invalid_tags


def cut_windows(
    sentences: list[list[str]], tokenizer: PreTrainedTokenizerFast, max_seq_length: int, doc_stride: int
) -> dict[str, list]:
    """Encode lists of words in windows of at most `max_seq_length` tokens; each word belongs to one window.

    The words are read as a text with single spaces between them. Neighbouring windows of a sentence overlap by
    `doc_stride` tokens. A word in an overlap belongs to the window where the word has more context (as in the SQuAD
    code of Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

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
    ends, step = Ends(tokenizer), room - doc_stride
    columns: dict[str, list] = {name: [] for name in (*ends.columns, "sentence", "positions")}
    for sentence, words in enumerate(encode_parts(tokenizer, sentences)):
        words = [ids or _tokens_of(word, tokenizer) for word, ids in zip(sentences[sentence], words, strict=True)]
        ids = [token for word in words for token in word]
        firsts = [end - len(word) for end, word in zip(accumulate(map(len, words)), words, strict=True)]
        starts = range(0, max(1, len(ids) - doc_stride), step)
        for start in starts:
            low = start + doc_stride // 2 if start else 0
            high = start + step + doc_stride // 2 if start != starts[-1] else len(ids)
            for name, values in ends.around(ids[start : start + room]).items():
                columns[name].append(values)
            columns["sentence"].append(sentence)
            columns["positions"].append([len(ends.before) + at - start for at in firsts if low <= at < high])
    return columns


def _tokens_of(word: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return tokens for a word that has no token of its own in its sentence, such as a lone variation selector."""
    (encoding,) = encodings(tokenizer, [f" {word}"])
    if encoding.ids:
        return encoding.ids
    return [tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id]


def stitch(windows: Mapping[str, Sequence], values: Iterable[Sequence]) -> list[list]:
    """Join the values of windows, one for each token, to a list for each sentence, one value for each word.

    Args:
        windows: columns `sentence` and `positions` of `cut_windows`.
        values: a sequence for each window. The value of a word is that of its first token.
    """
    parts: dict[int, list] = defaultdict(list)
    for sentence, positions, of_window in zip(windows["sentence"], windows["positions"], values, strict=True):
        parts[sentence].extend(of_window[position] for position in positions)
    return [parts[sentence] for sentence in sorted(parts)]


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
