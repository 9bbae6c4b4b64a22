"""Read queries with their passages, scored pairs, and the corpus."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from numbers import Real

from datasets import Dataset, DatasetDict

from common.data import UNLABELED, Gold, Located, Row, load_splits, read_file
from common.data.json_files import NoComma, parse_cell
from common.data.rows import read_dataset
from common.data.tables import missing_columns
from common.errors import InputError, Problems, brief, tell, warn

from .arguments import COLUMNS, Kind, MatchingDataArguments
from .pairs import Identities


@dataclass
class Corpus:
    """The passages to search in, without repeated texts.

    Attributes:
        ids: id of each passage.
        texts: text of each passage.
        by_id: text of each id of the file, also of those whose passages repeat the text of another one.
    """

    ids: list[str]
    texts: list[str]
    by_id: dict[str, str] = field(default_factory=dict)

    def add(self, texts: Iterable[str]) -> int:
        """Add texts that it lacks, with their number as id; return how many."""
        known, ids, before = set(self.texts), set(self.ids), len(self.texts)
        for text in texts:
            if text not in known:
                known.add(text)
                number = len(self.texts) + 1
                while str(number) in ids:
                    number += 1
                ids.add(str(number))
                self.ids.append(str(number))
                self.texts.append(text)
        return len(self.texts) - before


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def load_pairs(args: MatchingDataArguments, teacher: str | None = None) -> tuple[DatasetDict, Dataset | None, Corpus]:
    """Load the rows of a run, and the corpus of rows of queries; sets `args.rows` to the kind of the rows.

    Args:
        args: the arguments.
        teacher: `--teacher`; the rows are then translations.

    Returns:
        The splits, with the columns of `COLUMNS`, and `negatives` of queries; the test rows if none of them has a gold
        value, else None; the corpus, empty for other rows.

    Raises:
        InputError: up to ten problems, each with file and line.
    """
    if teacher is not None:
        return _load_translations(args), None, Corpus([], [])
    if args.rows == "auto":
        args.rows = _kind(args)
    corpus = read_corpus(args) if args.corpus_file else Corpus([], [])
    data = _load_queries(args, corpus) if args.rows == "ranking" else _load_scored(args)
    unlabeled = data.pop(UNLABELED, None)
    if args.rows == "ranking":
        _complete(corpus, data, given=args.corpus_file is not None)
        _tell_duplicates(data["train"])
    return data, unlabeled, corpus


def _kind(args: MatchingDataArguments) -> Kind:
    """Return the kind of rows by the columns of the first training row."""
    rows = read_dataset(args).get("train", iter(())) if args.dataset_name else read_file(args.train_file, args=args)
    first = next((row for _, row in rows if isinstance(row, dict)), {})
    names = set(first)
    if {args.text_column_name, args.text_pair_column_name} <= names and args.query_column_name not in names:
        return "score" if args.score_column_name in names else "label"
    return "ranking"


def read_corpus(args: MatchingDataArguments) -> Corpus:
    """Return the passages of `--corpus_file`.

    Raises:
        InputError: the file has no rows, a row has no text, or an id or a text is repeated.
    """
    problems = Problems()
    texts: dict[str, str] = {}  # text -> its place
    ids: dict[str, str] = {}
    by_id: dict[str, str] = {}
    column, repeated = args.passage_column_name, 0
    for number, (where, row) in enumerate(read_file(args.corpus_file, args=args), 1):
        messages = list(_passage_problems(row, column, ids, number))
        if messages:
            problems.reject(where, messages)
            continue
        ids[_id_of(row, number)] = where
        by_id[_id_of(row, number)] = row[column]
        repeated += row[column] in texts
        texts.setdefault(row[column], _id_of(row, number))
    if not texts and not problems.count:
        problems.add(args.corpus_file, "the corpus contains no passages; add some")
    problems.check()
    if repeated:
        tell(f"{args.corpus_file}: {repeated:,} passages repeat the text of another one and are left out")
    return Corpus(list(texts.values()), list(texts), by_id)


def _passage_problems(row: Row | str, column: str, ids: dict[str, str], number: int) -> Iterator[str]:
    if isinstance(row, str):
        yield row
    elif column not in row:
        yield missing_columns(row, [column], {column: "passage_column_name"})
    elif not is_text(row[column]):
        yield f"{column} is {brief(row[column])}; needed: a non-blank text"
    elif (name := _id_of(row, number)) in ids:
        yield f"id {brief(name)} is already the id of {ids[name]}; give each passage a different id"


def _load_queries(args: MatchingDataArguments, corpus: Corpus) -> DatasetDict:
    by_id = corpus.by_id if args.positive_id_column_name else None
    return load_splits(
        args,
        args.columns(),
        partial(_check_query, args=args, by_id=by_id),
        optional={"negatives": args.negatives_column_name},
        carve_by="query",
        gold=Gold(
            name="positive",
            columns=("positive",),
            missing=lambda row: row["positive"] is None or row["positive"] == "",
            check=lambda row: _check_text(row, "query", args.query_column_name),
            drop=bool(args.drop_unlabeled),
        ),
        convert=partial(_with_texts, by_id=by_id, most=args.max_negatives),
    )


def _check_text(row: Row, name: str, theirs: str) -> Iterator[str]:
    if not is_text(row[name]):
        yield f"{theirs} is {brief(row[name])}; needed: a non-blank text"


def _negatives(row: Row) -> list | None:
    """Return the negatives of a row: a list, or one text; empty without any, None if they are of another type."""
    value = row["negatives"]
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            parsed = parse_cell(value) if value.startswith("[") else None
        except NoComma:
            return None
        except ValueError:
            parsed = None  # a text may begin with "[" too
        return parsed if isinstance(parsed, list) else [value]
    return value if isinstance(value, list) else None


def _check_query(row: Row, args: MatchingDataArguments, by_id: dict[str, str] | None) -> Iterator[str]:
    """Yield the problems of a row with a query, a positive and negatives."""
    yield from _check_text(row, "query", args.query_column_name)
    if by_id is None:
        yield from _check_text(row, "positive", args.positive_column_name)
    elif str(row["positive"]) not in by_id:
        yield f"{args.positive_id_column_name} is {brief(row['positive'])}, which no passage of {args.corpus_file} has"
    negatives = _negatives(row)
    if negatives is None or not all(map(is_text, negatives)):
        yield f"{args.negatives_column_name} is {brief(row['negatives'])}; needed: a list of non-blank texts"
    elif row["positive"] in negatives:
        yield f"{args.negatives_column_name} contains the positive; remove it there"


def _with_texts(row: Row, by_id: dict[str, str] | None, most: int) -> Row:
    positive = row["positive"] if by_id is None else by_id[str(row["positive"])]
    return row | {"positive": positive, "negatives": [text for text in _negatives(row) if text != positive][:most]}


def _load_scored(args: MatchingDataArguments) -> DatasetDict:
    gold = args.rows
    theirs = {name: getattr(args, f"{name}_column_name") for name in COLUMNS[gold]}

    def texts(row: Row) -> Iterator[str]:
        for name in ("text", "text_pair"):
            yield from _check_text(row, name, theirs[name])

    def check(row: Row) -> Iterator[str]:
        yield from texts(row)
        value = number_of(row[gold])
        if value is None or not 0 <= value <= 1:
            remedy = "divide by the highest grade" if gold == "score" else "1 for a pair that matches, else 0"
            yield f"{theirs[gold]} is {brief(row[gold])}; needed: a number from 0 to 1 ({remedy})"
        elif gold == "label" and value not in (0, 1):
            yield f"{theirs[gold]} is {brief(row[gold])}; needed: 0 or 1, or give --rows score --score_column_name"

    return load_splits(
        args,
        args.columns(),
        check,
        carve_by="text",
        gold=Gold(
            name=gold,
            columns=(gold,),
            missing=lambda row: row[gold] is None or row[gold] == "",
            check=texts,
            drop=bool(args.drop_unlabeled),
        ),
        convert=lambda row: row | {gold: float(number_of(row[gold]))},
    )


def _load_translations(args: MatchingDataArguments) -> DatasetDict:
    """Load sentences with their translations; an object in `translation` has the columns of its row."""
    if args.rows != "auto" or args.corpus_file is not None:
        raise InputError("--teacher: reads pairs of sentences; remove --rows and --corpus_file")
    args.rows = "translation"
    theirs = args.columns()

    def check(row: Row) -> Iterator[str]:
        for name in theirs:
            yield from _check_text(row, name, theirs[name])

    def prepare(sources: dict[str, Iterable[Located]]) -> dict[str, Iterable[Located]]:
        return {split: map(_with_translation, rows) for split, rows in sources.items()}

    return load_splits(args, theirs, check, carve_by="text", prepare=prepare)


def _with_translation(located: Located) -> Located:
    """Return a row of `{"translation": {"en": ..., "de": ...}}` with the languages as columns."""
    where, row = located
    if isinstance(row, dict) and isinstance(row.get("translation"), dict):
        row = row["translation"] | row
    return where, row


def number_of(value: object) -> float | None:
    """Return a number, also from the text of a cell; None for anything else, and for NaN."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, Real) and value == value else None


def _complete(corpus: Corpus, data: DatasetDict, given: bool) -> None:
    """Add the passages of the rows to the corpus."""
    texts = [text for rows in data.values() for text in rows["positive"][:]]
    if not given:
        texts += [text for rows in data.values() for negatives in rows["negatives"][:] for text in negatives]
    added = corpus.add(texts)
    if given and added:
        warn(f"{added:,} positives are no passage of the corpus and are added to it")


def identities_of(rows: Dataset) -> Identities:
    """Return the identities of the texts in rows of queries."""
    return Identities(rows["query"][:], rows["positive"][:], rows["negatives"][:])


def _tell_duplicates(rows: Dataset) -> None:
    """Count the queries and positives that several training rows share."""
    queries, positives = identities_of(rows).duplicates()
    if queries or positives:
        tell(
            f"train: {queries:,} rows repeat a query and {positives:,} a positive of another row; within a step these "
            "are no negatives of each other"
        )


def with_ids(rows: Iterable[Located], before: Callable[[], int] = lambda: 0) -> Iterator[Located]:
    """Yield the rows of a corpus with `id` as a text; a row without one gets its number, added to `before()`."""
    for number, (where, row) in enumerate(rows, 1):
        if isinstance(row, dict) and row.get("id") is None:
            number += before()
        yield where, row | {"id": _id_of(row, number)} if isinstance(row, dict) else row


def _id_of(row: Row, number: int) -> str:
    """Return the id of a passage: its `id`, or the number of its row."""
    return str(number if row.get("id") is None else row["id"])
