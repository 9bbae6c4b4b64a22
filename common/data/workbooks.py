"""Read rows from the sheets of Excel and LibreOffice."""

import io
from collections.abc import Iterator
from typing import Any

from python_calamine import CalamineError, CalamineWorkbook, PasswordError

from common.data.source import Located, Source
from common.data.tables import SAME_NAME, Table, TableRow
from common.errors import InputError, tell

WORKBOOKS = (".xlsx", ".xls", ".ods")


def read_workbook(source: Source) -> Iterator[Located]:
    """Yield the rows of the sheet `--sheet`, or of the first sheet; the first row that is not blank names the columns.

    Cells are texts, as in a CSV file that Excel writes of the sheet, but whole numbers have no decimals. Blank rows and
    columns without a name are skipped. The place of a row has its number in Excel.

    Raises:
        InputError: the file is damaged or encrypted, or has no such sheet.
    """
    path, given = source.path, source.args.column_names
    names, table = given or [], None
    for number, cells in enumerate(_sheet(source), 1):
        texts = [_text(cell) for cell in cells]
        if not any(text.strip() for text in texts):
            continue
        where = f"{path}, row {number}"
        if table is None:
            names = given or [text.strip() for text in texts]
            repeated = {name: SAME_NAME for name in names if name and names.count(name) > 1}
            table = Table(str(path) if given else where, names, repeated)
            if given is None:
                continue
        texts += [""] * (len(names) - len(texts))
        if any(text.strip() for text in texts[len(names) :]):
            yield where, f"more cells than the {len(names)} columns; name the column, or empty the cells"
        else:
            row = {name: text for name, text in zip(names, texts, strict=False) if name and name not in table.unusable}
            yield where, TableRow(row, table)


def _sheet(source: Source) -> Iterator[list[Any]]:
    with source.open() as file:
        content = file.read()
    try:
        workbook = CalamineWorkbook.from_filelike(io.BytesIO(content))
        sheets = workbook.sheet_names
        name = source.args.sheet
        if name is not None and name not in sheets:
            raise InputError(f"--sheet {name}: no such sheet in {source.path}; give one of: {', '.join(sheets)}")
        if name is None and len(sheets) > 1:
            tell(f"{source.path}: sheet {sheets[0]} is read; --sheet names another: {', '.join(sheets[1:])}")
        yield from workbook.get_sheet_by_name(sheets[0] if name is None else name).to_python(skip_empty_area=False)
    except PasswordError:
        raise InputError(f"{source.path}: is encrypted; save it without a password") from None
    except CalamineError as error:
        raise InputError(f"{source.path}: cannot be read as a workbook: {error}; save it again as .xlsx") from None


def _text(cell: Any) -> str:
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return "" if cell is None else str(cell)
