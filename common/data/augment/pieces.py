"""Cut a text with character spans into words that may change and protected spans, and join the pieces again."""

from dataclasses import dataclass, field
from itertools import accumulate

import regex

from common.data.words import WORD

#: addresses, user names and hashtags as one word; words with inner hyphens and apostrophes (well-known, don't)
_WORDS = regex.compile(rf"https?://\S+|www\.\S+|[@\#]\S+|{WORD}(?:['’-]{WORD})*")


@dataclass(frozen=True)
class SpanText:
    """A text with character spans, such as answers, mentions of entities, or the head and the tail of a relation.

    Attributes:
        text: the text.
        spans: first character, and the character after the last, of each span. Spans may overlap, and none is empty.
        labels: label of each span, for the replacement of mentions; empty if spans have none.
        words: characters of each word, in order; None to find the words in the text.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    labels: tuple[str, ...] = ()
    words: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        wrong = [span for span in self.spans if not 0 <= span[0] < span[1] <= len(self.text)]
        if wrong:
            raise ValueError(f"span {wrong[0]}: not in a text of {len(self.text)} characters, or empty")
        if self.labels and len(self.labels) != len(self.spans):
            raise ValueError(f"{len(self.labels)} labels of {len(self.spans)} spans")


@dataclass
class Piece:
    """A word, or a protected part of a text.

    Attributes:
        text: its characters.
        spans: number of each span in it, with its first character and the character after its last, from the begin of
            the piece. Empty for a word.
        start: its first character in the text before the changes; None for a new word.
    """

    text: str
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    start: int | None = None

    @property
    def free(self) -> bool:
        """Return whether the piece is a word with a letter or digit, which may change."""
        return not self.spans and any(character.isalnum() for character in self.text)


class Pieces:
    """The pieces of a text in order. `gaps[i]` is the text before piece i; the last gap is the text after all pieces.

    Overlapping spans are one piece. A word that a span cuts stays beside the span: it is part of a gap.
    """

    def __init__(self, row: SpanText):
        self.row = row
        words = [match.span() for match in _WORDS.finditer(row.text)] if row.words is None else list(row.words)
        blocks: list[tuple[int, int, list[int]]] = []
        for number in sorted(range(len(row.spans)), key=lambda i: row.spans[i]):
            start, end = row.spans[number]
            if blocks and start < blocks[-1][1]:
                first, last, numbers = blocks[-1]
                blocks[-1] = (first, max(last, end), [*numbers, number])
            else:
                blocks.append((start, end, [number]))
        cut: list[tuple[int, int, list[int]]] = []
        block = 0
        for start, end in words:
            while block < len(blocks) and blocks[block][1] <= start:
                block += 1
            if block == len(blocks) or end <= blocks[block][0]:
                cut.append((start, end, []))
        cut = sorted(cut + blocks)
        self.pieces = [
            Piece(row.text[start:end], [(i, row.spans[i][0] - start, row.spans[i][1] - start) for i in numbers], start)
            for start, end, numbers in cut
        ]
        edges = [0, *(edge for start, end, _ in cut for edge in (start, end)), len(row.text)]
        self.gaps = [row.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]

    def free(self) -> list[int]:
        """Return the numbers of the words that may change."""
        return [i for i, piece in enumerate(self.pieces) if piece.free]

    def insert(self, at: int, word: str) -> None:
        """Insert a word before piece `at`, or after the last piece, with a space between."""
        last = at == len(self.pieces)
        self.pieces.insert(at, Piece(word))
        self.gaps.insert(at + (not last), " ")

    def delete(self, at: int) -> None:
        """Delete a piece and the space before it, or the space after it if the text begins with it."""
        before, after = self.gaps[at], self.gaps[at + 1]
        if before[-1:].isspace():
            before = before[:-1]
        elif at == 0 and after[:1].isspace():
            after = after[1:]
        del self.pieces[at]
        self.gaps[at : at + 2] = [before + after]

    def joined(self) -> SpanText:
        """Return the text of all pieces and gaps, with the spans at their new places."""
        parts = [self.gaps[0]]
        for piece, gap in zip(self.pieces, self.gaps[1:], strict=True):
            parts += [piece.text, gap]
        starts = list(accumulate(map(len, parts)))[:-1:2]
        spans: list[tuple[int, int]] = [(0, 0)] * len(self.row.spans)
        for start, piece in zip(starts, self.pieces, strict=True):
            for number, first, last in piece.spans:
                spans[number] = (start + first, start + last)
        return SpanText("".join(parts), tuple(spans), self.row.labels)
