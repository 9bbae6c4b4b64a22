"""Read tagged sentences and annotated texts from files and folders, for training and prediction."""

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from datasets import Dataset, DatasetDict

from common.args import FileArguments
from common.data import (
    READERS,
    UNLABELED,
    Gold,
    Located,
    Readers,
    Row,
    Source,
    json_fault,
    load_splits,
    parse_json,
    read_file,
)
from common.data.files import FileReader
from common.data.json_files import list_of_cell
from common.data.labels import warn_of_alike, warn_of_few
from common.data.pool import POOL
from common.errors import tell, warn

from .arguments import TAGS, WORDS, NerDataArguments
from .brat import read_brat
from .conll import ENDINGS, Columns, looks_tagged, read_conll
from .schemes import IOB2, Scheme, invalid_tags, recognise, with_begins
from .spans import SpanConverter
from .texts import read_unlabeled
from .words import check_words, join_words

#: tags that stand for "no tag" in columns of class numbers
NO_TAG = (-1, -100, "-1", "-100")
#: begin of a JSON file of spaCy's pairs ["text", {"entities": ...}], alone or below "annotations"
_PAIRS = re.compile(r'\s*(\[\s*\[\s*"|\[\s*"|\{\s*"(classes|annotations)"\s*:\s*\[)')


def _read_json(source: Source) -> Iterator[Located]:
    """Yield the rows of a JSON file; a pair of spaCy becomes a row of `text` and, for example, `entities`."""
    path = source.path
    head = "\n".join(line.text for line in islice(source.lines(), 20))
    if not _PAIRS.match(head):
        yield from READERS[source.ending](source)
        return
    if source.ending == ".jsonl":
        for where, text, problem in source.lines():
            if problem:
                yield where, problem
            elif text.strip():
                try:
                    yield where, _row_of_pair(parse_json(text))
                except (ValueError, RecursionError) as error:
                    yield where, f"not JSON: {error}; write each line with json.dumps"
        return
    try:
        pairs = parse_json(source.text())
    except (ValueError, RecursionError) as error:
        where, fault = json_fault(path, error)
        yield where, f"not JSON: {fault}; write it with json.dump"
        return
    if isinstance(pairs, dict):
        pairs = [pair for pair in pairs.get("annotations", []) if pair is not None]
    for number, pair in enumerate(pairs, 1):
        yield f"{path}, row {number}", _row_of_pair(pair)


def _row_of_pair(pair: object) -> Row | str:
    if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], dict):
        return {"text": pair[0]} | pair[1]
    return 'not a pair ["text", {"entities": [[0, 4, "TYPE"]]}]; correct the row'


def file_reader(
    columns: Columns,
    names: tuple[str, str],
    args: FileArguments | None = None,
    predicting: bool = False,
    sentences: str | None = None,
    labels: Container[str] = (),
    test_file: str | None = None,
) -> FileReader:
    """Return a function that reads a file or a folder of brat as rows with their places.

    Args:
        columns: columns of the word and the tag in CoNLL files.
        names: names of the words and the tags in the rows.
        args: how to read the files; the defaults if None.
        predicting: a `.txt` file may hold a text per line, brat texts need no annotations, and rows may lack the
            column `sentences`.
        sentences: column that numbers the sentences of a table with a word in each row; None for other tables.
        labels: the tags of the model in predict, by which it recognises a `.txt` file of CoNLL columns.
        test_file: a file of columns that may have words only.
    """

    def conll(source: Source) -> Iterator[Located]:
        words_only = predicting or (test_file is not None and source.path == Path(test_file))
        return read_conll(source, columns, names, predicting, words_only)

    readers: Readers = READERS | dict.fromkeys(ENDINGS, conll) | dict.fromkeys((".json", ".jsonl"), _read_json)

    def text(source: Source) -> Iterator[Located]:
        tagged = not predicting or looks_tagged(source, labels)
        yield from (conll if tagged else READERS[".txt"])(source)

    readers |= dict.fromkeys((".txt", ".text"), text)

    def read(path: str | Path) -> Iterator[Located]:
        if Path(path).is_dir():
            return read_brat(Path(path), args or FileArguments(), annotated=not predicting)
        rows = read_file(path, readers, args)
        return rows if sentences is None else join_words(rows, sentences, required=not predicting)

    return read


def span_columns(text_column: str, label_column: str) -> tuple[str, str | None]:
    """Return the columns of the text and of the spans; None if the user named no column of labels."""
    return "text" if text_column == WORDS else text_column, None if label_column == TAGS else label_column


class TagConverter:
    """Convert spans of characters in the rows of all splits to tags, and recognise the scheme of all tags."""

    def __init__(self, args: NerDataArguments):
        names = args.text_column_name, args.label_column_name
        self.spans = SpanConverter(*span_columns(*names), names, args.max_seq_length // 2)
        self.words = args.text_column_name
        self.wanted, self.tags, self.names = args.tag_scheme, args.label_column_name, args.label_names
        self.scheme = IOB2

    def __call__(self, sources: dict[str, Iterable[Located]]) -> dict[str, list[Located]]:
        """Return the rows of each split with spans converted, and recognise the scheme of their tags."""
        rows = {split: [self._named(*row) for row in self.spans.rows(source)] for split, source in sources.items()}
        for located in rows.values():
            check_words(located, self.words)
        self.scheme = recognise(
            (_tags_in(row.get(self.tags)) for split in rows.values() for _, row in split if isinstance(row, dict)),
            self.wanted,
        )
        return rows

    def _named(self, where: str, row: Row | str) -> Located:
        """Return a row with the names of its tags by `--label_names`, if they are numbers."""
        cell = row.get(self.tags) if isinstance(row, dict) and self.names else None
        tags = _tags_in(cell)
        if not tags or not all(str(tag).isdecimal() for tag in tags):
            return where, row
        numbers = [int(tag) for tag in tags]
        if max(numbers) >= len(self.names):
            return where, f"tag {max(numbers)}, but --label_names has {len(self.names)} names, for 0 and up; add names"
        return where, row | {self.tags: [self.names[number] for number in numbers]}


def _tags_in(cell: object) -> list:
    """Return the tags in a cell, which in a table is JSON or words separated by spaces."""
    if isinstance(cell, str):
        cell = list_of_cell(cell)
    return cell if isinstance(cell, list) else []


def check_row(row: dict, repair_bio: bool = False, scheme: Scheme = IOB2) -> Iterator[str]:
    """Yield a message for each error in a row of `tokens` and `ner_tags`."""
    tokens, tags = row["tokens"], row["ner_tags"]
    for name, values in row.items():
        if not isinstance(values, list):
            yield f"{name} is not a list but {type(values).__name__}; needed: a list of texts, one per word"
            return
    if not tokens:
        yield "empty sentence: no tokens; remove the row"
    for i, token in enumerate(tokens, 1):
        if not isinstance(token, str) or not token.strip():
            yield f"token {i} is {token!r}; needed: a non-blank text"
            return
    if len(tokens) != len(tags):
        yield f"{len(tokens)} tokens but {len(tags)} tags; needed: one tag per word"
        return
    yield from scheme.problems(tokens, tags, repair_bio)


def lacks_tags(row: Row) -> bool:
    """Return whether a row has no gold tags: none at all, one that stands for "no tag", or a - for each word."""
    tags = row["ner_tags"]
    if not isinstance(tags, list):
        return tags is None or tags == ""
    return (
        (not tags and bool(row["tokens"]))
        or any(tag is None or tag in NO_TAG for tag in tags)
        or (bool(tags) and all(tag in ("-", "_") for tag in tags))
    )


def check_tokens(row: Row) -> Iterator[str]:
    """Yield a message for each error in the words of a row without gold tags."""
    words = row["tokens"]
    return check_row({"tokens": words, "ner_tags": ["O"] * len(words) if isinstance(words, list) else []})


def repair_tags(row: dict, scheme: Scheme = IOB2) -> dict:
    """Convert tags to IOB2 and replace each `I-X` that does not continue an `X` by `B-X`; `repaired` counts these."""
    tags = scheme.to_iob2(row["ner_tags"])
    return {"ner_tags": with_begins(tags), "repaired": len(invalid_tags(tags))}


def load_tagged(args: NerDataArguments) -> tuple[DatasetDict, Dataset | None, Scheme]:
    """Load and check the splits with columns `tokens` and `ner_tags`, and convert the tags to IOB2.

    With `--repair_bio`, tags `I-X` that continue no entity become `B-X`, and their number is printed.

    Returns:
        The splits, under `--semi` with `POOL`; the test rows if they have no gold tags, else None; the scheme of the
        files. With the scheme none, the tags stay as they are.
    """
    columns = args.columns()
    convert = TagConverter(args)

    def check(row: Row) -> Iterator[str]:
        return check_row(row, args.repair_bio, convert.scheme)

    def types_of(row: Row) -> list[str]:
        return entity_types(convert.scheme.to_iob2(row["ner_tags"]))

    names = args.text_column_name, args.label_column_name
    conll = Columns(args.conll_word_column, args.conll_tag_column)
    read = file_reader(conll, names, args, sentences=args.sentence_column_name, test_file=args.test_file)
    gold = Gold("tags", ("ner_tags",), lacks_tags, check_tokens, types_of, bool(args.drop_unlabeled))
    data = load_splits(
        args, columns, check, list_columns=columns, read=read, carve_by="tokens", prepare=convert, gold=gold
    )
    unlabeled = data.pop(UNLABELED, None)
    if args.repair_bio and convert.scheme.name != "none":
        data = data.map(partial(repair_tags, scheme=convert.scheme))
        tell(f"--repair_bio: {sum(sum(split['repaired']) for split in data.values())} tags I-X became B-X")
    elif convert.scheme != IOB2:
        data = data.map(lambda row: {"ner_tags": convert.scheme.to_iob2(row["ner_tags"])})
    warn_of_types(data)
    if args.semi:
        tags = {tag for row in data["train"]["ner_tags"] for tag in row}
        read = file_reader(conll, names, args, predicting=True, sentences=args.sentence_column_name, labels=tags)
        data[POOL] = read_unlabeled(args, data, read)
    return data, unlabeled, convert.scheme


def entity_types(tags: list[str]) -> list[str]:
    """Return the types of the entities in IOB2 tags; of tags of single words, the tags."""
    return sorted({tag[2:] if tag[:2] in ("B-", "I-") else tag for tag in tags if tag != "O"})


def warn_of_types(data: DatasetDict) -> None:
    """Warn of splits without an entity, and of entity types that are hard to learn."""
    counts = {
        split: Counter(t for tags in rows["ner_tags"] for t in entity_types(tags)) for split, rows in data.items()
    }
    for split in [split for split, of_split in counts.items() if not of_split]:
        effect = "the model learns to find none" if split == "train" else "its F1 is 0 or says nothing"
        warn(f"{split}: none of the {len(data[split]):,} rows has an entity; {effect}; add rows with entities")
    warn_of_few(counts, "entity types")
    warn_of_alike(counts, "entity types")
