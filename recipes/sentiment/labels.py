"""Read the labels of rows: one label, lists, cells with several labels, and columns of 0 and 1."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, DatasetDict

from common.data import load_splits
from common.data.json_files import parse_cell
from common.data.labels import check_number, label_counts, warn_of_alike, warn_of_few, warn_of_unseen
from common.data.pool import POOL
from common.data.rows import UNLABELED, Gold
from common.data.source import Located, Row
from common.errors import InputError, brief, tell, warn

from .arguments import SentimentDataArguments
from .reading import check_texts, read_rows
from .unlabeled import read_unlabeled

#: texts that stand for "no label" (SNLI writes -, pandas nan and <NA>)
NO_LABEL = ("", "-", "nan", "NaN", "<NA>")
#: characters between several labels in a cell
SEPARATORS = (",", "|", ";")
#: most classes that numbers with a fraction may have, such as half stars; more are scores
MOST_FRACTIONS = 10
_FRACTION = re.compile(r"[-+]?\d*[.,]\d+")
_INTEGER = re.compile(r"-?\d{1,4000}")
_BITS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


class LabelReader:
    """Check and convert the labels of rows while they are read; `finish` decides what the labels of all rows mean.

    A converted row has the list of its labels, as texts, in `label`.
    """

    def __init__(self, args: SentimentDataArguments):
        self.args = args
        name = args.label_column_name
        #: columns of 0 and 1, one for each class; empty for one column of labels
        self.hot = [part.strip() for part in name.split(",")] if "," in name else []
        self.columns = {f"label {part}": part for part in self.hot} or {"label": name}
        self.kind: str | None = None  # type of the labels in the first row
        self.in_lists: bool | None = None  # whether the first row has a list of labels

    def missing(self, row: Row) -> bool:
        """Return whether a row lacks its label."""
        # -1: not scored, as in the test rows of Jigsaw's toxic comments
        nothing = (*NO_LABEL, "-1", "-1.0") if self.hot else NO_LABEL
        return any(row[name] is None or str(row[name]).strip() in nothing for name in self.columns)

    def check(self, row: Row) -> Iterator[str]:
        """Yield the problems of the labels of a row; all rows must have the same type of label."""
        if self.hot:
            for name, column in self.columns.items():
                if str(row[name]).strip().lower() not in _BITS:
                    yield f"{column} is {brief(row[name])}; needed: 0 or 1 in each of several label columns"
            return
        label = self.read(row["label"])
        in_lists, values = isinstance(label, list), label if isinstance(label, list) else [label]
        kinds = {_kind(value) for value in values}
        if None in kinds or len(kinds) > 1:
            yield f"label is {brief(row['label'])}; needed: a text, a number, or a list of either"
            return
        kind = kinds.pop() if kinds else self.kind
        texts = [_text(value, in_lists) for value in values]
        if self.kind is not None and (in_lists, kind) != (self.in_lists, self.kind):
            types = (in_lists, kind), (self.in_lists, self.kind)
            ours, first = (f"list of type {inner}" if is_list else inner for is_list, inner in types)
            yield f"label {brief(row['label'])} is of type {ours}, but the first row has type {first}"
        elif self.in_lists not in (None, in_lists):
            yield f"label {brief(row['label'])} is a list, but the first row has no list; write all rows alike"
        elif len(set(texts)) < len(texts) and not _is_hot(texts):
            yield f"label {brief(row['label'])} names a class twice; remove the duplicate"
        else:
            self.kind, self.in_lists = kind, in_lists

    def read(self, cell: Any) -> Any:
        """Return the labels in a cell: a list that a text cell holds, or texts between `--label_separator`."""
        if not isinstance(cell, str):
            return cell
        if self.args.label_separator:
            return [part.strip() for part in cell.split(self.args.label_separator) if part.strip()]
        return cell if self.args.multi_label == "false" else written_list(cell)

    def convert(self, row: Row) -> Row:
        """Return the row with its labels as a list of texts."""
        if self.hot:
            bits = {name: _BITS[str(row.pop(column)).strip().lower()] for column, name in self.columns.items()}
            return row | {"label": [name for name, bit in bits.items() if bit]}
        label = self.read(row["label"])
        in_lists = isinstance(label, list)
        return row | {"label": [_text(value, in_lists) for value in (label if in_lists else [label])]}

    def classes(self, row: Row) -> list[str]:
        """Return the classes of a converted row."""
        labels = row["label"]
        return [str(i) for i, bit in enumerate(labels) if bit == "1"] if self.in_lists and _is_hot(labels) else labels

    def finish(self, data: DatasetDict) -> tuple[bool, Dataset | None]:
        """Decide what the labels in `data` mean, and replace them by one text a row, or a list of texts.

        Returns:
            Whether rows have several labels; the test rows if all of them have the label -1 for "no label", else None.

        Raises:
            InputError: the labels have several readings; the message names the argument that decides.
        """
        unlabeled = self._take_minus_one(data)
        labels = {split: rows["label"][:] for split, rows in data.items()}
        if self.in_lists and not self.hot:
            self._name_bits(labels)
        every = [of_row for of_split in labels.values() for of_row in of_split]
        named = dict.fromkeys(label for of_row in every for label in of_row)
        if self.args.label_names is not None and not any(label.isdecimal() for label in named):
            shown = ", ".join(brief(label) for label in list(named)[:2])
            raise InputError(f"--label_names: replaces numbers, but the labels are {shown}, ...; leave it out")
        single = all(len(of_row) == 1 for of_row in every)
        choice = self.args.multi_label
        if choice == "false" and not single:
            row = next(of_row for of_row in every if len(of_row) != 1)
            raise InputError(f"--multi_label false: a row has {len(row)} labels ({', '.join(row)}); give one a row")
        if not (self.in_lists or self.hot) and choice != "false":
            check_separators(Counter(of_row[0] for of_row in every), choice)
        several = not single if choice == "auto" else choice == "true"
        if single and (self.in_lists or self.hot) and choice == "auto":
            tell("label: each row has one label; for a model that may give several: --multi_label true")
        for split, of_split in labels.items():
            of_split = [[self._named(label, split) for label in of_row] for of_row in of_split]
            values = of_split if several else [of_row[0] for of_row in of_split]
            data[split] = data[split].remove_columns("label").add_column("label", values)
        return several, unlabeled

    def _named(self, label: str, split: str) -> str:
        """Return the name of a label by `--label_names`, if it is a number."""
        names = self.args.label_names
        if names is None or not label.isdecimal():
            return label
        if int(label) >= len(names):
            raise InputError(
                f"{split}: label {label}, but --label_names has {len(names)} names, for 0 and up; add names"
            )
        return names[int(label)]

    def _take_minus_one(self, data: DatasetDict) -> Dataset | None:
        """Remove the rows with the label -1 for "no label", and return the test split if all its rows have it."""
        counts = label_counts(data, "label")
        names = set().union(*counts.values()) - {"-1"}
        # beside classes 0 to n, -1 is no class: -1, 0, 1 may be negative, neutral, positive
        numbered = names == {str(number) for number in range(len(names))} and len(names) > 1
        if self.in_lists or not numbered or self.args.drop_unlabeled is False:
            return None
        if len(names) == 2 and counts["train"]["-1"]:
            return None
        unlabeled = None
        if "test" in data and counts["test"]["-1"] == len(data["test"]):
            unlabeled = data.pop("test").remove_columns("label")
            warn("test: each row has the label -1; the rows are predicted and not scored")
        for split, rows in data.items():
            kept = [i for i, labels in enumerate(rows["label"][:]) if labels != ["-1"]]
            missing = len(rows) - len(kept)
            if not kept:
                raise InputError(
                    f"{split}: all {missing:,} rows have the label -1, which usually means no label; give rows with "
                    "labels, or --drop_unlabeled false if -1 is a class"
                )
            if missing and not self.args.drop_unlabeled:
                first = next(row["id"] for row in rows if row["label"] == ["-1"])
                raise InputError(
                    f"{split}: {missing:,} rows (first: id {first}) have the label -1 beside the labels 0 to "
                    f"{len(names) - 1}, which usually means no label; pass --drop_unlabeled true to drop them, or "
                    "--drop_unlabeled false if -1 is a class"
                )
            if missing:
                tell(f"{split}: dropped {missing:,} of {len(rows):,} rows with the label -1")
                data[split] = rows.select(kept)
        return unlabeled

    def _name_bits(self, labels: dict[str, list[list[str]]]) -> None:
        """Replace lists with a 0 or 1 for each class by the numbers of the classes, if all rows have such lists."""
        every = [of_row for of_split in labels.values() for of_row in of_split]
        size = len(every[0])
        if all(len(of_row) == size and _is_hot(of_row) for of_row in every):
            for split, of_split in labels.items():
                labels[split] = [[str(i) for i, bit in enumerate(of_row) if bit == "1"] for of_row in of_split]
            tell(
                f"label: lists of {size} numbers 0 or 1 are read as a yes or no for each class, named 0 to {size - 1}; "
                "for names, give each class a column: --label_column_name NAME,NAME,..."
            )
        elif twice := next((of_row for of_row in every if len(set(of_row)) < len(of_row)), None):
            raise InputError(
                f"label: [{', '.join(twice)}] names a class twice, and is no yes or no for each class, because the "
                "lists have different lengths; write the names of the classes"
            )


def load_labeled(args: SentimentDataArguments) -> tuple[DatasetDict, Dataset | None, bool, list[str]]:
    """Load the rows, with columns `text`, `label` (a text, or a list of texts) and for pairs `text_pair`.

    Returns:
        The splits, under `--semi` with `POOL`; the test rows if they have no labels, else None; whether rows have
        several labels; the class names, sorted by value if all are integers, else alphabetically.

    Raises:
        InputError: rows are invalid, with file and line, or their labels have several readings.
    """
    reader, columns = LabelReader(args), {"text": args.text_column_name}
    if args.text_pair_column_name:
        columns["text_pair"] = args.text_pair_column_name

    def check(row: Row) -> Iterator[str]:
        yield from check_texts(row)
        yield from reader.check(row)

    gold = Gold("label", tuple(reader.columns), reader.missing, check_texts, reader.classes, bool(args.drop_unlabeled))
    names = args.text_column_name, args.label_column_name
    label_files = {getattr(args, f"{split}_file"): file for split, file in args.label_files().items()}

    def read(path: str) -> Iterator[Located]:
        return read_rows(path, args, names, label_files.get(path))

    data = load_splits(
        args, columns | reader.columns, check, read=read, carve_by="text", gold=gold, convert=reader.convert
    )
    unlabeled = data.pop(UNLABELED, None)
    several, hidden = reader.finish(data)
    classes = class_names(data, several)
    if args.semi:
        data[POOL] = read_unlabeled(args, data, several)
    return data, unlabeled or hidden, several, classes


def class_names(data: DatasetDict, several: bool) -> list[str]:
    """List the classes of all splits, sorted by value if all are integers, else alphabetically.

    Warns of classes that are hard to learn and of splits with one class.

    Raises:
        InputError: fewer than 2 classes, more than `MOST_LABELS`, or scores instead of classes.
    """
    counts = label_counts(data, "label")
    names = set().union(*counts.values())
    check_number(counts, "label")
    if len(names) < 2:
        rows = sum(map(len, data.values()))
        raise InputError(f"label: 1 class in the {rows:,} rows read ({', '.join(names)}); needed: at least 2")
    fractions = [name for name in names if _FRACTION.fullmatch(name)]
    if len(names) > MOST_FRACTIONS and len(fractions) > len(names) / 2:
        raise InputError(
            f"label: {len(names):,} different numbers such as {fractions[0]}: scores, not classes; round them in the "
            "data to few classes, such as whole numbers, or replace them by names such as low and high"
        )
    warn_of_unseen(counts, "classes")
    warn_of_few(counts, "classes")
    warn_of_alike(counts, "classes")
    for split, of_split in counts.items():
        if len(of_split) == 1 and not several:
            effect = "the model learns to answer it always" if split == "train" else "its scores say little"
            warn(f"{split}: all {len(data[split]):,} rows have the class {next(iter(of_split))}; {effect}")
    integers = all(_INTEGER.fullmatch(name) for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if integers else sorted(names)


def check_separators(counts: Counter, choice: str) -> None:
    """Raise `InputError` if texts in `counts` look like several labels with a separator.

    They do if a part between the separators occurs in another text too: `rude`, `rude|threat`.
    """
    for separator in SEPARATORS:
        cells = [name for name in counts if separator in name]
        parts = Counter(
            part for name in counts for part in {part.strip() for part in name.split(separator)} if part.strip()
        )
        shared = [name for name in cells if any(parts[part.strip()] > 1 for part in name.split(separator))]
        if shared:
            or_one = "" if choice == "true" else ", or --multi_label false if they are names of single classes"
            raise InputError(
                f"label: {len(cells):,} different labels such as {brief(shared[0])} look like several labels with "
                f'{separator!r} between; pass --label_separator "{separator}" to split them{or_one}'
            )


def written_list(cell: str) -> Any:
    """Return the list that a text cell holds as JSON, in Python's notation, or as numpy prints it; else the cell."""
    text = cell.strip()
    if text[:1] + text[-1:] not in ("[]", "{}", "()"):
        return cell
    try:
        value = parse_cell(text)
    except ValueError:
        return cell
    if isinstance(value, set):
        return sorted(value, key=str)
    return list(value) if isinstance(value, list | tuple) else cell


def _is_hot(labels: list[str]) -> bool:
    return len(labels) > 1 and set(labels) <= {"0", "1"}


def _kind(label: object) -> str | None:
    if isinstance(label, bool):
        return "true or false"
    if isinstance(label, int | float):
        return "number" if isinstance(label, int) or math.isfinite(label) else None
    return "text" if isinstance(label, str) and label.strip() else None


def _text(label: Any, in_list: bool) -> str:
    """Return a label as a text: 1.0 as 1, and true in a list, a yes for a class, as 1 too."""
    whole = isinstance(label, bool) if in_list else isinstance(label, float) and label.is_integer()
    return str(int(label)) if whole or (isinstance(label, float) and label.is_integer()) else str(label)
