"""Convert texts with spans of characters to words with IOB2 tags, and count what cannot be kept."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from common.data import Located
from common.data.sentences import sentences
from common.data.words import split_words
from common.errors import tell

from .annotations import Annotated, Skipped, Span, Unusable, read_annotated

_EXAMPLES = 3  # of each kind in a message


class SpanConverter:
    """Convert rows with spans to rows of words and IOB2 tags, and count what cannot be kept.

    A text of more than `most_words` words is cut into sentences.

    Args:
        text_column: column with the text.
        span_column: column with the spans; None to search `annotations.SPAN_COLUMNS`.
        names: names of the words and the tags in the new rows.
        most_words: words of the longest text that stays one row.
    """

    def __init__(self, text_column: str, span_column: str | None, names: tuple[str, str], most_words: int):
        self.text_column, self.span_column, self.names, self.most_words = text_column, span_column, names, most_words
        self.counts: dict[str, list[str]] = defaultdict(list)
        self.documents, self.pieces, self.skipped = 0, 0, defaultdict(list)

    def rows(self, located: Iterator[Located]) -> Iterator[Located]:
        """Yield the rows, those with spans converted; then print what was counted."""
        place = None
        for number, (where, row) in enumerate(located, 1):
            place = place or where.rsplit(":", 1)[0].split(", row ")[0]
            if isinstance(row, str):
                yield where, row
                continue
            try:
                annotated = read_annotated(row, self.text_column, self.span_column)
            except Unusable as error:
                yield where, str(error)
            except Skipped as reason:
                self.skipped[str(reason)].append(Path(where).name)
            else:
                if annotated is None or all(isinstance(row.get(name), list) for name in self.names):
                    yield where, row
                elif not annotated.text.strip():
                    self.skipped["the text is blank"].append(Path(where).name)
                else:
                    for at, tagged in self._tagged(where, annotated, str(row.get("id", number))):
                        yield at, row | tagged
        self._report(place or "")

    def _tagged(self, where: str, row: Annotated, identity: str) -> Iterator[Located]:
        spans = self._without_overlap(where, row)
        words, tags = align(row.text, spans, row.words)
        split = {edge for start, end in row.words or split_words(row.text) for edge in range(start + 1, end)}
        for span in spans:
            if span.start in split or span.end in split:
                self._count("spans that start or end inside a word, which is cut there", where, row.text, span)
        parts = [(0, len(words))]
        if len(words) > self.most_words:
            parts = list(_sentence_parts(row.text, words, tags))
            self.documents, self.pieces = self.documents + 1, self.pieces + len(parts)
        for number, (first, last) in enumerate(parts, 1):
            texts = [row.text[start:end] for start, end in words[first:last]]
            name = identity if len(parts) == 1 else f"{identity}-{number}"
            yield where, {self.names[0]: texts, self.names[1]: tags[first:last], "id": name}

    def _without_overlap(self, where: str, row: Annotated) -> list[Span]:
        """Return the spans without blanks at their ends; of overlapping spans keep the longest, then the first."""
        kept: list[Span] = []
        for span in sorted(dict.fromkeys(row.spans), key=lambda span: (span.start - span.end, span.start)):
            inner = row.text[span.start : span.end]
            start = span.start + len(inner) - len(inner.lstrip())
            end = start + len(inner.strip())
            if start == end:
                self._count("spans of blanks, which are dropped", where, row.text, span)
                continue
            if (start, end) != (span.start, span.end):
                self._count("spans with a blank at an end, which is left out", where, row.text, span)
                span = Span(start, end, span.label, span.quoted, span.apart)
            rival = next((other for other in kept if other.start < end and start < other.end), None)
            if rival is None:
                kept.append(span)
                if span.apart:
                    self._count("spans of several parts, which become one from first to last", where, row.text, span)
            elif (rival.start, rival.end, rival.label) != (start, end, span.label):
                same = (rival.start, rival.end) == (start, end)
                nested = rival.start <= start and end <= rival.end
                kind = (
                    "spans with two labels, of which the first is kept"
                    if same
                    else "spans inside a longer span, which alone is kept"
                    if nested
                    else "spans that overlap a longer or earlier span, which alone is kept"
                )
                self._count(kind, where, row.text, span)
        return sorted(kept, key=lambda span: span.start)

    def _count(self, kind: str, where: str, text: str, span: Span) -> None:
        self.counts[kind].append(f"{Path(where).name} {text[span.start : span.end]!r:.40} {span.label}")

    def _report(self, place: str) -> None:
        for kind, examples in self.counts.items():
            shown = "; ".join(examples[:_EXAMPLES]) + ("; ..." if len(examples) > _EXAMPLES else "")
            tell(f"{place}: {kind}: {len(examples)} ({shown})")
        for reason, rows in self.skipped.items():
            shown = "; ".join(rows[:_EXAMPLES]) + ("; ..." if len(rows) > _EXAMPLES else "")
            tell(f"{place}: rows left out, because {reason}: {len(rows)} ({shown})")
        if self.documents:
            long = f"texts of more than {self.most_words} words"
            tell(f"{place}: {long}, cut into {self.pieces} sentences: {self.documents}")
        self.counts.clear()
        self.skipped.clear()
        self.documents = self.pieces = 0


def align(
    text: str, spans: list[Span], words: list[tuple[int, int]] | None = None
) -> tuple[list[tuple[int, int]], list[str]]:
    """Split a text into words, cut so that each span starts and ends with a word.

    Args:
        text: the text.
        spans: spans without overlap, in order.
        words: the words of the file, as spans of characters; `split_words` if None.

    Returns:
        The characters of each word, and its IOB2 tag.
    """
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    pieces: list[tuple[int, int]] = []
    words = _covering(text, words, spans) if words else split_words(text)
    position = 0
    for start, end in words:
        while position < len(edges) and edges[position] <= start:
            position += 1
        at = position
        while at < len(edges) and edges[at] < end:
            pieces.append((start, edges[at]))
            start, at = edges[at], at + 1
        pieces.append((start, end))
    pieces = [(start, end) for start, end in pieces if text[start:end].strip()]
    tags, position, tagged = [], 0, -1
    for start, _ in pieces:
        while position < len(spans) and spans[position].end <= start:
            position += 1
        if position < len(spans) and spans[position].start <= start:
            tags.append(f"{'I' if tagged == position else 'B'}-{spans[position].label}")
            tagged = position
        else:
            tags.append("O")
    return pieces, tags


def _covering(text: str, words: list[tuple[int, int]], spans: list[Span]) -> list[tuple[int, int]]:
    """Add the words of `split_words` where the words of the file leave out a part of a span."""
    words = [(start, end) for start, end in sorted(words) if end <= len(text)]
    missing = []
    for start, end in split_words(text):
        covered = any(a < end and start < b for a, b in words)
        if not covered and any(span.start < end and start < span.end for span in spans):
            missing.append((start, end))
    return sorted(words + missing)


def _sentence_parts(text: str, words: list[tuple[int, int]], tags: list[str]) -> Iterator[tuple[int, int]]:
    """Yield the first word and the word after the last of each sentence; no sentence ends within an entity."""
    ends, at = [], 0
    for sentence in sentences(text):
        at = text.index(sentence, at) + len(sentence)
        ends.append(at)
    first, position = 0, 0
    for i, (start, _) in enumerate(words):
        ended = position < len(ends) and ends[position] <= start
        while position < len(ends) and ends[position] <= start:
            position += 1
        if ended and i > first and not tags[i].startswith("I-"):
            yield first, i
            first = i
    yield first, len(words)
