"""Read texts with spans of characters from the rows of annotation tools."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from common.data import Row, parse_json
from common.errors import brief

#: columns that hold the spans of a text, in the order of the search
SPAN_COLUMNS = ("spans", "entities", "labels", "label", "annotations", "ner")
_KEYS = {
    "start": ("start", "start_offset", "start_char", "startOffset", "begin"),
    "end": ("end", "end_offset", "end_char", "endOffset", "stop"),
    "label": ("label", "labels", "hypertextlabels", "type", "tag", "entity_group", "entity", "category"),
    "text": ("text", "word", "span"),
}


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
    """Return the text of a row without its spans, with words in the form of Prodigy; None if the row has no text.

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
    return Annotated(text, [], _words(data.get("tokens"))) if isinstance(text, str) else _gliner(row)


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
    return Annotated(text.text, _spans(spans, text.text), text.words)


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
