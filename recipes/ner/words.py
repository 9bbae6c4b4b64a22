"""Join the rows of a table with one word each into sentences."""

from collections.abc import Iterable, Iterator

from common.data import Located, Row
from common.data.tables import TableRow, missing_columns
from common.errors import InputError

FEWEST_ROWS = 10  # of one word each, which are taken for a table of words


def join_words(rows: Iterable[Located], column: str, required: bool = True) -> Iterator[Located]:
    """Yield a row for each sentence, with lists of the values of its words, at the place of its first word.

    Neighbouring rows with the same value in `column` are a sentence, and so are rows with a blank value and the row
    above them. The value becomes the `id`.

    Args:
        rows: rows with their places.
        column: name of the column that numbers the sentences.
        required: reject rows without this column instead of returning them unchanged.

    Raises:
        InputError: a row lacks the column, and it is `required`.
    """
    first, sentence = "", None
    number, broken = None, False
    for where, row in rows:
        if isinstance(row, str):
            yield where, row
            broken = True
        elif column not in row and not required:
            yield where, row
        elif column not in row:
            problem = missing_columns(row, [column])
            raise InputError(f"{problem.place(row, where)}: {problem}")
        else:
            value = str("" if row[column] is None else row[column]).strip()
            if sentence is None or value not in ("", number):
                if sentence is not None and not broken:
                    yield first, sentence
                first, number, broken = where, value, False
                sentence = _begin(row, column, value)
            for name, cell in row.items():
                if name not in (column, "id"):
                    sentence.setdefault(name, []).append(cell)
    if sentence is not None and not broken:
        yield first, sentence


def _begin(row: Row, column: str, number: str) -> Row:
    cells = {name: [] for name in row if name not in (column, "id")}
    return (TableRow(cells, row.table) if isinstance(row, TableRow) else cells) | {"id": number}


def check_words(rows: Iterable[Located], words: str) -> None:
    """Raise `InputError` if each row of a table has one word, because nothing says where a sentence ends.

    Args:
        rows: rows with their places.
        words: name of the column of words.
    """
    cells = [(where, row) for where, row in rows if isinstance(row, TableRow)]
    single = [isinstance(row.get(words), str) and len(row[words].split()) < 2 for _, row in cells]
    if len(cells) >= FEWEST_ROWS and all(single):
        where, row = cells[0]
        others = ", ".join(name for name in row if name != words)
        raise InputError(
            f"{where}: each of the {len(cells):,} rows has one word; name the column that numbers the sentences by "
            f"--sentence_column_name; other columns here: {others or 'none'}"
        )
