"""Read tagged words from column files, the format of CoNLL 2002 and 2003."""

from collections.abc import Iterator
from pathlib import Path

from common.data import NOT_UTF8, READERS, Located, Readers, numbered_lines


def read_conll(path: Path) -> Iterator[Located]:
    """Yield each sentence of a file as a row of `tokens` and `ner_tags`, with the line of its first word.

    The first column of a line holds the word, the last column holds the tag. Tabs or spaces separate the columns. An
    empty line or `-DOCSTART-` ends a sentence.
    """
    tokens: list[str] = []
    tags: list[str] = []
    first_line, columns, broken = "", 0, False
    for where, text in numbered_lines(path):
        cells = [] if text is None else (text.split("\t") if "\t" in text else text.split())
        cells = [cell.strip() for cell in cells]
        if text is None:
            yield where, NOT_UTF8
            broken = True
        elif not text.strip() or cells[0] == "-DOCSTART-":
            if tokens and not broken:
                yield first_line, {"tokens": tokens, "ner_tags": tags}
            tokens, tags, broken = [], [], False
        elif len(cells) < 2 or (columns and len(cells) != columns) or not all(cells):
            expected = f"the lines above have {columns}" if columns else "a line needs a word and a tag"
            yield where, f"{len([c for c in cells if c])} columns, but {expected}: {text[:60]!r}"
            broken = True
        else:
            columns = columns or len(cells)
            first_line = first_line if tokens else where
            tokens.append(cells[0])
            tags.append(cells[-1])
    if tokens and not broken:
        yield first_line, {"tokens": tokens, "ner_tags": tags}


#: formats with one sentence per row
SENTENCES: Readers = READERS | dict.fromkeys((".conll", ".bio", ".iob", ".iob2"), read_conll)
#: formats of training data; a .txt file has a tag beside each word
TAGGED: Readers = SENTENCES | {".txt": read_conll}
