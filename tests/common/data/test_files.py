"""Test reading tables, JSON layouts, encodings and compressed files: rows as they are, or the argument that decides."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.args import DataArguments, FileArguments
from common.data.encodings import likely_encoding
from common.data.files import read_file
from common.data.json_files import parse_cell
from common.data.rows import load_splits
from common.errors import InputError

ROWS = [{"text": "a, b", "label": "pos"}, {"text": 'c "d"', "label": "neg"}]
CSV = b'text,label\n"a, b",pos\n"c ""d""",neg\n'
COLUMNS = {"text": "text", "label": "label"}


def is_text(row: dict) -> list[str]:
    return [f"{name} is no text" for name in ("text", "label") if not isinstance(row[name], str)]


def load(path: Path, content: bytes | str, **arguments) -> list[dict]:
    """Return the training rows of a file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    args = DataArguments(train_file=str(path), validation_file=str(path), **arguments)
    rows = load_splits(args, COLUMNS, is_text)["train"].to_list()
    return [{name: row[name] for name in COLUMNS} for row in rows]


def refusal(path: Path, content: bytes | str, **arguments) -> str:
    with pytest.raises(InputError) as error:
        load(path, content, **arguments)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, CSV)
    return file.getvalue()


PACKED = {
    "a.csv.gz": gzip.compress(CSV),
    "a.CSV.BZ2": bz2.compress(CSV),
    "a.csv.xz": lzma.compress(CSV),
    "a.csv.zst": pa.compress(CSV, codec="zstd", asbytes=True),
    "a.csv.zip": zipped("folder/rows.csv", "__MACOSX/._rows.csv"),
    "a.zip": zipped("rows.csv"),
}


@pytest.mark.parametrize("name", PACKED)
def test_compressed_files_of_any_ending_are_read_and_damaged_ones_named(tmp_path, name):
    assert load(tmp_path / name, PACKED[name]) == ROWS
    kind = "not a whole (gzip|bzip2|xz|zstandard|zip) file: .*; compress the file again"
    for bad in (PACKED[name][:-9], b"not compressed at all"):
        with pytest.raises(InputError, match=kind):
            load(tmp_path / name, bad)


def test_an_archive_of_several_files_and_a_compressed_file_of_the_wrong_name_are_told(tmp_path):
    assert "2 files in this archive (a.csv, b.csv); unpack it" in refusal(tmp_path / "a.zip", zipped("a.csv", "b.csv"))
    assert "not text but a gzip file; end its name in .gz" in refusal(tmp_path / "a.csv", gzip.compress(CSV))


LANGUAGES = {
    "cp1252": "The “best” café in town – it’s 5 € only.",
    "cp1250": "Bardzo mi się podobał, żółć. Więcej nie pójdę, źle.",
    "gb18030": "这部电影很好看，我非常喜欢。服务态度很差，不推荐。",
    "big5": "這部電影很好看，我非常喜歡。服務態度很差，不推薦。",
    "cp932": "この映画はとても面白かったです。二度と行きません。",
    "euc_jp": "この映画はとても面白かったです。二度と行きません。",
    "cp949": "이 영화는 정말 재미있었습니다. 다시는 가지 않겠습니다.",
    "cp1251": "Этот фильм мне очень понравился. Больше никогда не пойду.",
    "koi8_r": "Этот фильм мне очень понравился. Больше никогда не пойду.",
    "cp1253": "Αυτή η ταινία μου άρεσε πολύ. Δεν θα ξαναπάω ποτέ.",
    "cp1256": "هذا الفيلم أعجبني كثيرا. لن أذهب مرة أخرى.",
    "utf-16-le": "abc 很好",
    "utf-16-be": "abc 很好",
}


@pytest.mark.parametrize("encoding", LANGUAGES)
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json"])
def test_another_encoding_is_named_and_then_read(tmp_path, encoding, ending):
    rows = [{"text": LANGUAGES[encoding], "label": "x"}, {"text": "b", "label": "y"}]
    text = {
        ".csv": "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows),
        ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        ".json": json.dumps(rows, ensure_ascii=False),
    }[ending]
    message = refusal(tmp_path / f"a{ending}", text.encode(encoding))
    assert f"give --encoding {encoding}" in message
    assert "\n" not in message
    assert load(tmp_path / f"a{ending}", text.encode(encoding), encoding=encoding) == rows


def test_a_few_letters_name_windows_1252_and_a_damaged_line_of_utf8_is_no_other_encoding(tmp_path):
    assert likely_encoding(b"text,label\nI loved it,pos\nA caf\xe9,neg\n") == "cp1252"
    assert likely_encoding(bytes(range(256))) is None
    mixed = "text,label\nun café,pos\n".encode() + b"caf\xe9,neg\nd,pos\n"
    assert ":3: not UTF-8 text, unlike other lines of this file; correct this line" in refusal(
        tmp_path / "a.csv", mixed
    )
    assert [row["text"] for row in load(tmp_path / "a.csv", mixed, skip_bad_rows=2)] == ["un café", "d"]


def test_a_cell_of_several_lines_is_dropped_whole_with_a_line_that_is_no_text(tmp_path):
    within = 'text,label\n"one\ncafé\nthree",A\nok,B\n'.encode("cp1252")
    opening = 'text,label\n"café\ntwo",A\nok,B\n'.encode("cp1252")
    for content in (within, opening):
        assert [row["text"] for row in load(tmp_path / "a.csv", content, skip_bad_rows=2)] == ["ok"]
        assert "give --encoding cp1252" in refusal(tmp_path / "a.csv", content)
    assert "not comma-separated text" in refusal(tmp_path / "a.csv", opening + b'"open,C\n', skip_bad_rows=2)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16"])
def test_utf_8_in_another_given_encoding_is_named(tmp_path, encoding):
    message = refusal(tmp_path / "a.csv", "text,label\nÁÍ ok,A\n".encode(), encoding=encoding)
    assert f"not {encoding.upper()} text but UTF-8; leave --encoding out" in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_selects_the_encoding(tmp_path, encoding):
    assert load(tmp_path / "a.csv", CSV.decode().encode(encoding)) == ROWS
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert load(tmp_path / "a.jsonl", lines.encode(encoding)) == ROWS


def test_the_first_line_of_excel_names_the_delimiter(tmp_path):
    assert (
        load(
            tmp_path / "a.csv", "sep=;\r\n" + CSV.decode().replace(",", ";", 1).replace(",p", ";p").replace(",n", ";n")
        )
        == ROWS
    )
    assert load(tmp_path / "b.csv", b"SEP=,\n" + CSV) == ROWS


def test_rows_wider_than_the_header_are_told_with_the_remedy(tmp_path):
    names = refusal(tmp_path / "a.csv", '"text","label"\n"1","a","pos"\n"2","b","neg"\n')
    assert names.endswith(
        "a.csv:1: each row has one cell more than the header; add the name of the first column to the header, "
        "such as id"
    )
    commas = refusal(tmp_path / "b.csv", "text,label\na, b,pos\nc,neg\n")
    assert commas.endswith(
        "b.csv:2: 3 cells, but the header has 2 columns; put quotation marks around cells that contain a comma"
    )


def test_a_column_that_each_row_lacks_is_told_once(tmp_path):
    lines = [{"text": "a", "stars": 1}, {"text": "b", "stars": 2}, {"text": "c", "stars": 3}]
    told = refusal(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert told.startswith(f"{tmp_path / 'a.jsonl'}:1: no column label; columns here: text, stars; name yours")
    assert told.endswith(" (4 more such rows)")  # training and validation rows

    assert "\n" not in told


def test_a_file_without_an_ending_is_told(tmp_path):
    told = refusal(tmp_path / "SMSSpamCollection", "ham\tHi\n")
    assert "the name has no ending for its format; add one, such as .tsv; known: .jsonl" in told


def test_objects_over_several_lines_are_told_once(tmp_path):
    pretty = "\n".join(json.dumps(row, indent=1) for row in ROWS)
    told = refusal(tmp_path / "a.json", pretty)
    assert (
        told
        == f"{tmp_path / 'a.json'}: objects over several lines; write one object a line: jq -c . {tmp_path / 'a.json'}"
    )


def test_newlines_in_cells_are_unaltered_and_carriage_returns_end_lines(tmp_path):
    assert load(tmp_path / "a.csv", b'text,label\r\n"a\r\nb",pos\r\nc,neg\r\n')[0]["text"] == "a\r\nb"
    assert load(tmp_path / "a.csv", b'text,label\n"a\r\nb\rc",pos\nc,neg\n')[0]["text"] == "a\r\nb\rc"
    assert [row["text"] for row in load(tmp_path / "a.csv", b"text,label\ra,pos\rc,neg\r")] == ["a", "c"]
    assert load(tmp_path / "a.tsv", b"text\tlabel\na\rb\tpos\nc\tneg\n")[0]["text"] == "a\rb"


QUOTED_TSV = {
    "pandas": ('"She said ""no"""\tneg\nfine\tpos\n', ['She said "no"', "fine"]),
    "pandas, with a newline": ('"one\ntwo"\tneg\nfine\tpos\n', ["one\ntwo", "fine"]),
    "pandas, with a tab": ('"one\ttwo"\tneg\nfine\tpos\n', ["one\ttwo", "fine"]),
    "bare, inside": ('"Bad" film\tneg\nsay "no"\tpos\n', ['"Bad" film', 'say "no"']),
    "bare, whole cell": ('"Bad film"\tneg\nsay "no"\tpos\n', ['"Bad film"', 'say "no"']),
    "bare, open": ('"Bad film\tneg\nfine\tpos\n', ['"Bad film', "fine"]),
    "bare, open over lines": ('"Bad\tneg\nfine"\tpos\n', ['"Bad', 'fine"']),
    "none": ("Bad film\tneg\nfine\tpos\n", ["Bad film", "fine"]),
}


@pytest.mark.parametrize("case", QUOTED_TSV)
def test_quotation_marks_in_tsv_are_read_as_the_whole_file_shows(tmp_path, case):
    text, expected = QUOTED_TSV[case]
    assert [row["text"] for row in load(tmp_path / "a.tsv", "text\tlabel\n" + text)] == expected


def test_quotation_marks_that_may_be_either_need_an_argument(tmp_path):
    text = 'text\tlabel\n"Bad film"\tneg\nfine\tpos\n'
    message = refusal(tmp_path / "a.tsv", text)
    assert ":2: a cell begins with a quotation mark" in message
    assert "--csv_quoting none" in message
    assert "--csv_quoting csv" in message
    assert load(tmp_path / "a.tsv", text, csv_quoting="none")[0]["text"] == '"Bad film"'
    assert load(tmp_path / "a.tsv", text, csv_quoting="csv")[0]["text"] == "Bad film"
    assert "give --csv_quoting none" in refusal(tmp_path / "a.csv", 'text,label\n"Bad" film,neg\n')


def test_a_file_without_a_header_is_told_once_and_read_with_names(tmp_path):
    message = refusal(tmp_path / "a.csv", "I loved it,pos\nbad one,neg\n" * 10)
    assert message.count("\n") == 0
    assert ":1: no column text nor label; columns here: I loved it, pos" in message
    assert "name yours with the arguments" in message  # `DataArguments` alone has none
    assert "--csv_header false --column_names text,label" in message
    rows = load(tmp_path / "a.csv", "good,pos\nbad,neg\n", csv_header=False, column_names=["text,label"])
    assert rows == [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
    ignored = load(tmp_path / "a.csv", "7,good,pos\n8,bad,neg\n", csv_header=False, column_names=[",text,label"])
    assert ignored == rows
    message = refusal(tmp_path / "x.tsv", "Ann\tB-PER\nwent\tO\n\nOslo\tB-LOC\n")
    assert "it looks like CoNLL columns" in message
    assert "--csv_header false" in message


@pytest.mark.parametrize(("delimiter", "argument"), [(";", "';'"), ("@", "'@'"), ("|", "'|'"), ("\t", "tab")])
def test_another_delimiter_is_named_and_then_read(tmp_path, delimiter, argument):
    text = f"text{delimiter}label\nHallo, Welt{delimiter}1\nSchlecht{delimiter}0\n"
    assert f"is the likely delimiter; give --csv_delimiter {argument}" in refusal(tmp_path / "a.csv", text)
    assert load(tmp_path / "a.csv", text, csv_delimiter=delimiter)[0]["text"] == "Hallo, Welt"


def test_columns_that_the_recipe_does_not_need_never_refuse_a_file(tmp_path):
    text = ",text,label,x,x,,\n0,a,pos,1,2,,\n1,b,neg,3,4,,,\n\n,,,,,,\n"
    assert [row["text"] for row in load(tmp_path / "a.csv", text)] == ["a", "b"]
    assert "two columns have the same name; rename one: text" in refusal(tmp_path / "a.csv", "text,text,label\na,b,c\n")
    both = {"text": [["a", "b"], ["c", "d"]], "x": [["p", "q"]] * 2}
    for twice in both:
        columns = [pa.array(values) for name in both for values in (both[name] if name == twice else both[name][:1])]
        names = [name for name in both for _ in range(2 if name == twice else 1)]
        span = pa.array([1, 2], pa.duration("s"))  # datasets cannot read this type
        pq.write_table(pa.table([*columns, span, pa.array(["u", "v"])], [*names, "s", "label"]), tmp_path / "b.parquet")
        content = (tmp_path / "b.parquet").read_bytes()
        if twice == "text":
            assert "two columns have the same name; rename one: text" in refusal(tmp_path / "b.parquet", content)
        else:
            assert [row["text"] for row in load(tmp_path / "b.parquet", content)] == ["a", "b"]


@pytest.mark.parametrize("layout", ["records", "columns", "index", "split", "table"])
def test_the_layouts_of_pandas_are_read(tmp_path, layout):
    assert load(tmp_path / "a.json", pd.DataFrame(ROWS).to_json(orient=layout)) == ROWS


def test_wrapped_rows_are_read_and_other_layouts_told(tmp_path):
    for wrapped in ({"data": ROWS}, {"reviews": ROWS}, {"version": "1.0", "data": ROWS}):
        assert load(tmp_path / "a.json", json.dumps(wrapped, indent=1)) == ROWS
    assert load(tmp_path / "a.json", json.dumps(ROWS[0], indent=1)) == ROWS[:1]
    assert "rows are lists without names" in refusal(tmp_path / "a.json", pd.DataFrame(ROWS).to_json(orient="values"))
    several = json.dumps({"train": ROWS, "test": ROWS})
    assert "several lists of rows (train, test); write each list to a file" in refusal(tmp_path / "a.json", several)
    dialogue = {"messages": [{"role": "user", "content": "a"}]}
    assert [row for _, row in read_file(_written(tmp_path / "b.json", dialogue))] == [dialogue]


def _written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_cells_with_python_lists_are_read_and_joined_texts_refused():
    assert parse_cell("['joy', 'anger']") == ["joy", "anger"]
    assert parse_cell("{'text': array(['x'], dtype=object), 'answer_start': array([3])}") == {
        "text": ["x"],
        "answer_start": [3],
    }
    assert parse_cell("['a' \"b\"]") == ["a", "b"]  # numpy prints no commas
    assert parse_cell("[1. 0.]") == parse_cell("[1 0]") == [1, 0]
    for cell in ("['a', 'b' 'c']", "['a''b']", "[__import__('os')]", "[" * 9999, "[a b]"):
        with pytest.raises(ValueError, match=r"two texts without a comma|neither JSON nor a Python list"):
            parse_cell(cell)


def test_values_that_a_column_cannot_hold_are_told_with_their_row(tmp_path):
    def told(*labels: str) -> str:
        lines = [f'{{"text": "a", "label": {label}}}\n' for label in labels]
        (tmp_path / "a.jsonl").write_text("".join(lines))
        args = DataArguments(train_file=str(tmp_path / "a.jsonl"), validation_file=str(tmp_path / "a.jsonl"))
        with pytest.raises(InputError) as error:
            load_splits(args, COLUMNS, lambda row: [])
        return str(error.value)

    assert "a.jsonl, row 2: label is [1]: differs in type" in told('["x"]', "[1]", '["y"]')
    assert "a.jsonl, row 3: label is 1180591620717411303424: has an integer beyond 64" in told("1", "2", str(2**70))
    assert "a.jsonl:2: not a JSON object: a number of 5,000 digits" in told("1", "9" * 5000)


def test_up_to_n_bad_rows_are_dropped_named_and_counted(tmp_path, capsys):
    text = "text,label\na,1\nb\nc,0\nd,1,2\ne,1\n"
    assert len(refusal(tmp_path / "a.csv", text).split("\n")) == 2
    path = tmp_path / "a.csv"
    assert [row["text"] for row in load(path, text, skip_bad_rows=4)] == ["a", "c", "e"]  # 2 in each of two splits
    printed = capsys.readouterr()
    assert f"dropped: {path}:3: 1 cells, but the header has 2 columns" in printed.err
    assert "--skip_bad_rows: 4 rows with a problem are dropped" in printed.out
    assert "--skip_bad_rows 3: 4 rows have a problem" in refusal(path, text, skip_bad_rows=3)
    assert "no column text nor label" in refusal(path, "a,b\n1,2\n", skip_bad_rows=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoding": "latin-99"}, "--encoding latin-99: no encoding of text"),
        ({"encoding": "rot13"}, "--encoding rot13: no encoding of text"),
        ({"csv_delimiter": "::"}, "--csv_delimiter '::': must be one character"),
        ({"csv_header": False}, "--csv_header false: name the columns by --column_names"),
        ({"column_names": ["a,b"]}, "--column_names: .* add --csv_header false"),
        ({"column_names": ["a,a"], "csv_header": False}, "--column_names a,a: a name is repeated"),
        ({"skip_bad_rows": -1}, "--skip_bad_rows -1: must be at least 0"),
    ],
)
def test_wrong_reading_arguments_are_told(arguments, message):
    with pytest.raises(InputError, match=message):
        FileArguments(**arguments)


def test_a_folder_in_place_of_a_file_names_the_files_in_it(tmp_path):
    (tmp_path / "rows.csv").write_bytes(CSV)
    with pytest.raises(InputError, match=r"is a folder, not a file; name a file in it: rows\.csv"):
        DataArguments(train_file=str(tmp_path))
