"""Load pairs of mentions with their relations, checked, from files of all formats."""

from collections.abc import Iterable, Iterator
from itertools import permutations
from pathlib import Path

from datasets import Dataset, DatasetDict

from common.args import FileArguments
from common.data import READERS, UNLABELED, Gold, Located, Row, Source, load_splits, read_file
from common.data.labels import check_number, label_counts, warn_of_alike, warn_of_few, warn_of_unseen
from common.data.tables import TableRow
from common.errors import InputError, brief, tell, warn

from .arguments import NO_RELATION, RelationDataArguments
from .formats import Names, is_semeval, native, read_entities, read_json, read_semeval
from .mentions import MENTIONS, Mention, Unusable, of_cell, overlap, read_mention, read_pair, read_text, words_between

PLAIN = (".txt", ".text")
#: texts that stand for "no label"
NO_LABEL = ("", "-")


def read_rows(path: str | Path, args: FileArguments, names: Names, predicting: bool = False) -> Iterator[Located]:
    """Yield the rows of a file as they are, and of SemEval's and FewRel's files with the columns `names`.

    Args:
        path: the file.
        args: how to read the file.
        names: names of the columns.
        predicting: a text file may have a text a line.
    """

    def text(source: Source) -> Iterator[Located]:
        if predicting and not is_semeval(source):
            yield from READERS[".txt"](source)
            return
        for where, row in read_semeval(source, names):
            yield where, row if predicting or isinstance(row, str) else {names.label: None} | row

    def json(source: Source) -> Iterator[Located]:
        return read_json(source, names)

    return read_file(path, READERS | {".json": json} | dict.fromkeys(PLAIN, text), args)


def plain_row(row: Row, names: Names) -> Row:
    """Return a row with the columns `names`; cells of a table that hold lists or objects are parsed."""
    row = _as_table(native(row, names), row)
    if not isinstance(row, TableRow):
        return row
    text = row.get(names.text)
    of_words = isinstance(text, str) and "tokens" in row and text == row["tokens"]
    cells = {names.text: of_cell(row, text, words=True)} if of_words else {}
    if isinstance(text, str) and not of_words and isinstance(value := of_cell(row, text), list):
        cells = {names.text: value}  # a text may begin with "[" too
    cells |= {name: of_cell(row, row[name]) for name in (names.head, names.tail) if name in row}
    return _as_table(row | cells, row)


def _as_table(row: Row, origin: Row) -> Row:
    """Return a changed row of a table with the table, for messages about its header."""
    return TableRow(row, origin.table) if isinstance(origin, TableRow) and not isinstance(row, TableRow) else row


class PairBuilder:
    """Turn the rows of all splits into rows with one pair each.

    A row of entities and relations becomes a row for each relation, and with `--other_pairs` for each other pair of
    entities whose types have a relation in a training row.
    """

    def __init__(self, args: RelationDataArguments, names: Names):
        self.args, self.names = args, names
        wanted = args.no_relation_label
        self.no_relation = NO_RELATION[0] if wanted == "auto" else wanted
        self.others = args.other_pairs and wanted != "none"

    def __call__(self, sources: dict[str, Iterable[Located]]) -> dict[str, list[Located]]:
        """Return the rows of each split."""
        found = {split: [part for located in rows for part in self._parts(*located)] for split, rows in sources.items()}
        types = {types for _, _, types, related in found.get("train", []) if related}
        kept = {
            split: [(where, row) for where, row, of_row, related in parts if related or of_row in types]
            for split, parts in found.items()
        }
        for split, parts in found.items():
            from_entities = [related for _, _, of_row, related in parts if of_row is not None]
            if from_entities:
                related = sum(from_entities)
                others = len(kept[split]) - len(parts) + len(from_entities) - related
                tell(
                    f"{split}: {related:,} relations, and {others:,} other pairs of entities as {self.no_relation}"
                    + ("" if self.others else " (--other_pairs false)")
                )
        return kept

    def _parts(self, where: str, row: Row | str) -> Iterator[tuple[str, Row | str, tuple | None, bool]]:
        """Yield place, row, the types of a pair from entities, and whether the row is kept in any case."""
        if isinstance(row, str):
            yield where, row, None, True
            return
        row = plain_row(row, self.names)
        annotated = read_entities(row) if self.names.head not in row else None
        if annotated is None or isinstance(annotated, str):
            yield where, row if annotated is None else annotated, None, True
            return
        try:
            text, tokens = read_text(row.get(self.names.text))
            mentions = {
                name: read_mention(f"entity {name}", entity, text, tokens)
                for name, entity in annotated.entities.items()
            }
        except Unusable as error:
            yield where, str(error), None, True
            return
        for number, (one, other) in enumerate(permutations(mentions, 2)):
            head, tail = mentions[one], mentions[other]
            label = annotated.relations.get((one, other))
            if label is None and not (self.others and self._near(text, head, tail)):
                continue
            pair = {self.names.text: text, self.names.head: head.in_row(text), self.names.tail: tail.in_row(text)}
            pair |= {self.names.label: self.no_relation if label is None else label}
            pair |= {name: row[name] for name in (self.args.domain_column,) if name in row}
            yield where, pair | {"id": f"{row.get('id', where)}-{number}"}, (head.type, tail.type), label is not None

    def _near(self, text: str, head: Mention, tail: Mention) -> bool:
        return not overlap(head, tail) and words_between(text, head, tail) <= self.args.max_distance


def check_mentions(row: Row) -> Iterator[str]:
    """Yield a message for each problem of the text and the mentions of a row."""
    try:
        read_pair(*(row[name] for name in ("text", *MENTIONS)))
    except Unusable as error:
        yield str(error)


def check_row(row: Row) -> Iterator[str]:
    """Yield a message for each problem of a row with a label."""
    yield from check_mentions(row)
    label = row["label"]
    if isinstance(label, bool) or not (isinstance(label, int) or (isinstance(label, str) and label.strip())):
        yield f"label is {brief(label)}; needed: the name of a relation"


def lacks_label(row: Row) -> bool:
    """Return whether the label of a row is missing."""
    return row["label"] is None or (isinstance(row["label"], str) and row["label"].strip() in NO_LABEL)


def convert(row: Row) -> Row:
    """Return a checked row with text, mentions as `Mention.in_row`, label and id."""
    pair = read_pair(*(row[name] for name in ("text", *MENTIONS)))
    mentions = {name: getattr(pair, name).in_row(pair.text) for name in MENTIONS}
    return {"id": row["id"], "text": pair.text} | mentions | {"label": str(row["label"]).strip()}


def load_pairs(args: RelationDataArguments) -> tuple[DatasetDict, Dataset | None, list[str], str | None]:
    """Load and check the splits with columns `text`, `head`, `tail` and `label`.

    Returns:
        The splits; the test rows if they have no labels, else None; the sorted names of the relations; the name of the
        label for no relation, or None.

    Raises:
        InputError: rows are invalid, with file and line, or there are fewer than two labels.
    """
    columns = args.columns()
    names = Names(**columns)

    def read(path: str) -> Iterator[Located]:
        return read_rows(path, args, names)

    gold = Gold(
        "label", ("label",), lacks_label, check_mentions, lambda row: [str(row["label"])], bool(args.drop_unlabeled)
    )
    pairs = PairBuilder(args, names)
    data = load_splits(args, columns, check_row, read=read, carve_by="text", gold=gold, convert=convert, prepare=pairs)
    unlabeled = data.pop(UNLABELED, None)
    labels = label_names(data)
    return data, unlabeled, labels, no_relation_of(args.no_relation_label, labels)


def label_names(data: DatasetDict) -> list[str]:
    """Return the sorted relations of all splits; warn of those that are hard to learn.

    Raises:
        InputError: there are fewer than two, or more than `MOST_LABELS`.
    """
    counts = label_counts(data, "label")
    check_number(counts, "label")
    labels = sorted(set().union(*counts.values()))
    if len(labels) < 2:
        rows = sum(map(len, data.values()))
        raise InputError(f"label: 1 relation in the {rows:,} rows read ({labels[0]}); needed: at least 2")
    warn_of_unseen(counts, "relations")
    warn_of_few(counts, "relations")
    warn_of_alike(counts, "relations")
    types = {split: {row[name]["type"] for row in rows for name in MENTIONS} - {None} for split, rows in data.items()}
    unseen = sorted(set().union(*types.values()) - types["train"])
    if unseen and types["train"]:
        warn(f"types of mentions that training never sees, marked as mentions without a type: {', '.join(unseen)}")
    return labels


def related_types(rows: Dataset, no_relation: str | None) -> list[list[str]]:
    """Return the sorted pairs of types of head and tail that have a relation; empty if mentions have no types."""
    found = {(row["head"]["type"], row["tail"]["type"]) for row in rows if row["label"] != no_relation}
    return sorted([list(types) for types in found if None not in types])


def no_relation_of(wanted: str, labels: list[str]) -> str | None:
    """Return the label for no relation, as `--no_relation_label` names it; None without one.

    Raises:
        InputError: no row has the label.
    """
    if wanted == "auto":
        return next((name for name in NO_RELATION if name in labels), None)
    if wanted == "none":
        return None
    if wanted not in labels:
        raise InputError(f"--no_relation_label {wanted}: no row has it; the labels are {', '.join(labels)}")
    return wanted
