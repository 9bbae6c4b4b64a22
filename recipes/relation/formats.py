"""Turn the rows of data sets and annotation tools into rows of text, head, tail and label."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from common.data import READERS, Located, Row, Source, parse_json
from common.data.source import Line
from common.errors import brief

#: a line of SemEval-2010 Task 8: number, tab, the sentence in quotation marks
_SENTENCE = re.compile(r"(\d+)\t\s*(.*\S)\s*")
_TAGS = re.compile(r"</?e[12]>")
#: keys of a row of TACRED
TACRED = ("token", "subj_start", "subj_end", "obj_start", "obj_end")
#: keys of a row of FewRel
FEWREL = ("tokens", "h", "t")


class Names(NamedTuple):
    """Names of the columns of a row."""

    text: str
    head: str
    tail: str
    label: str


def read_json(source: Source, names: Names) -> Iterator[Located]:
    """Yield the rows of a JSON file; FewRel's file is an object of a list of rows for each relation."""
    by_relation = _fewrel(source)
    if by_relation is None:
        yield from READERS[source.ending](source)
        return
    for relation, rows in by_relation.items():
        for number, row in enumerate(rows, 1):
            where = f"{source.path}, {relation} row {number}"
            yield where, row | {names.label: relation} if isinstance(row, dict) else "is no object; correct the row"


def _fewrel(source: Source) -> dict[str, list] | None:
    """Return the content of a file of FewRel; None for another file."""
    if source.ending != ".json" or not any(f'"{key}"'.encode() in source.head() for key in FEWREL[1:]):
        return None
    try:
        value = parse_json(source.text())
    except (ValueError, RecursionError):
        return None  # reported by the reader of JSON
    if not isinstance(value, dict) or not value or not all(isinstance(rows, list) and rows for rows in value.values()):
        return None
    first = next(iter(value.values()))[0]
    return value if isinstance(first, dict) and all(key in first for key in FEWREL) else None


def native(row: Row, names: Names) -> Row:
    """Return a row of TACRED or FewRel, or a row of tokens, with the columns `names`; another row unchanged."""
    if all(key in row for key in TACRED):
        mentions = {names.head: _inclusive(row, "subj"), names.tail: _inclusive(row, "obj")}
        row = row | {names.text: row["token"]} | mentions
    elif all(key in row for key in FEWREL):
        row = row | {names.text: row["tokens"], names.head: row["h"], names.tail: row["t"]}
    if "relation" in row and names.label not in row and names.head in row:
        row = row | {names.label: row["relation"]}
    if names.text not in row and "tokens" in row:
        return row | {names.text: row["tokens"]}
    return row


def _inclusive(row: Row, role: str) -> Row:
    """Return a mention of TACRED, whose end is its last token."""
    end = row[f"{role}_end"]
    return {
        "start": row[f"{role}_start"],
        "end": end + 1 if isinstance(end, int) and not isinstance(end, bool) else end,
        "type": row.get(f"{role}_type"),
    }


def is_semeval(source: Source) -> bool:
    """Return whether the first line that is not blank has a sentence with tagged mentions."""
    first = next((line.text for line in source.lines() if line.text.strip()), "")
    return bool(_SENTENCE.fullmatch(first.strip())) and "<e1>" in first


def read_semeval(source: Source, names: Names) -> Iterator[Located]:
    """Yield the rows of a file of SemEval-2010 Task 8 (Hendrickx et al. 2010, https://aclanthology.org/S10-1006).

    A sentence may be followed by a line with its relation, and a line that begins with `Comment`. <e1> is the head.
    """
    waiting: tuple[str, Row | str] | None = None
    for line in source.lines():
        text = line.text.strip()
        sentence = None if line.problem else _SENTENCE.fullmatch(text)
        if sentence or line.problem:
            yield from () if waiting is None else (waiting,)
            waiting = (line.where, line.problem or _semeval_row(sentence, names))
        elif text and waiting is None:
            yield line.where, _not_semeval(line)
        elif text and not text.startswith("Comment"):
            assert waiting is not None
            where, row = waiting
            if isinstance(row, dict) and names.label in row:
                yield line.where, _not_semeval(line)
            elif isinstance(row, dict):
                waiting = (where, row | {names.label: text})
    yield from () if waiting is None else (waiting,)


def _not_semeval(line: Line) -> str:
    return (
        f'{brief(line.text)} is neither a sentence of SemEval-2010 Task 8, such as 1<tab>"The <e1>lid</e1> of the '
        '<e2>jar</e2>.", nor its relation; correct the line'
    )


def _semeval_row(sentence: re.Match, names: Names) -> Row | str:
    marked = sentence[2].removeprefix('"').removesuffix('"')
    if _TAGS.findall(marked) not in (["<e1>", "</e1>", "<e2>", "</e2>"], ["<e2>", "</e2>", "<e1>", "</e1>"]):
        return "needs <e1>...</e1> and <e2>...</e2>, each once; mark both mentions"
    text, at, ends = "", 0, {}
    for tag in _TAGS.finditer(marked):
        text += marked[at : tag.start()]
        ends[tag[0]], at = len(text), tag.end()
    text += marked[at:]
    mentions = ({"start": ends[f"<{tag}>"], "end": ends[f"</{tag}>"]} for tag in ("e1", "e2"))
    return {"id": sentence[1]} | dict(zip(names, (text, *mentions), strict=False))


class Entities(NamedTuple):
    """The entities of a text by id, and its relations: label by the ids of head and tail."""

    entities: dict[Any, Row]
    relations: dict[tuple[Any, Any], str]


def read_entities(row: Row) -> Entities | str | None:
    """Return the entities and relations of a row of doccano, the problem of the row, or None for another row."""
    entities, relations = row.get("entities"), row.get("relations")
    if not isinstance(entities, list) or not isinstance(relations, list):
        return None
    by_id: dict[Any, Row] = {}
    for entity in entities:
        name = entity.get("id") if isinstance(entity, dict) else None
        if not isinstance(name, int | str):
            return f"entity {brief(entity)} has no id; give each entity an id, a number or a text"
        if name in by_id:
            return f"two entities have the id {brief(name)}; give each another id"
        by_id[name] = entity
    found: dict[tuple[Any, Any], str] = {}
    for relation in relations:
        if not isinstance(relation, dict):
            return f"relation {brief(relation)} is no object; needed: from_id, to_id and type"
        pair, label = (relation.get("from_id"), relation.get("to_id")), relation.get("type")
        for name in pair:
            if not isinstance(name, int | str) or name not in by_id:
                known = ", ".join(map(str, by_id)) or "none"
                return f"relation {brief(relation)}: {brief(name)} is no id of an entity; ids here: {known:.200}"
        if pair[0] == pair[1]:
            return f"relation {brief(relation)} has one entity twice; name two"
        if not isinstance(label, str) or not label.strip():
            return f"relation {brief(relation)} has the type {brief(label)}; needed: a text"
        if found.setdefault(pair, label) != label:
            return f"entities {pair[0]} and {pair[1]} have two relations, {found[pair]} and {label}; keep one"
    return Entities(by_id, found)
