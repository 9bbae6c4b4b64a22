"""Split documents into sentences, and into pieces that fit a model and join to the same document."""

import re
from collections.abc import Callable

import regex

#: end of a sentence: final punctuation, closing quotes and brackets, and the whitespace before the next sentence
_END = regex.compile(r"(?<=[.!?…।॥؟۔።։။។])[\"'”’»)\]]*\s+(?=[\"'“‘«(\[¿¡]*[\w])|(?<=[。！？])[」』”）]*")
#: places to split a sentence that is too long for a model, best first
_WEAKER = (re.compile(r"(?<=[;:—–])\s+"), re.compile(r"(?<=[,、，])\s*"), re.compile(r"\s+"))
_ABBREVIATION = regex.compile(
    r"(?:^|[^\w\p{M}])(?:Mr|Mrs|Ms|Dr|Prof|St|Gov|Gen|Sen|Rep|Lt|Col|Rev|No|Nr|vs|etc|Inc|Corp|Co|Ltd|Bros|z\.\s?B|d\.\s?h|e\.g|i\.e|bzw|ca|\w\p{M}*|\d{1,2})\.\s*$"
)

#: a piece, and the text between it and the next piece
Piece = tuple[str, str]


def pieces(text: str, fits: Callable[[str], bool]) -> list[Piece]:
    """Split `text` into pieces that fit a model. The joined pieces are `text` again.

    A line that fits stays one piece. A longer line is split into sentences. A longer sentence is split at semicolons,
    then commas, then between words, and finally between characters.

    Args:
        text: the document.
        fits: returns whether the model can read a text at once.

    Returns:
        The pieces, each with the whitespace after it.
    """
    body = text.rstrip()
    result: list[Piece] = []
    for line, newline in _parts(body, re.compile(r"\s*\n\s*")):
        parts = [(line, "")] if fits(line) else _fitting(_sentences(line), fits, 0)
        parts[-1] = (parts[-1][0], parts[-1][1] + newline)
        result += parts
    result[-1] = (result[-1][0], result[-1][1] + text[len(body) :])
    return result


def sentences(text: str) -> list[str]:
    """Split `text` into sentences, in order; a line break ends a sentence too. Only whitespace is dropped."""
    parts = [part.strip() for line in text.splitlines() for part, _ in _sentences(line.strip())]
    return [part for part in parts if part]


def joined(translated: list[str], cut: list[Piece]) -> str:
    """Join the translations of the pieces `cut` with the text between the pieces."""
    return "".join(text + after for text, (_, after) in zip(translated, cut, strict=True))


def _parts(text: str, places: re.Pattern[str] | regex.Pattern[str]) -> list[Piece]:
    parts, start = [], 0
    for place in places.finditer(text):
        if place.end() < len(text) and place.start() > start:
            # closing punctuation stays with its sentence; only whitespace separates two sentences
            after = len(place[0]) - len(place[0].lstrip()) if place[0][:1].isspace() else len(place[0].rstrip())
            middle = place.start() if place[0][:1].isspace() else place.start() + after
            parts.append((text[start:middle], text[middle : place.end()]))
            start = place.end()
    return [*parts, (text[start:], "")]


def _sentences(line: str) -> list[Piece]:
    result: list[Piece] = []
    for text, after in _parts(line, _END):
        if result and _ABBREVIATION.search(result[-1][0]):
            before, between = result.pop()
            text = before + between + text
        result.append((text, after))
    return result


def _fitting(parts: list[Piece], fits: Callable[[str], bool], level: int) -> list[Piece]:
    """Split the `parts` that are too long, then merge neighbours of one split while they fit."""
    result: list[Piece] = []
    for text, after in parts:
        if not text or fits(text):
            result.append((text, after))
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
        result += merged
    return result


def _between_characters(text: str, fits: Callable[[str], bool]) -> list[Piece]:
    result, start, length = [], 0, len(text)
    while start < len(text):
        # start near the last length that fitted: starting from the whole rest takes quadratic time
        length = min(2 * length, len(text) - start)
        while length > 1 and not fits(text[start : start + length]):
            length = length * 2 // 3
        result.append((text[start : start + length], ""))
        start += length
    return result
