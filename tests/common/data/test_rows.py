"""Test reading rows from every format, and the messages about bad input."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from common.args import DataArguments
from common.data.files import read_file
from common.data.labels import label_names
from common.data.rows import load_splits
from common.errors import InputError
from recipes.ner import train
from recipes.ner.conll import BY_CONTENT
from recipes.ner.reading import check_row, file_reader
from tests.conftest import read_jsonl, run, write_jsonl

ROWS = [
    {"tokens": ["Oslo", "fell"], "ner_tags": ["B-LOC", "O"], "id": "1"},
    {"tokens": ["Ann", '"the', 'Axe"', "Li"], "ner_tags": ["B-PER", "I-PER", "I-PER", "I-PER"], "id": "2"},
    {"tokens": ["ça", "va", "?"], "ner_tags": ["O", "O", "O"], "id": "3"},
]
COLUMNS = {"tokens": "tokens", "ner_tags": "ner_tags"}
READ = file_reader(BY_CONTENT, ("tokens", "ner_tags"))


def load(**arguments) -> DatasetDict:
    return load_splits(DataArguments(**arguments), COLUMNS, check_row, list_columns=COLUMNS, read=READ)


def conll(rows: list[dict], columns: int) -> str:
    middle = " x y"[: 2 * (columns - 2)]
    sentences = [
        "\n".join(f"{word}{middle} {tag}" for word, tag in zip(row["tokens"], row["ner_tags"], strict=True))
        for row in rows
    ]
    return "-DOCSTART- -X- -X- O\n\n" + "\n\n".join(sentences) + "\n"


def write(folder: Path, ending: str) -> str:
    path = folder / f"rows{ending}"
    if ending == ".jsonl":
        return write_jsonl(path, ROWS)
    if ending == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif ending == ".parquet":
        names = ["O", "B-LOC", "B-PER", "I-PER"]  # tags as integers of a ClassLabel
        rows = [row | {"ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in ROWS]
        tags = List(ClassLabel(names=names))
        features = Features({"tokens": List(Value("string")), "ner_tags": tags, "id": Value("string")})
        Dataset.from_list(rows, features=features).to_parquet(str(path))
    elif ending == ".csv":
        cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in ROWS]
        Dataset.from_list(cells).to_csv(str(path))
    elif ending == ".tsv":
        lines = ["tokens\tner_tags", *("\t".join(" ".join(row[c]) for c in COLUMNS) for row in ROWS)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text(conll(ROWS, 4 if ending == ".conll" else 2), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".conll", ".bio", ".txt"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    file = write(tmp_path, ending)
    data = load(train_file=file, validation_file=file)
    assert data["train"].to_list() == ROWS


def test_plain_text_gives_a_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone line\r\n\n  two\n".encode())
    assert [row for _, row in read_file(tmp_path / "a.txt")] == [{"text": "one line"}, {"text": "  two"}]


def test_json_with_an_object_a_line_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    found = list(read_file(tmp_path / "a.json"))
    assert [row for _, row in found] == ROWS
    assert found[1][0].endswith("a.json:3")


def test_a_folder_saved_by_datasets_with_class_labels(tmp_path):
    names = ["O", "B-LOC", "B-PER", "I-PER"]
    tags = List(ClassLabel(names=names))
    features = Features({"tokens": List(Value("string")), "ner_tags": tags, "id": Value("string")})
    rows = [row | {"ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in ROWS]
    split = Dataset.from_list(rows, features=features)
    DatasetDict({"train": split, "validation": split}).save_to_disk(str(tmp_path / "saved"))
    data = load(dataset_name=str(tmp_path / "saved"))
    assert data["train"].to_list() == ROWS
    assert label_names(data, "ner_tags") == ["B-LOC", "B-PER", "I-PER", "O"]


def test_class_numbers_without_a_name_are_told(tmp_path):
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-LOC"]))})
    plain = Features({"tokens": List(Value("string")), "ner_tags": List(Value("int64"))})
    rows = Dataset.from_list([{"tokens": ["a", "b"], "ner_tags": [0, 7]}], features=plain).cast(features)
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="row 1: tag 2 is '<unknown class 7>'"):
        load(dataset_name=str(tmp_path / "saved"))


def test_a_hub_name_without_a_network_ends_in_one_sentence():
    with pytest.raises(InputError) as error:
        load(dataset_name="no-such/data")
    assert "--dataset_name no-such/data: " in str(error.value)
    assert "without a network, give a saved folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_validation_split_is_carved_the_same_way_each_time(tmp_path, capsys):
    rows = [{"tokens": [str(i)], "ner_tags": ["O"]} for i in range(50)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    first, again = load(train_file=file), load(train_file=file)
    assert "5 of 50 training rows are split off" in capsys.readouterr().out
    assert first["validation"].to_list() == again["validation"].to_list()
    kept, carved = ([int(row["tokens"][0]) for row in first[split]] for split in ("train", "validation"))
    assert sorted(kept + carved) == list(range(50))
    assert kept == sorted(kept)
    assert carved != list(range(45, 50))


def test_an_id_in_one_split_only_does_no_harm(tmp_path, arguments):
    rows = read_jsonl(Path(arguments[arguments.index("--test_file") + 1]))
    arguments[arguments.index("--test_file") + 1] = write_jsonl(
        tmp_path / "no_id.jsonl", [{k: v for k, v in row.items() if k != "id"} for row in rows]
    )
    train.main(arguments)
    found = read_jsonl(tmp_path / "out" / "predictions_test.jsonl")
    assert [row["id"] for row in found] == [str(i + 1) for i in range(len(rows))]


def test_max_samples_draw_the_same_rows_each_time_and_judge_no_other(tmp_path, small):
    files = {f"{split}_file": file for split, file in small.items()}
    limits = {"max_train_samples": 5, "max_eval_samples": 3, "max_predict_samples": 1000}
    data = load(**files, **limits)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 5, "validation": 3, "test": 20}
    assert data["train"].to_list() == load(**files, **limits)["train"].to_list()
    rows, drawn = read_jsonl(Path(small["train"])), data["train"]["tokens"][:]
    bad = [row if row["tokens"] in drawn else {"tokens": ["a"], "ner_tags": ["x"]} for row in rows]
    files["train_file"] = write_jsonl(tmp_path / "bad.jsonl", bad)
    assert load(**files, **limits)["train"]["tokens"][:] == drawn
    with pytest.raises(InputError, match="tag 1 is 'x'"):
        load(**files)


def test_train_rows_names_the_rows_to_use(tmp_path):
    file, numbers = write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "numbers.txt"
    numbers.write_text("3\n1\n")
    data = load(train_file=file, validation_file=file, train_rows=str(numbers))
    assert data["train"]["id"][:] == ["3", "1"]
    assert len(data["validation"]) == 3
    for text, message in (
        ("2\n4\n", r"numbers.txt:2: '4' is no row; give a number from 1 to 3 a line"),
        ("x\n", "numbers.txt:1: 'x' is no row"),
        ("2\n2\n", "numbers.txt:2: row 2 is also in .*numbers.txt:1; name each row once"),
        ("", "has no numbers; name the rows to train on, one a line"),
    ):
        numbers.write_text(text)
        with pytest.raises(InputError, match=message):
            load(train_file=file, validation_file=file, train_rows=str(numbers))
    with pytest.raises(InputError, match=r"--train_rows gone\.txt: no such file"):
        load(train_file=file, train_rows="gone.txt")


def test_labels_come_from_all_splits_and_unseen_ones_are_named(tmp_path, capsys):
    train_file = write_jsonl(tmp_path / "train.jsonl", ROWS)
    other = [{"tokens": ["Acme"], "ner_tags": ["B-ORG"]}]
    data = load(train_file=train_file, validation_file=write_jsonl(tmp_path / "dev.jsonl", other))
    assert label_names(data, "ner_tags") == ["B-LOC", "B-ORG", "B-PER", "I-PER", "O"]
    assert "labels of validation that training never sees and cannot learn: B-ORG" in capsys.readouterr().err


def test_train_and_test_the_same_file_is_warned_of(tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    copy = write_jsonl(tmp_path / "b.jsonl", ROWS)
    load(train_file=file, validation_file=copy, test_file=file)
    warnings = capsys.readouterr().err
    assert f"{file}: same content as the train file; test scores mean nothing" in warnings
    assert f"{copy}: same content as the train file; validation scores mean nothing" in warnings


GOOD = json.dumps(ROWS[0])
BAD_FILES = {
    "malformed line": (".jsonl", f'{GOOD}\n{{"tokens": ["a"], \n', ":2: not a JSON object: Expecting property name"),
    "two in a line": (".jsonl", f"{GOOD}{GOOD}", f":1: not a JSON object: Extra data in column {len(GOOD) + 1}"),
    "empty file": (".jsonl", "", ": contains no rows"),
    "blank file": (".jsonl", "\n \n", ": contains no rows"),
    "not UTF-8": (".jsonl", f"{GOOD}\n".encode() + '{"tokens": ["é"]}'.encode("latin-1"), ":2: not UTF-8 text"),
    "missing column": (".jsonl", '{"w": ["a"], "t": ["O"]}', ":1: no column tokens nor ner_tags; columns here: w, t"),
    "lengths differ": (".jsonl", '{"tokens": ["a", "b"], "ner_tags": ["O"]}', ":1: 2 tokens but 1 tags"),
    "malformed tag": (".jsonl", f'{GOOD}\n{{"tokens": ["a"], "ner_tags": ["PER"]}}', ":2: tag 1 is"),
    "invalid BIO": (".jsonl", '{"tokens": ["a", "b"], "ner_tags": ["O", "I-X"]}', ":1: tag 2 (I-X on"),
    "tag is null": (".jsonl", '{"tokens": ["a"], "ner_tags": [null]}', ":1: no tags: ner_tags is [None]"),
    "tags as numbers": (".jsonl", '{"tokens": ["a"], "ner_tags": [3]}', ":1: tag 1 is the number 3"),
    "empty sentence": (".jsonl", '{"tokens": [], "ner_tags": []}', ":1: empty sentence"),
    "row is a list": (".jsonl", "[1, 2]", ":1: not a JSON object but a list"),
    "key twice": (".jsonl", '{"tokens": ["a"], "tokens": ["b"], "ner_tags": ["O"]}', ":1: not a JSON object: key"),
    "NaN": (".jsonl", '{"tokens": ["a"], "ner_tags": NaN}', ":1: not a JSON object: NaN is not JSON"),
    "huge number": (".jsonl", '{"tokens": ["a"], "ner_tags": ' + "9" * 5000 + "}", ":1: not a JSON object"),
    "deep nesting": (".jsonl", '{"tokens": ' + "[" * 100000 + "}", ":1: not a JSON object"),
    "JSON cut off": (".json", '[{"tokens": ["a"],\n "ner_tags"', ":2: not a JSON list"),
    "half a surrogate": (".jsonl", '{"tokens": ["\\ud83d"], "ner_tags": ["O"]}', ":1: not a JSON object: half of a"),
    "JSON list not UTF-8": (".json", b'[{"tokens": ["a"],\n"ner_tags": ["\xe9"]}]', ":2: not UTF-8 text"),
    "ragged CSV": (".csv", "tokens,ner_tags\na,O\na,O,x\n", ":3: 3 cells, but the header has 2 columns"),
    "open quote in CSV": (".csv", 'tokens,ner_tags\n"a,O\n', "not comma-separated text"),
    "CSV column twice": (".csv", "tokens,tokens\na,O\n", ":1: two columns have the same name"),
    "no tag column": (".conll", "Oslo B-LOC\nfell\n", ":2: 1 column, but most lines have 2"),
    "Parquet cut off": (".parquet", "PAR1 and no more", "not a Parquet file"),
    "unknown ending": (".docx", "x", "unknown file type '.docx'"),
    "plain text": (".txt", "Nobody\n", "each line has one column, a word without a tag"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_name_file_and_line_and_nothing_is_written(tmp_path, case):
    ending, content, message = BAD_FILES[case]
    file = tmp_path / f"bad{ending}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        train.main(["--train_file", str(file), "--output_dir", str(tmp_path / "out")])
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_up_to_ten_problems_at_once_with_the_count_of_the_rest(tmp_path):
    file = write_jsonl(tmp_path / "bad.jsonl", [{"tokens": ["a"], "ner_tags": ["x"]}] * 25)
    with pytest.raises(InputError) as error:
        load(train_file=file)
    lines = str(error.value).splitlines()
    assert len(lines) == 11
    assert lines[9].startswith(f"{file}:10: ")
    assert lines[10] == "... and 15 more problems"


def test_the_program_exits_with_2_and_without_a_traceback(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("{}\nnot json\n")
    done = run("-m", "recipes.ner.train", "--train_file", str(file), "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 2
    assert f"error: {file}:2: not a JSON object" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
