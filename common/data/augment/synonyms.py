"""Look up English synonyms in a table made from WordNet 3.0 by `common.tools.synonyms`.

`WORDNET-LICENSE` in this folder is the licence of the table.
"""

import gzip
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("synonyms.tsv.gz")
#: mark of a synonym in the table whose plural or third person is not regular
IRREGULAR = "!"
#: ends of words that take -es
_SIBILANTS = ("s", "x", "z", "ch", "sh")


@cache
def _table() -> dict[str, tuple[str, list[str]]]:
    """Return word -> part of speech (n, v, a or r), and synonyms, the most similar first."""
    lines = gzip.decompress(FILE.read_bytes()).decode().splitlines()
    return {word: (pos, others.split()) for word, pos, others in (line.split("\t") for line in lines)}


def synonyms_of(word: str) -> list[str]:
    """Return the synonyms of an English word in its dominant part of speech and first sense, in its letter case.

    A regular plural or third person (films, begins) has those of its base form, inflected. A word without synonyms, in
    another form or of another language has none.
    """
    lower = word.lower()
    found = [other.rstrip(IRREGULAR) for other in _table().get(lower, ("", []))[1]]
    for base in [] if found else _bases(lower):
        pos, others = _table().get(base, ("", []))
        if pos in ("n", "v"):
            found = [_with_s(other) for other in others if not other.endswith(IRREGULAR)]
            break
    if word.isupper() and len(word) > 1:
        return [other.upper() for other in found]
    return [other.capitalize() for other in found] if word[:1].isupper() else found


def _bases(word: str) -> list[str]:
    """Return the words that `_with_s` may have turned into `word`."""
    if not word.endswith("s") or word.endswith("ss"):
        return []
    endings = (("ies", "y"), ("es", ""), ("s", ""))
    return [
        base for old, new in endings if word.endswith(old) and _with_s(base := word.removesuffix(old) + new) == word
    ]


def _with_s(word: str) -> str:
    """Return the regular plural of a noun, or third person of a verb."""
    if word.endswith("y") and word[-2:-1] not in set("aeiou"):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(_SIBILANTS) else "s")
