"""Documents to sentences, and to pieces that a model can read, which join to the document again."""

import re
from collections.abc import Callable

#: the end of a sentence: its mark, what may close after it, and the blanks before what can begin another
_END = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+(?=[\"'“‘«(\[¿¡]*[\w])|(?<=[。！？])[」』”）]*")
#: where a sentence that is too long for a model is split, the best place first
_WEAKER = (re.compile(r"(?<=[;:—–])\s+"), re.compile(r"(?<=[,、，])\s*"), re.compile(r"\s+"))
_ABBREVIATION = re.compile(
    r"(?:^|\W)(?:Mr|Mrs|Ms|Dr|Prof|St|No|Nr|vs|etc|z\.\s?B|d\.\s?h|e\.g|i\.e|bzw|ca|\w|\d{1,2})\.\s*$"
)

#: a piece, and what stands between it and the next
Piece = tuple[str, str]


def pieces(text: str, fits: Callable[[str], bool]) -> list[Piece]:
    """`text` cut into pieces that `fits` says a model can read, each with the blanks after it; joined they are `text`.

    A text that fits and is one line stays as it is. Else each line is split into sentences, and a sentence that is too
    long at its semicolons, commas, and at last between words. What has no blank and is too long is cut between
    characters. Nothing is left out.
    """
    body = text.rstrip()
    found: list[Piece] = []
    for line, newline in _parts(body, re.compile(r"\s*\n\s*")):
        parts = [(line, "")] if fits(line) else _fitting(_sentences(line), fits, 0)
        parts[-1] = (parts[-1][0], parts[-1][1] + newline)
        found += parts
    found[-1] = (found[-1][0], found[-1][1] + text[len(body) :])
    return found


def sentences(text: str) -> list[str]:
    """The sentences of `text`, in order; a line break ends one too. Nothing but blanks is left out."""
    return [part for line in text.splitlines() for part, _ in _sentences(line.strip()) if part.strip()]


def joined(translated: list[str], cut: list[Piece]) -> str:
    """Translations of pieces with what stood between these."""
    return "".join(text + after for text, (_, after) in zip(translated, cut, strict=True))


def _parts(text: str, places: re.Pattern) -> list[Piece]:
    found, start = [], 0
    for place in places.finditer(text):
        if place.end() < len(text) and place.start() > start:
            # what closes a sentence stays with it, and only blanks stand between two
            after = len(place[0]) - len(place[0].lstrip()) if place[0][:1].isspace() else len(place[0].rstrip())
            middle = place.start() if place[0][:1].isspace() else place.start() + after
            found.append((text[start:middle], text[middle : place.end()]))
            start = place.end()
    return [*found, (text[start:], "")]


def _sentences(line: str) -> list[Piece]:
    found: list[Piece] = []
    for text, after in _parts(line, _END):
        if found and _ABBREVIATION.search(found[-1][0]):
            before, between = found.pop()
            text = before + between + text
        found.append((text, after))
    return found


def _fitting(parts: list[Piece], fits: Callable[[str], bool], level: int) -> list[Piece]:
    """`parts`, those that are too long split further, and neighbours from such a split joined while they fit."""
    found: list[Piece] = []
    for text, after in parts:
        if not text or fits(text):
            found.append((text, after))
            continue
        if level < len(_WEAKER):
            smaller = _fitting(_parts(text, _WEAKER[level]), fits, level + 1)
        else:
            smaller = _between_characters(text, fits)
        merged = [smaller[0]]
        for piece in smaller[1:]:
            both = merged[-1][0] + merged[-1][1] + piece[0]
            if fits(both):
                merged[-1] = (both, piece[1])
            else:
                merged.append(piece)
        merged[-1] = (merged[-1][0], merged[-1][1] + after)
        found += merged
    return found


def _between_characters(text: str, fits: Callable[[str], bool]) -> list[Piece]:
    found, start, length = [], 0, len(text)
    while start < len(text):
        # from what fitted last: to try all that is left takes quadratic time
        length = min(2 * length, len(text) - start)
        while length > 1 and not fits(text[start : start + length]):
            length = length * 2 // 3
        found.append((text[start : start + length], ""))
        start += length
    return found
