"""Test how labels are read: lists, cells with several labels, 0 and 1 for each class, and rows without a label."""

import csv
import json
import re
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from common.data.samples import carve
from common.errors import InputError
from recipes.sentiment import train
from recipes.sentiment.arguments import SentimentDataArguments
from recipes.sentiment.labels import load_labeled, written_list
from tests.conftest import read_jsonl, write_jsonl

TEXTS = [f"text {i}" for i in range(12)]


def loaded(tmp_path: Path, labels: list, **arguments) -> tuple:
    """Return labels by split, unlabeled rows, whether rows have several labels, and classes, of a file of `labels`."""
    rows = [
        {"text": text} | (label if isinstance(label, dict) else {"label": label})
        for text, label in zip(TEXTS, labels * 12, strict=False)
    ]
    file = arguments.pop("train_file", None) or write_jsonl(tmp_path / "a.jsonl", rows)
    args = SentimentDataArguments(**{"train_file": file, "validation_file": file} | arguments)
    data, unlabeled, several, names = load_labeled(args)
    return {split: rows["label"][:] for split, rows in data.items()}, unlabeled, several, names


SEVERAL = {
    "lists": (["a", "b"], ["a"], []),
    "JSON": ('["a", "b"]', '["a"]', "[]"),
    "Python": ("['a', 'b']", "['a']", "[]"),
    "a set": ("{'a', 'b'}", "{'a'}", "[]"),
    "numpy": ("['a' 'b']", "['a']", "[]"),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_lists_in_any_notation_are_several_labels(tmp_path, case):
    labels, _, several, names = loaded(tmp_path, list(SEVERAL[case]))
    assert (several, names) == (True, ["a", "b"])
    assert labels["train"][:3] == [["a", "b"], ["a"], []]


def test_text_that_is_no_list_stays_text():
    for text in ("[neg", "(good)", "[good]", "{}", "(1)", "a, b", "[", '{"a": 1}'):
        assert written_list(text) == text
    assert written_list("[1 0 1]") == [1, 0, 1]
    assert written_list("[0. 1.]") == [0, 1]
    assert written_list('["it\'s", "b"]') == ["it's", "b"]


@pytest.mark.parametrize(("joined", "separator"), [("rude,threat", ","), ("rude|threat", "|"), ("2;6", ";")])
def test_a_separator_in_labels_is_named_and_decided_by_an_argument(tmp_path, joined, separator):
    cells = [joined, joined.split(separator)[0], "x"]
    with pytest.raises(InputError, match=re.escape(f'--label_separator "{separator}" to split them, or --multi_label')):
        loaded(tmp_path, cells)
    labels, _, several, _ = loaded(tmp_path, cells, label_separator=separator)
    assert several
    assert labels["train"][:3] == [joined.split(separator), [cells[1]], ["x"]]
    labels, _, several, names = loaded(tmp_path, cells, multi_label="false")
    assert (several, names) == (False, sorted(cells))


def test_commas_within_names_of_classes_are_no_separator(tmp_path):
    assert loaded(tmp_path, ["Oil, gas", "Coal", "Wind; water"])[2] is False


MULTI_HOT = {
    "lists": [[1, 0, 1], [0, 1, 0], [0, 0, 0]],
    "of two": [[1, 0], [1, 1]],
    "floats": [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]],
    "booleans": [[True, False], [True, True]],
    "cells": ["[1, 0, 1]", "[0, 1, 0]", "[0, 0, 0]"],
}


@pytest.mark.parametrize("case", MULTI_HOT)
def test_lists_of_a_0_or_1_for_each_class(tmp_path, capsys, case):
    labels, _, several, names = loaded(tmp_path, MULTI_HOT[case])
    assert several
    first = json.loads(MULTI_HOT[case][0]) if case == "cells" else MULTI_HOT[case][0]
    assert labels["train"][0] == [str(i) for i, bit in enumerate(first) if bit]
    assert "are read as a yes or no for each class" in capsys.readouterr().out
    assert set(names) <= {"0", "1", "2"}


def test_lists_of_class_numbers_are_no_0_or_1_for_each_class(tmp_path):
    assert loaded(tmp_path, [[1, 0], [0], [2]])[0]["train"][:3] == [["1", "0"], ["0"], ["2"]]
    with pytest.raises(InputError, match="names a class twice, and is no yes or no"):
        loaded(tmp_path, [[1, 1], [0]])


def test_columns_of_0_and_1(tmp_path, capsys):
    columns = {"label_column_name": "toxic,insult , threat"}
    cells = [
        {"toxic": 1, "insult": "0", "threat": 1.0},
        {"toxic": "False", "insult": True, "threat": "1.0"},
        {"toxic": 0, "insult": 0, "threat": 0},
    ]
    labels, _, several, names = loaded(tmp_path, cells, **columns)
    assert (several, names) == (True, ["insult", "threat", "toxic"])
    assert labels["train"][:3] == [["toxic", "threat"], ["insult", "threat"], []]
    one = [{"toxic": 1, "insult": 0, "threat": 0}, {"toxic": 0, "insult": 1, "threat": 0}]
    assert loaded(tmp_path, one, **columns)[2] is False
    assert "each row has one label" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"a.jsonl:1: insult is 3; needed: 0 or 1"):
        loaded(tmp_path, [{"toxic": 1, "insult": 3, "threat": 0}], **columns)
    with pytest.raises(InputError, match="no column threat; columns here: text, toxic, insult"):
        loaded(tmp_path, [{"toxic": 1, "insult": 0}], **columns, drop_unlabeled=True)


def test_one_label_a_row_in_lists_is_told(tmp_path, capsys):
    labels, _, several, _ = loaded(tmp_path, [["a"], ["b"]])
    assert (several, labels["train"][:2]) == (False, ["a", "b"])
    assert "each row has one label; for a model" in capsys.readouterr().out
    labels, _, several, _ = loaded(tmp_path, [["a"], ["b"]], multi_label="true")
    assert (several, labels["train"][:2]) == (True, [["a"], ["b"]])
    with pytest.raises(InputError, match=r"--multi_label false: a row has 2 labels \(a, b\)"):
        loaded(tmp_path, [["a"], ["a", "b"]], multi_label="false")


def test_labels_that_are_alike_and_rare_classes_are_warned_of(tmp_path, capsys):
    loaded(tmp_path, ["Positive"] * 6 + ["negative"] * 4 + ["positive "] * 2)
    warnings = capsys.readouterr().err
    assert "classes that differ only in blanks or case" in warnings
    assert "'Positive' (12 rows) and 'positive ' (4 rows)" in warnings
    assert "fewer than 5 training rows, which are hard to learn: negative (4), positive  (2)" in warnings


def test_scores_are_no_classes_but_half_stars_are(tmp_path):
    for scores in ([i / 7 for i in range(12)], [f"{i / 7:.2f}" for i in range(12)]):
        with pytest.raises(InputError, match=r"12 different numbers such as .*: scores, not classes; round them"):
            loaded(tmp_path, scores)
    assert loaded(tmp_path, [0.5, 1.0, 1.5, 5.0])[3] == ["0.5", "1", "1.5", "5"]
    assert loaded(tmp_path, [2.0, 10.0])[3] == ["2", "10"]


def test_odd_labels_end_in_a_sentence_or_train(tmp_path):
    assert loaded(tmp_path, [2**70, 3])[3] == ["3", str(2**70)]
    assert loaded(tmp_path, ["--1", "1"])[3] == ["--1", "1"]
    assert loaded(tmp_path, ["9" * 5000, "1"])[3] == ["1", "9" * 5000]
    with pytest.raises(InputError, match="type list of type number, but the first row has type list of type text"):
        loaded(tmp_path, [["x"], [1]])


def test_numbers_get_the_names_of_classes(tmp_path):
    names = {"label_names": ["bad,good"]}
    assert loaded(tmp_path, [0, 1.0], **names)[0]["train"][:2] == ["bad", "good"]
    assert loaded(tmp_path, [[0, 1], [1, 1]], **names)[0]["train"][:2] == [["good"], ["bad", "good"]]
    with pytest.raises(InputError, match="train: label 2, but --label_names has 2 names"):
        loaded(tmp_path, [0, 1, 2], **names)
    with pytest.raises(InputError, match=r"--label_names: replaces numbers, but the labels are 'neg', 'pos'"):
        loaded(tmp_path, ["neg", "pos"], **names)


# Rows without a label


@pytest.mark.parametrize("nothing", [None, "", " ", "-", "NaN"])
def test_rows_without_a_label_are_an_error_or_dropped(tmp_path, capsys, nothing):
    with pytest.raises(InputError, match=r"a.jsonl:3: no label: label is .*pass --drop_unlabeled true"):
        loaded(tmp_path, ["a", "b", nothing])
    labels = loaded(tmp_path, ["a", "b", nothing], drop_unlabeled=True)[0]
    assert labels["train"] == ["a", "b"] * 4
    assert "a.jsonl: dropped 4 of 12 rows that lack their label" in capsys.readouterr().out


@pytest.mark.parametrize("nothing", [None, "", -1, "-1", "nan", "<NA>"])
def test_one_of_several_label_columns_may_lack_its_value(tmp_path, nothing):
    cells = [{"toxic": 1, "insult": 1}, {"toxic": 0, "insult": nothing}, {"toxic": 0, "insult": 1}]
    with pytest.raises(InputError, match=r"a.jsonl:2: no label: toxic is 0, insult is .*pass --drop_unlabeled true"):
        loaded(tmp_path, cells, label_column_name="toxic,insult")
    labels = loaded(tmp_path, cells, label_column_name="toxic,insult", drop_unlabeled=True)[0]
    assert labels["train"] == [["toxic", "insult"], ["insult"]] * 4


@pytest.mark.parametrize("kind", ["empty", "no column", "-1"])
def test_a_test_split_without_labels_is_not_scored(tmp_path, kind):
    label = {"empty": {"label": ""}, "no column": {}, "-1": {"label": "-1"}}[kind]
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": text} | label for text in TEXTS])
    labels, unlabeled, _, names = loaded(tmp_path, ["0", "1"], test_file=test)
    assert names == ["0", "1"]
    assert "test" not in labels
    assert unlabeled["text"][:] == TEXTS


def test_minus_one_is_a_class_unless_it_stands_beside_0_to_n(tmp_path):
    assert loaded(tmp_path, [-1, 0, 1])[3] == ["-1", "0", "1"]
    with pytest.raises(InputError, match=r"train: 3 rows \(first: id 3\) have the label -1 beside the labels 0 to 2"):
        loaded(tmp_path, [0, 1, -1, 2])
    assert loaded(tmp_path, [0, 1, -1, 2], drop_unlabeled=True)[3] == ["0", "1", "2"]
    assert loaded(tmp_path, [0, 1, -1, 2], drop_unlabeled=False)[3] == ["-1", "0", "1", "2"]
    unscored = write_jsonl(tmp_path / "dev.jsonl", [{"text": text, "label": -1} for text in TEXTS])
    with pytest.raises(InputError, match="validation: all 12 rows have the label -1, which usually means no label"):
        loaded(tmp_path, [0, 1, 2], validation_file=unscored, drop_unlabeled=True)


def test_a_hub_test_split_of_minus_one_is_predicted(tiny, tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    splits = {
        split: Dataset.from_dict(
            {"text": TEXTS, "label": [-1 if split == "test" else i % 2 for i in range(12)]}, features
        )
        for split in ("train", "validation", "test")
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    metrics = train.main([
        "--dataset_name", str(tmp_path / "saved"), "--model_name_or_path", tiny, "--output_dir", str(tmp_path / "out"),
        "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true",
    ])  # fmt: skip
    assert not [name for name in metrics if name.startswith("test_")]
    found = read_jsonl(tmp_path / "out" / "predictions_test.jsonl")
    assert [row["text"] for row in found] == TEXTS
    assert {row["predicted"] for row in found} <= {"no", "yes"}
    assert "predictions_test.jsonl" in json.loads((tmp_path / "out" / "run.json").read_text())["files"]


def test_csv_cells_with_lists(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([text, '["a", "b"]'] for text in TEXTS), ["x", "[]"]])
    assert loaded(tmp_path, [], train_file=str(tmp_path / "a.csv"))[0]["train"][-2:] == [["a", "b"], []]


def split_off(tmp_path, rows: list[dict], **arguments) -> tuple[Dataset, Dataset]:
    """Return the training rows, and the validation rows split off from them."""
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    data, *_ = load_labeled(SentimentDataArguments(train_file=file, **arguments))
    return data["train"], data["validation"]


def test_rows_with_one_text_stay_together_when_validation_rows_are_split_off(tmp_path):
    rows = [{"text": f"query {i // 6}", "pair": f"page {i}", "label": "ab"[i % 2]} for i in range(120)]
    train_rows, held_out = split_off(tmp_path, rows, text_pair_column_name="pair")
    assert (len(train_rows), len(held_out)) == (108, 12)
    assert not set(train_rows["text"]) & set(held_out["text"])


def test_unique_texts_are_drawn_for_validation_row_by_row(tmp_path):
    rows = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(60)]
    drawn = carve([row["label"] for row in rows], 6)
    assert split_off(tmp_path, rows)[1]["text"][:] == [f"text {i}" for i in drawn]
