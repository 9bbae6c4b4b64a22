"""Test that parallel files, folders of classes, workbooks and exports become rows of text and label."""

import json

import pytest
from transformers import PretrainedConfig

from common.args import FileArguments
from common.data.columns import Columns
from common.errors import InputError
from recipes.sentiment.arguments import SentimentDataArguments
from recipes.sentiment.labels import load_labeled
from recipes.sentiment.predict import COLUMNS, check_row
from recipes.sentiment.reading import read_rows
from tests.conftest import ROOT

FILES = ROOT / "tests" / "formats" / "sentiment"


def loaded(train, **arguments):
    """Return the training rows as pairs of text and label."""
    arguments.setdefault("validation_file", str(train))
    data, _, several, _ = load_labeled(SentimentDataArguments(train_file=str(train), **arguments))
    assert not several
    return data, list(zip(data["train"]["text"], data["train"]["label"], strict=True))


def test_two_parallel_files_are_read_for_each_split(tmp_path, capsys):
    folder = FILES / "tweeteval"
    texts, labels = str(folder / "train_text.txt"), str(folder / "train_labels.txt")
    more = {"validation_file": str(folder / "val_text.txt"), "label_file": [labels, str(folder / "val_labels.txt")]}
    data, rows = loaded(texts, **more)
    assert rows[:2] == [('What a day "off" at the sea', "1"), ("The train is late again", "0")]
    assert data["validation"]["label"][:] == ["1", "0"]
    args = SentimentDataArguments(train_file=texts, **more)
    assert set(args.files()) == {"train_file", "validation_file", "train_label_file", "validation_label_file"}

    with pytest.raises(InputError, match="--label_file: 1 files; needed: one each for --train_file, --validation_file"):
        loaded(texts, label_file=[labels])
    with pytest.raises(InputError, match="no such file; did you mean"):
        SentimentDataArguments(train_file=texts, label_file=[labels.replace("labels", "label")])
    with pytest.raises(
        InputError, match="plain text has no labels; give --label_file with a label a line; end the name of a table"
    ):
        loaded(texts)
    with pytest.raises(InputError, match="--label_file: needs the texts; add --train_file"):
        SentimentDataArguments(label_file=[labels])
    longer = tmp_path / "labels.txt"
    longer.write_text("1\n0\n1\n0\n1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"labels\.txt:5: .*train_text\.txt has no line for this line of"):
        loaded(texts, label_file=[str(longer)] * 2)
    longer.write_text("1\n0\n1\n\n\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"train_text\.txt:4: "):
        loaded(texts, label_file=[str(longer)] * 2)


def test_files_of_fasttext_are_read_with_one_label_or_several(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("__label__pos  A joy \n\n__label__neg\tA bore, __label__x\n", encoding="utf-8")
    assert loaded(file)[1] == [("A joy", "pos"), ("A bore, __label__x", "neg")]
    file.write_text("__label__a __label__b Both\n__label__a One\n", encoding="utf-8")
    data, _, several, _ = load_labeled(SentimentDataArguments(train_file=str(file), validation_file=str(file)))
    assert several
    assert data["train"]["label"][:] == [["a", "b"], ["a"]]
    file.write_text("__label__pos A joy\nA bore\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"train\.txt:2: does not begin with __label__"):
        loaded(file)


def test_a_folder_a_class(tmp_path, capsys):
    data, rows = loaded(FILES / "aclImdb")
    assert rows == [
        ("The sequel nobody needed.", "neg"),
        ("I left\nafter an hour.", "neg"),
        ("Not a note out of place.<br /><br />See it twice.", "pos"),
        ("A joy from start to end.\n", "pos"),
    ]
    assert data["train"]["id"][:2] == ["neg/0_3.txt", "neg/1_2.txt"]
    assert "unsup: left out, as its texts have no label" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"aclImdb: no \.txt file in this folder of a class; name it as a split"):
        loaded(FILES)
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="has no folder for each class"):
        loaded(tmp_path)


def test_workbooks_and_exports_of_doccano(capsys):
    _, rows = loaded(FILES / "reviews.xlsx", text_column_name="Text", label_column_name="Label")
    assert rows[1:] == [
        ("The sequel nobody needed.", "0"),
        ('A film of 100 minutes,\nand "every one" counts.', "1"),
        ("2024", "0"),
    ]
    _, rows = loaded(FILES / "doccano.jsonl")
    assert rows[0] == ("A joy from start to end.", "positive")
    assert "each row has one label; for a model" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["aclImdb", "tweeteval/train_text.txt", "doccano.jsonl"])
def test_predict_reads_what_training_reads(name):
    rows = [row for _, row in read_rows(FILES / name, FileArguments(), ("text", "label"), predicting=True)]
    columns = Columns(PretrainedConfig(), **COLUMNS)
    assert len(rows) >= 3
    assert [problem for row in rows for problem in check_row(row, columns)] == []


def test_json_of_label_studio_has_texts_and_choices(tmp_path):
    def task(number, text, *choices, **more):
        result = [{"type": "choices", "value": {"choices": list(choices)}}] if choices else []
        return {"id": number, "data": {"review": text}, "annotations": [{"result": result} | more]}

    tasks = [task(1, "fine", "good"), task(2, "poor", "bad"), task(3, "skipped", "bad", was_cancelled=True)]
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps(tasks), encoding="utf-8")
    rows = [row for _, row in read_rows(file, FileArguments(), ("text", "label"))]
    assert rows[0] == {"id": 1, "text": "fine", "label": ["good"]}
    assert [row["label"] for row in rows] == [["good"], ["bad"], None]
    file.write_text(json.dumps([{"text": "a", "mood": {"choices": ["sad", "calm"]}}]), encoding="utf-8")
    assert next(read_rows(file, FileArguments(), ("text", "mood")))[1]["mood"] == ["sad", "calm"]
