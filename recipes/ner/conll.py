"""Read tagged words from column files: CoNLL 2002, CoNLL 2003, GermEval, CoNLL-U and similar."""

import re
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.data import Located, Source
from common.errors import InputError, tell

UNIVERSAL = (".conllu", ".conllup")
ENDINGS = (".conll", ".bio", ".iob", ".iob2", *UNIVERSAL)
#: columns of CoNLL-U
_NAMES = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]
_BIO = re.compile(r"O|[BIESMLUW][-_]\S+")
_ID = re.compile(r"#\s*(?:sent_)?id\b[\s=:]*(\S+)")
_RANGE_OR_EMPTY = re.compile(r"\d+[-.]\d+")  # in CoNLL-U: a multiword token, or a word that is not in the text
_FEWEST_SENTENCES = 10  # of one word each, which are taken for a mistake


@dataclass(frozen=True)
class Columns:
    """Columns of the word and the tag: a number from 1, or a name of CoNLL-U; None to choose by content."""

    word: str | None = None
    tag: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("word", self.word), ("tag", self.tag)):
            if value is not None and not value.isidentifier() and (not value.isdecimal() or int(value) < 1):
                raise InputError(f"--conll_{name}_column {value}: must be a number from 1, or a name such as upos")


BY_CONTENT = Columns()


class _Unclear(Exception):
    """The columns must be named by an argument."""


def read_conll(
    source: Source,
    columns: Columns = BY_CONTENT,
    names: tuple[str, str] = ("tokens", "ner_tags"),
    predicting: bool = False,
    words_only: bool = False,
) -> Iterator[Located]:
    """Yield each sentence of a file as a row of words and tags, with the line of its first word.

    Tabs or spaces separate the columns. An empty line or `-DOCSTART-` ends a sentence. Comments start with `#`; a
    comment such as `# id 7` gives the row its `id`. Without `columns`, the word is in the first column, or in the
    second one after a running number, and the tag is in the last one. In CoNLL-U, multiword tokens and empty nodes are
    skipped.

    Args:
        source: the file.
        columns: columns of the word and the tag.
        names: names of the words and the tags in the rows.
        predicting: the rows have words only if the column of the tags is unclear.
        words_only: the rows of a file with one column have words only.
    """
    path, universal = source.path, source.ending in UNIVERSAL
    lines, problems = [], {}
    for where, text, problem in source.lines(carriage_returns=True):
        lines.append((where, None if problem else text, _cells(text)))
        if problem:
            problems[where] = problem
    words = [cells for _, text, cells in lines if cells and not text.startswith("#") and not _skipped(cells, universal)]
    width = Counter(map(len, words)).most_common(1)[0][0] if words else 0
    try:
        word, tag = _choose(
            words, _sentences(lines, universal), columns, width, path, universal, lines, predicting, words_only
        )
    except _Unclear as error:
        yield str(path), str(error)
        return
    kept = [(name, column) for name, column in zip(names, (word, tag), strict=True) if column is not None]
    last = word if tag is None else tag
    values = {cells[last] for cells in words if len(cells) == width}

    def is_comment(cells: list[str]) -> bool:
        """Return whether a line that starts with `#` is no word, such as `#MeToo` with a tag."""
        if universal or len(cells) != width:
            return True
        return width > 1 and cells[last] not in values and _BIO.fullmatch(cells[last]) is None

    row: dict[str, list] = {name: [] for name, _ in kept}
    first, broken, identity, sentences, single = "", False, None, 0, 0
    for where, text, cells in [*lines, ("", "", [])]:
        if text is None:
            yield where, problems[where]
            broken = True
        elif not cells or "-DOCSTART-" in cells:
            if row[names[0]] and not broken:
                sentences, single = sentences + 1, single + (len(row[names[0]]) == 1)
                yield first, row if identity is None else row | {"id": identity}
            row, broken, identity = {name: [] for name, _ in kept}, False, None
        elif text.startswith("#") and is_comment(cells):
            named = _ID.match(text)
            identity = named[1] if named and not row[names[0]] else identity
        elif _skipped(cells, universal):
            continue
        elif len(cells) != width or len(cells) < len(kept) or not all(cells):
            count = len([cell for cell in cells if cell])
            expected = f"most lines have {width}" if len(cells) != width else "a line needs a word and a tag"
            found = f"{count} column{'s' * (count != 1)}, but {expected}: {text[:60]!r}"
            yield where, f"{found}; correct the line, or drop its sentence by --skip_bad_rows 1"
            broken = True
        else:
            first = first if row[names[0]] else where
            for name, column in kept:
                row[name].append(cells[column])
    if sentences == single >= _FEWEST_SENTENCES:
        yield (
            str(path),
            f"each of the {sentences} sentences has one word; leave empty lines only between sentences, or give a "
            "table (.csv, .tsv, .jsonl) if a line is a text",
        )


def looks_tagged(source: Source, labels: Container[str] = (), lines: int = 1000) -> bool:
    """Return whether each of the first lines of a file has several columns, with a BIO tag or a label in the last."""
    found = 0
    for number, (_, text, problem) in enumerate(source.lines(carriage_returns=True)):
        cells = _cells(text) if not text.startswith("#") else []
        if number == lines:
            break
        tagged = len(cells) > 1 and (cells[-1] in labels or _BIO.fullmatch(cells[-1]))
        if problem or (cells and "-DOCSTART-" not in cells and not tagged):
            return False
        found += len(cells) > 1
    return found > 0


def _cells(text: str | None) -> list[str]:
    if text is None or not text.strip():
        return []
    return [cell.strip() for cell in (text.split("\t") if "\t" in text else re.split(" +", text.strip(" ")))]


def _skipped(cells: list[str], universal: bool) -> bool:
    return "-DOCSTART-" in cells or (universal and _RANGE_OR_EMPTY.fullmatch(cells[0]) is not None)


def _sentences(lines: list[tuple[str, str | None, list[str]]], universal: bool) -> list[list[str]]:
    """Return the first cells of each sentence."""
    sentences: list[list[str]] = [[]]
    for _, text, cells in lines:
        if not cells or "-DOCSTART-" in cells:
            sentences.append([])
        elif not text.startswith("#") and not _skipped(cells, universal):
            sentences[-1].append(cells[0])
    return [sentence for sentence in sentences if sentence]


def _choose(
    words: list[list[str]],
    sentences: list[list[str]],
    columns: Columns,
    width: int,
    path: Path,
    universal: bool,
    lines: list[tuple[str, str | None, list[str]]],
    predicting: bool,
    words_only: bool,
) -> tuple[int, int | None]:
    """Return the index of the word column and of the tag column; None for a file without tags.

    Raises:
        _Unclear: an argument must name a column, or names one that the file lacks.
    """
    if width == 1 and all(len(cells) == 1 for cells in words):
        if words_only:
            return 0, None
        raise _Unclear(
            "each line has one column, a word without a tag; add a tag to each line; only a test file may have words "
            "alone"
        )
    names = _names(lines) if universal else []
    running = [str(n) for n in range(1, max(map(len, sentences), default=0) + 1)]
    numbered = width > 2 and all(sentence == running[: len(sentence)] for sentence in sentences)
    numbered = numbered and any(len(sentence) > 1 for sentence in sentences)
    word = 1 if universal or numbered else 0
    if columns.word is not None:
        word = _index("word", columns.word, names, width, path)
    elif "form" in names:
        word = names.index("form")
    if numbered and not universal and columns.word is None:
        tell(f"{path}: column 1 is a running number; words are read from column 2 (--conll_word_column names another)")
    if predicting and all(_BIO.fullmatch(cells[word]) for cells in words if len(cells) == width):
        raise _Unclear(f"column {word + 1} holds tags; name the column of the words by --conll_word_column")
    try:
        return word, _choose_tag(words, word, columns, names, width, path, numbered)
    except _Unclear:
        if predicting:
            return word, None
        raise


def _choose_tag(
    words: list[list[str]], word: int, columns: Columns, names: list[str], width: int, path: Path, numbered: bool
) -> int:
    if columns.tag is not None:
        return _index("tag", columns.tag, names, width, path)
    if names:
        known = ", ".join(names)
        raise _Unclear(f"several columns can be the tag; give --conll_tag_column, such as upos; columns here: {known}")
    whole = [cells for cells in words if len(cells) == width]
    bio = [i for i in range(width) if i != word and all(_BIO.fullmatch(cells[i]) for cells in whole)]
    named = [i for i in range(width) if any(_BIO.fullmatch(c[i]) and c[i] != "O" for c in whole)]
    if width - 1 not in bio:  # a tag before its word, or a part of speech after the tag
        tagged = [i for i in named if all(_BIO.fullmatch(cells[i]) for cells in whole)]
        if len(tagged) == 1:
            other = " --conll_word_column 2" if tagged[0] == word else ""
            raise _Unclear(
                f"column {tagged[0] + 1} holds BIO tags, and the last column other values; give --conll_tag_column "
                f"{tagged[0] + 1}{other} or --conll_tag_column {width}"
            )
    if len(bio) > 1:
        listed = " and ".join(str(i + 1) for i in bio)
        if numbered:
            raise _Unclear(f"columns {listed} hold tags; choose one by --conll_tag_column {bio[0] + 1}")
        tell(f"{path}: columns {listed} hold tags; the last is read (--conll_tag_column names another)")
    return width - 1


def _names(lines: list[tuple[str, str | None, list[str]]]) -> list[str]:
    """Return the names of the columns of CoNLL-U; `# global.columns = ID FORM ...` gives others."""
    first = next((text for _, text, _ in lines if text), "")
    given = re.match(r"#\s*global\.columns\s*=\s*(.+)", first)
    return given[1].lower().split() if given else _NAMES


def _index(kind: str, value: str, names: list[str], width: int, path: Path) -> int:
    if value.isdecimal():
        if int(value) > width:
            raise _Unclear(f"--conll_{kind}_column {value}: lines have {width} columns; give a number up to {width}")
        return int(value) - 1
    if value.lower() not in names:
        known = (
            f"columns here: {', '.join(names)}"
            if names
            else f"only {' and '.join(UNIVERSAL)} files have names; give a number"
        )
        raise _Unclear(f"--conll_{kind}_column {value}: no such column; {known}")
    return names.index(value.lower())
