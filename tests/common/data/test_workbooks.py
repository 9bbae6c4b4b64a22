"""Test that sheets give the rows that a CSV file of them gives."""

import pytest

from common.args import FileArguments
from common.data.files import read_file
from common.errors import InputError
from tests.conftest import ROOT

REVIEWS = ROOT / "tests" / "formats" / "sentiment" / "reviews.xlsx"


def test_the_first_sheet_is_read_without_blank_rows_and_with_whole_numbers(capsys):
    rows = list(read_file(REVIEWS))
    assert [row["Label"] for _, row in rows] == ["1", "0", "1", "0"]
    assert [row["id"] for _, row in rows] == ["1", "2", "3", "4"]
    assert rows[2][1]["Text"] == 'A film of 100 minutes,\nand "every one" counts.'
    assert rows[3][1] == {"id": "4", "Text": "2024", "Label": "0", "Date": "2026-11-04"}
    assert [where.rsplit(", ", 1)[1] for where, _ in rows] == ["row 2", "row 3", "row 5", "row 6"]  # as in Excel
    assert "sheet Reviews is read; --sheet names another: Notes" in capsys.readouterr().out


def test_another_sheet_and_sheets_without_a_header(capsys):
    ((_, row),) = read_file(REVIEWS, args=FileArguments(sheet="Notes"))
    assert row == {"text": "Other sheet.", "label": "1"}
    given = FileArguments(sheet="Notes", csv_header=False, column_names=["a", "b"])
    assert next(row for _, row in read_file(REVIEWS, args=given)) == {"a": "text", "b": "label"}
    short = FileArguments(sheet="Notes", csv_header=False, column_names=["a"])
    assert next(read_file(REVIEWS, args=short))[1].startswith("more cells than the 1 columns")
    with pytest.raises(InputError, match=r"--sheet Other: no such sheet in .*; give one of: Reviews, Notes"):
        list(read_file(REVIEWS, args=FileArguments(sheet="Other")))
    assert capsys.readouterr().out == ""


def test_a_damaged_workbook_is_told(tmp_path):
    for name, content in (("a.xlsx", REVIEWS.read_bytes()[:2000]), ("b.xlsx", b"text,label\na,1\n"), ("c.xls", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as a workbook: .*; save it again as"):
            list(read_file(tmp_path / name))
