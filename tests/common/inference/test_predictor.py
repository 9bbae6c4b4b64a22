"""Test that predict reads the columns, files and arguments of training, and refuses rows that lack a needed column."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import BertConfig

from common.data.columns import SAVED, Columns, described
from common.data.files import read_file
from common.errors import InputError
from common.inference.predictor import InputRows, PredictArguments, predict_file
from recipes.clm.predict import prompt_of
from recipes.ner.predict import SavedColumns, in_columns, text_of
from recipes.sentiment.predict import COLUMNS, check_row, pairs_of

PAIRS = {"text": "Premise", "text_pair": "Claim", "label": "Sentiment"}


def trained_on(names: dict[str, str], **values: list) -> BertConfig:
    """Return a configuration as training saves it, for rows with the recipe's columns `values`."""
    return BertConfig(**{SAVED: described(names, Dataset.from_dict(values))})


def arguments(folder: Path, name: str, content: bytes | str, **more) -> PredictArguments:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return PredictArguments(model="m", input=str(folder / name), output=str(folder / "out.jsonl"), **more)


def test_names_and_kinds_travel_in_the_configuration(tmp_path):
    config = trained_on(PAIRS, text=["a"], text_pair=["b"], label=[1])
    config.save_pretrained(tmp_path)
    saved = BertConfig.from_pretrained(tmp_path)
    assert getattr(saved, SAVED)["label"] == {"name": "Sentiment", "kind": "integer"}
    tags = described({"tokens": "words", "ner_tags": "t"}, Dataset.from_dict({"tokens": [["a"]], "ner_tags": [["O"]]}))
    assert tags["tokens"] == {"name": "words", "kind": "list of texts"}
    columns = Columns(saved, **COLUMNS)
    assert columns.value({"Premise": "a", "text": "b"}, "text") == "a"
    assert columns.value({"text": "b"}, "text") == "b"


def test_a_pair_model_needs_both_texts_and_a_model_of_single_texts_reads_one():
    pair = Columns(trained_on(PAIRS, text=["a"], text_pair=["b"], label=["x"]), **COLUMNS)
    assert list(check_row({"Premise": "a", "Claim": "b", "Sentiment": "x"}, pair)) == []
    assert list(check_row({"text": "a", "text_pair": "b"}, pair)) == []
    (problem,) = check_row({"Premise": "a"}, pair)
    assert 'needs "Claim" or "text_pair" (a text: the model was trained on pairs); columns here: Premise' in problem
    single = Columns(trained_on({"text": "Text"}, text=["a"]), **COLUMNS)
    assert pairs_of([{"Text": "a", "text_pair": "b"}], single) == [None]
    (problem,) = check_row({"review": "a"}, single)
    assert problem.startswith('needs "Text" or "text" (a text); columns here: review')
    old = Columns(BertConfig(), **COLUMNS)  # a model of the hub does not say what it was trained on
    assert pairs_of([{"text": "a", "text_pair": "b"}, {"text": "a"}], old) == ["b", None]


def test_the_words_of_the_training_column_are_tagged(tmp_path):
    columns = SavedColumns(trained_on({"tokens": "words"}, tokens=[["a"]]), tokens=("tokens",))
    file = tmp_path / "rows.csv"
    file.write_text('words,gold\n"[""Ann"", ""Li""]",x\nAnn Li,y\n')
    found = [text_of(in_columns(row, columns)) for _, row in read_file(file)]
    assert [row.text for row in found] == ["Ann Li", "Ann Li"]
    assert text_of(in_columns({"words": "Ann Li."}, columns)).words == [(0, 3), (4, 6), (6, 7)]


def test_a_prompt_is_found_in_the_training_column():
    columns = Columns(trained_on({"prompt": "question", "text": "text"}), prompt=("prompt",), text=("text",))
    assert prompt_of({"question": "a", "text": "b"}, columns) == "a"
    assert prompt_of({"text": "b"}, columns) == "b"


def test_input_is_read_with_the_arguments_of_training_and_gold_columns_are_kept(tmp_path, capsys):
    content = "Text;Sentiment\ncafé;pos\nbad;neg;x\n\nlast;neg\n".encode("cp1252")
    given = {"encoding": "cp1252", "csv_delimiter": ";", "skip_bad_rows": 1}
    args = arguments(tmp_path, "rows.csv.gz", gzip.compress(content), **given)
    columns = Columns(trained_on({"text": "Text"}, text=["a"]), **COLUMNS)
    rows = InputRows(args, lambda row: check_row(row, columns))
    assert predict_file(args, lambda some: [row | {"predicted": "x"} for row in some], rows) == 2
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written[0] == {"Text": "café", "Sentiment": "pos", "predicted": "x"}
    assert "rows.csv.gz:3: 3 cells, but the header has 2 columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "good film,1\nbad film,0\n" * 10, ":1: needs \"text\" (a text); columns here: good film, 1; if this"),
        ("a.csv", "text;label\na, b;1\n", ":2: 2 cells, but the header has 1 columns; a semicolon is the likely"),
        ("a.txt", "one\ntwo\n".encode("utf-16-le"), ":1: contains zero bytes; likely utf-16-le"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', ':2: needs "text" (a text); columns here: txt'),
        ("a.doc", "x", ": unknown file type '.doc'"),
    ],
)  # fmt: skip
def test_input_without_the_column_is_told_once(tmp_path, name, content, message):
    columns = Columns(BertConfig(), **COLUMNS)
    with pytest.raises(InputError) as error:
        InputRows(arguments(tmp_path, name, content), lambda row: check_row(row, columns))
    assert str(error.value).startswith(f"{tmp_path / name}{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["out.csv", "out.XLSX", "out.jsonl.gz"])
def test_an_output_name_of_another_format_is_told(tmp_path, name):
    (tmp_path / "texts.csv").write_text("text\na\n")
    with pytest.raises(InputError, match=f"--output {name}: predict writes JSON Lines; choose a name that ends in"):
        PredictArguments(model="m", input=str(tmp_path / "texts.csv"), output=name)


def test_a_folder_or_a_missing_file_as_input_is_told(tmp_path):
    (tmp_path / "texts.csv").write_text("text\na\n")
    with pytest.raises(InputError, match=r"--input .*: is a folder, not a file; name a file in it: texts\.csv"):
        PredictArguments(model="m", input=str(tmp_path), output="o")
    with pytest.raises(InputError, match=r"--input .*: no such file; did you mean .*texts\.csv"):
        PredictArguments(model="m", input=str(tmp_path / "text.csv"), output="o")
