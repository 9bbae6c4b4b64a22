"""Make the table of English synonyms of `common.data.augment` from the dictionary files of WordNet 3.0.

    apt-get download wordnet-base && dpkg-deb -x wordnet-base*.deb wordnet
    python -m common.tools.synonyms wordnet/usr/share/wordnet

Debian's package wordnet-base has the files of Princeton University; their licence is beside the table. A word is in the
table if one part of speech has most of its uses (`DOMINANT`) in WordNet's counts, and one sense most of these
(`FIRST_SENSE`). Its synonyms are the words of that sense. Two filters remove words that fit only in other senses: the
sense is one of the synonym's first two senses, and the embedded encoder finds the two words similar (`SIMILAR`).
"""

import argparse
import gzip
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers import AutoModel, AutoTokenizer

from common.args import DEFAULT_ENCODER
from common.data.augment.synonyms import FILE, IRREGULAR
from common.models.load import resolve_model

POS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
#: number of a part of speech in cntlist.rev -> part of speech; 5 are adjectives similar to another
NUMBERS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
#: least share of a word's uses that have its part of speech, and of these that have its first sense
DOMINANT, FIRST_SENSE = 0.6, 0.4
#: least cosine of the embeddings of a word and its synonym
SIMILAR = 0.5
#: most synonyms of a word
MOST = 6
_WORD = re.compile(r"[a-z]{3,}")


@dataclass
class Dictionary:
    """WordNet's files.

    Attributes:
        senses: (word, part of speech) -> synsets, the most frequent first.
        words: synset -> its words.
        counts: (word, part of speech) -> uses of each sense in the tagged texts of WordNet.
        irregular: (word, part of speech) pairs with irregular inflection.
    """

    senses: dict[tuple[str, str], list[tuple[str, str]]]
    words: dict[tuple[str, str], list[str]]
    counts: dict[tuple[str, str], dict[int, int]]
    irregular: set[tuple[str, str]]


def read(folder: Path) -> Dictionary:
    """Read the dictionary files in a folder."""
    found = Dictionary({}, {}, defaultdict(dict), set())
    for pos in POS:
        for fields in _lines(folder / f"index.{pos}"):
            # word, part of speech, number of synsets, number of pointers, pointers, ..., offsets of the synsets
            found.senses[fields[0], pos] = [(pos, offset) for offset in fields[-int(fields[2]) :]]
        for fields in _lines(folder / f"data.{pos}"):
            count = int(fields[3], 16)
            names = [re.sub(r"\(\w+\)$", "", name) for name in fields[4 : 4 + 2 * count : 2]]
            found.words[pos, fields[0]] = names
        found.irregular |= {(base, pos) for _, *bases in _lines(folder / f"{pos}.exc") for base in bases}
    for key, sense, uses in _lines(folder / "cntlist.rev"):
        word, _, rest = key.partition("%")
        found.counts[word, NUMBERS[rest[0]]][int(sense)] = int(uses)
    return found


def _lines(file: Path) -> Iterator[list[str]]:
    with open(file, encoding="utf-8") as lines:
        yield from (line.split() for line in lines if not line.startswith("  "))  # the licence is indented


def part_of_speech(word: str, dictionary: Dictionary) -> str | None:
    """Return the dominant part of speech of a word whose first sense is dominant; None for other words."""
    uses = {pos: sum(dictionary.counts[word, pos].values()) for pos in POS if (word, pos) in dictionary.senses}
    pos = max(uses, key=lambda pos: uses[pos])
    if not any(uses.values()):
        return pos if len(uses) == 1 and len(dictionary.senses[word, pos]) == 1 else None
    first = dictionary.counts[word, pos].get(1, 0)
    return pos if uses[pos] >= DOMINANT * sum(uses.values()) and first >= FIRST_SENSE * uses[pos] else None


def pairs(dictionary: Dictionary) -> Iterator[tuple[str, str, str]]:
    """Yield word, part of speech and synonym."""
    for word in sorted({word for word, _ in dictionary.senses}):
        if not _WORD.fullmatch(word) or word in ENGLISH_STOP_WORDS:
            continue
        pos = part_of_speech(word, dictionary)
        if pos is None:
            continue
        synset = dictionary.senses[word, pos][0]
        for other in dict.fromkeys(dictionary.words[synset]):
            fits = _WORD.fullmatch(other) and other != word and other not in ENGLISH_STOP_WORDS
            if fits and synset in dictionary.senses[other, pos][:2]:
                yield word, pos, other


@torch.inference_mode()
def embeddings(words: list[str]) -> torch.Tensor:
    """Return the mean-pooled, normalised embedding of each word by the embedded encoder, (words, width)."""
    folder = resolve_model(DEFAULT_ENCODER)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for start in range(0, len(words), 256):
        batch = tokenizer(words[start : start + 256], padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        states = model(**batch).last_hidden_state * mask
        parts.append(F.normalize(states.sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with index.noun, data.noun, ...")
    parser.add_argument("--output", type=Path, default=FILE)
    options = parser.parse_args()
    dictionary = read(options.folder)
    found = list(pairs(dictionary))
    words = sorted({word for one, _, other in found for word in (one, other)})
    number = {word: i for i, word in enumerate(words)}
    vectors = embeddings(words)
    table: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for word, pos, other in found:
        similar = float(vectors[number[word]] @ vectors[number[other]])
        if similar >= SIMILAR:
            mark = IRREGULAR if (other, pos) in dictionary.irregular else ""
            table[word, pos].append((round(-similar, 4), other + mark))
    lines = [
        f"{word}\t{POS[pos]}\t{' '.join(other for _, other in sorted(others)[:MOST])}\n"
        for (word, pos), others in table.items()
    ]
    with open(options.output, "wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file:
        file.write("".join(lines).encode())
    print(f"{options.output}: {len(lines):,} words of {len({word for word, *_ in found}):,} with a synonym")


if __name__ == "__main__":
    main()
