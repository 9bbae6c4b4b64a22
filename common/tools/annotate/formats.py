"""Write tasks of Label Studio and rows of doccano with guessed labels, which an annotator corrects there.

Label Studio imports a list of tasks with `predictions`, for a project whose labelling interface has the names of
`choices_interface` or `spans_interface`. doccano imports JSON Lines; it exports further values of a row unchanged.
Offsets count Unicode characters in both.
"""

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from common.data.source import Row

#: names of the labels and of the texts in a labelling interface
FROM = "label"
#: an entity: its first character, the character after its last, and its label
Span = tuple[int, int, str]


def choices_task(texts: dict[str, str], labels: Sequence[str], more: Row) -> Row:
    """Return a task with classes of a text, or of a pair of texts.

    Args:
        texts: name -> text.
        labels: the guessed classes.
        more: further values of the task.
    """
    first = next(iter(texts))
    result = {"from_name": FROM, "to_name": first, "type": "choices", "value": {"choices": list(labels)}}
    return _task(more | texts, [result] if labels else [])


def spans_task(text: str, spans: Sequence[Span], more: Row) -> Row:
    """Return a task with labelled spans of a text."""
    found = [
        {
            "from_name": FROM,
            "to_name": "text",
            "type": "labels",
            "value": {"start": start, "end": end, "text": text[start:end], "labels": [label]},
        }
        for start, end, label in spans
    ]
    return _task(more | {"text": text}, found)


def _task(data: Row, result: list[dict[str, Any]]) -> Row:
    return {"data": data, "predictions": [{"model_version": "annotate", "result": result}]}


def choices_interface(texts: Sequence[str], labels: Sequence[str], several: bool) -> str:
    """Return the labelling interface for `choices_task`.

    Args:
        texts: names of the texts.
        labels: all classes.
        several: whether a text may have several classes.
    """
    shown = [f"  <Text name={quoteattr(name)} value={quoteattr('$' + name)}/>" for name in texts]
    options = [f"    <Choice value={quoteattr(label)}/>" for label in labels]
    choice = "multiple" if several else "single"
    opening = f'  <Choices name="{FROM}" toName={quoteattr(texts[0])} choice="{choice}">'
    return "\n".join(["<View>", *shown, opening, *options, "  </Choices>", "</View>", ""])


def spans_interface(labels: Sequence[str]) -> str:
    """Return the labelling interface for `spans_task`; `labels` are all types of spans."""
    options = [f"    <Label value={quoteattr(label)}/>" for label in labels]
    opening = f'  <Labels name="{FROM}" toName="text">'
    return "\n".join(["<View>", opening, *options, "  </Labels>", '  <Text name="text" value="$text"/>', "</View>", ""])


def doccano_row(text: str, labels: Sequence[str] | Sequence[Span], more: Row) -> Row:
    """Return a row of doccano: a text with classes, or with spans as lists of start, end and label."""
    return more | {"text": text, "label": [list(one) if isinstance(one, tuple) else one for one in labels]}
