"""Convert texts with spans of characters, as annotation tools export them, to words with IOB2 tags."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from common.data import Located, Row, parse_json
from common.data.sentences import sentences
from common.errors import brief, tell

from .tagging import split_words

#: columns that hold the spans of a text, in the order of the search
SPAN_COLUMNS = ("spans", "entities", "labels", "label", "annotations", "ner")
_KEYS = {
    "start": ("start", "start_offset", "start_char", "startOffset", "begin"),
    "end": ("end", "end_offset", "end_char", "endOffset", "stop"),
    "label": ("label", "labels", "hypertextlabels", "type", "tag", "entity_group", "entity", "category"),
    "text": ("text", "word", "span"),
}
_EXAMPLES = 3  # of each kind in a message


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of a text, and their label.

    `quoted` is the annotated text if the file repeats it. `apart` says that the annotation consists of several parts,
    of which `start` and `end` are the outer ends.
    """

    start: int
    end: int
    label: str
    quoted: str | None = None
    apart: bool = False


@dataclass
class Annotated:
    """A text and its spans; `words` are spans of characters if the file has words, and `None` if not."""

    text: str
    spans: list[Span]
    words: list[tuple[int, int]] | None = None


class Unusable(Exception):
    """The row has spans that cannot be read; the message says why."""


class Skipped(Exception):
    """The row is not annotated; the message says why."""


def read_annotated(row: Row, text_column: str, span_column: str | None) -> Annotated | None:
    """Return the text and the spans of a row, or None if the row has no spans of characters.

    Args:
        row: a row of doccano, Label Studio (JSON, JSON-MIN or CSV), Prodigy, spaCy, CLUENER or GLiNER, or of `predict`.
        text_column: column with the text.
        span_column: column with the spans; None to search `SPAN_COLUMNS`.

    Raises:
        Unusable: the spans have an error.
        Skipped: the annotator skipped or rejected the row.
    """
    if isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list):
        return _label_studio(row, text_column)
    text = row.get(text_column)
    if not isinstance(text, str):
        return _gliner(row)
    lists = []
    for name in SPAN_COLUMNS if span_column is None else (span_column,):
        value = row.get(name)
        if isinstance(value, str) and value.startswith("["):  # a cell of a table
            try:
                value = parse_json(value)
            except (ValueError, RecursionError):
                continue
        if isinstance(value, dict):
            value = _cluener(value)
        if isinstance(value, list) and all(_looks_like_span(item) for item in value):
            lists.append(value)
    words = _words(row.get("tokens"))
    if (lists or words) and row.get("answer") in ("reject", "ignore"):
        raise Skipped(f"Prodigy's answer is {row['answer']}")
    if lists:
        return Annotated(text, _spans(next(filter(None, lists), []), text), words)
    if words or ("annotation_id" in row and "annotator" in row):
        return Annotated(text, [], words)  # Prodigy and JSON-MIN leave the column of an empty annotation out
    return None


def _cluener(labels: dict) -> list[dict] | None:
    """Return the spans of CLUENER, `{"name": {"text of the span": [[first, last]]}}`, or None for other objects."""
    spans = []
    for label, texts in labels.items():
        for text, places in texts.items() if isinstance(texts, dict) else ():
            for place in places if isinstance(places, list) else ():
                if not (isinstance(place, list) and len(place) == 2 and all(map(_is_offset, place))):
                    return None
                spans.append({"start": place[0], "end": place[1] + 1, "label": label, "text": text})
    return spans if spans or not labels else None


def _gliner(row: Row) -> Annotated | None:
    """Return a row of GLiNER: words in `tokenized_text`, and `[first word, last word, label]` in `ner`."""
    tokens, spans = row.get("tokenized_text"), row.get("ner")
    if not isinstance(tokens, list) or not isinstance(spans, list) or not all(isinstance(t, str) for t in tokens):
        return None
    ends = list(accumulate(len(token) + 1 for token in tokens))
    words = [(end - 1 - len(token), end - 1) for token, end in zip(tokens, ends, strict=True)]
    for span in spans:
        if not _looks_like_span(span) or not 0 <= span[0] <= span[1] < len(words) or not isinstance(span[2], str):
            raise Unusable(f"span {brief(span)}: needed: first word, last word, below {len(words)}, and label")
    found = [Span(words[span[0]][0], words[span[1]][1], span[2]) for span in spans]
    return Annotated(" ".join(tokens), found, words)


def task_text(row: Row, text_column: str) -> Annotated | None:
    """Return the text of a row without its spans, with the words of Prodigy; None if the row has no text.

    Raises:
        Unusable: a task of Label Studio has several texts, none of them named `text_column`.
    """
    data = row["data"] if isinstance(row.get("data"), dict) and text_column not in row else row
    name: str | None = text_column
    if data is not row and text_column not in data:
        texts = [name for name, value in data.items() if isinstance(value, str)]
        if len(texts) > 1:
            raise Unusable(f"data has the texts {', '.join(texts)}; choose one by --text_column_name")
        name = texts[0] if texts else None
    text = data.get(name)
    return Annotated(text, [], _words(row.get("tokens"))) if isinstance(text, str) else _gliner(row)


def _label_studio(task: Row, text_column: str) -> Annotated:
    text = task_text(task, text_column)
    if text is None:
        raise Unusable(f"data has no text; it has {', '.join(task['data']) or 'nothing'}")
    valid = [a for a in task["annotations"] if isinstance(a, dict) and not a.get("was_cancelled")]
    if not valid:
        raise Skipped("the Label Studio task has no annotation")
    chosen = next((a for a in valid if a.get("ground_truth")), valid[0])
    regions = [r for r in chosen.get("result") or [] if isinstance(r, dict) and isinstance(r.get("value"), dict)]
    spans = [r for r in regions if any(name in r["value"] for name in ("labels", "hypertextlabels"))]
    return Annotated(text.text, _spans(spans, text.text))


def _value(span: dict, key: str) -> Any:
    return next((span[name] for name in _KEYS[key] if name in span), None)


def _looks_like_span(item: Any) -> bool:
    if isinstance(item, dict):
        item = item["value"] if isinstance(item.get("value"), dict) else item
        return _value(item, "start") is not None and _value(item, "end") is not None
    return isinstance(item, list) and len(item) >= 3 and all(_is_offset(value) for value in item[:2])


def _is_offset(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _spans(items: list, text: str) -> list[Span]:
    """Return the spans of an annotation list, in Python's characters.

    Raises:
        Unusable: a span has no label, lies outside the text, or belongs to another text.
    """
    found: list[Span] = []
    for item in items:
        if isinstance(item, dict):
            item = item["value"] if isinstance(item.get("value"), dict) else item
            item = item | item.get("globalOffsets", {}) if isinstance(item.get("globalOffsets", {}), dict) else item
            start, end, label, quoted = (_value(item, key) for key in ("start", "end", "label", "text"))
            apart = item.get("apart", False)
        else:
            (start, end, label), quoted, apart = item[:3], None, False
        labels = label if isinstance(label, list) else [label]
        if not (_is_offset(start) and _is_offset(end)):
            raise Unusable(f"span {brief(item)} has no character offsets; needed: integers start and end")
        if not labels or not all(isinstance(name, str) and name.strip() for name in labels):
            raise Unusable(f"span [{start}, {end}] has the label {brief(label)}; needed: a text")
        quoted = quoted if isinstance(quoted, str) else None
        found += [Span(start, end, name.strip(), quoted, apart) for name in labels]
    if any(_differs(span, text) for span in found):
        in_utf16 = [_from_utf16(span, text) for span in found]
        if all(span.quoted is not None and not _differs(span, text) for span in in_utf16):
            found = in_utf16  # JavaScript counts a character outside the basic plane, such as an emoji, as two
    for span in found:
        if not 0 <= span.start < span.end <= len(text):
            raise Unusable(
                f"span [{span.start}, {span.end}] {span.label} does not lie in the text of {len(text)} characters; "
                "start must be below end"
            )
        if _differs(span, text):
            raise Unusable(
                f"span [{span.start}, {span.end}] {span.label} says {span.quoted!r:.60}, but the text has "
                f"{text[span.start : span.end]!r:.60} there; export text and spans again, from the same text"
            )
    return found


def _differs(span: Span, text: str) -> bool:
    """Return whether a span quotes another text; whitespace, which tools change in quotes, does not count."""
    if span.quoted is None or span.apart:
        return False
    bare = ["".join(part.replace("\\n", "").split()) for part in (span.quoted, text[span.start : span.end])]
    return bare[0] != bare[1]


def _from_utf16(span: Span, text: str) -> Span:
    encoded = text.encode("utf-16-le")
    start, end = (len(encoded[: 2 * at].decode("utf-16-le", "ignore")) for at in (span.start, span.end))
    return Span(start, end, span.label, span.quoted, span.apart)


def _words(tokens: Any) -> list[tuple[int, int]] | None:
    """Return the characters of the words of a Prodigy row."""
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, dict) for token in tokens):
        return None
    spans = [(token.get("start"), token.get("end")) for token in tokens]
    return spans if all(_is_offset(start) and _is_offset(end) and start < end for start, end in spans) else None


class SpanConverter:
    """Convert rows with spans to rows of words and IOB2 tags, and count what cannot be kept.

    A text of more than `most_words` words is cut into sentences.

    Args:
        text_column: column with the text.
        span_column: column with the spans; None to search `SPAN_COLUMNS`.
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
                    yield from self._tagged(where, annotated, str(row.get("id", number)))
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
