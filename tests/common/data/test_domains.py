"""Test scores by domain: the column, what is carried through encoding, and the scores of each domain."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction

from common.args import LabeledDataArguments, TrainingArguments, check_best_metric, check_together
from common.data.domains import MOST_DOMAINS, by_domain, carry, domain_of
from common.data.rows import load_splits
from common.errors import InputError
from tests.conftest import write_jsonl


def arguments(**values) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", report_to=["none"], **values)


def load(folder, train, test, column="topic", **settings):
    """Return the splits of rows with a text and, if it is not None, a topic."""
    files = {
        f"{split}_file": write_jsonl(
            folder / f"{split}.jsonl", [{"text": t} | ({"topic": d} if d is not None else {}) for t, d in rows]
        )
        for split, rows in (("train", train), ("validation", train), ("test", test))
    }
    args = LabeledDataArguments(**files, domain_column=column, **settings)
    return load_splits(args, {"text": "text"}, lambda row: [], convert=lambda row: {"text": row["text"]})


def test_a_domain_is_a_text_a_number_or_a_list_of_equal_values():
    assert [domain_of(v) for v in (" a ", 3, 3.0, True, ["b", "b"])] == ["a", "3", "3", "True", "b"]
    assert [domain_of(v) for v in (None, " ", 0.5, [], ["a", "b"], {})] == [None] * 6


def test_rows_have_their_domain_and_unseen_ones_are_named(tmp_path, capsys):
    data = load(tmp_path, [("one", "a"), ("two", 7)], [("three", "a"), ("four", "new"), ("five", "new")])
    assert data["train"]["domain"][:] == ["a", "7"]
    assert "test: domains that no training row has: 'new' (2 rows)" in capsys.readouterr().err
    load(tmp_path, [("one", "a")], [("two", "a")])
    assert "all rows have the domain 'a'" in capsys.readouterr().err


def test_a_column_without_domains_is_an_error(tmp_path):
    with pytest.raises(
        InputError, match=r"train\.jsonl:2: no column topic; columns here: text; name yours with --domain"
    ):
        load(tmp_path, [("one", "a"), ("two", None)], [("three", "a")])
    with pytest.raises(InputError, match="no column domian"):
        load(tmp_path, [("one", "a")], [("two", "a")], column="domian")
    with pytest.raises(InputError, match="topic is ' '; needed: the name of a domain"):
        load(tmp_path, [("one", " ")], [("two", "a")])
    many = [(f"text {i}", i) for i in range(MOST_DOMAINS + 1)]
    with pytest.raises(InputError, match=f"201 different values, more than {MOST_DOMAINS}"):
        load(tmp_path, many, many)


def test_a_domain_is_left_out_of_training_and_validation(tmp_path, capsys):
    rows = [("one", "a"), ("two", "b"), ("three", "a")]
    data = load(tmp_path, rows, rows, leave_out="a")
    assert [data[split]["text"][:] for split in ("train", "validation")] == [["two"], ["two"]]
    assert len(data["test"]) == 3
    assert "train: 2 rows of the domain a are left out" in capsys.readouterr().out
    old = write_jsonl(tmp_path / "old.jsonl", [{"text": "four", "topic": "a"}, {"text": "five", "topic": "c"}])
    data = load(tmp_path, rows, rows, leave_out="a", replay_file=old)
    assert data["train"]["text"][:] == ["two", "five"]
    old = write_jsonl(tmp_path / "old.jsonl", [{"text": "four", "topic": "a"}])
    with pytest.raises(
        InputError, match=r"--leave_out a: each row of .*old\.jsonl has this domain; leave --replay_file"
    ):
        load(tmp_path, rows, rows, leave_out="a", replay_file=old)
    with pytest.raises(InputError, match="--leave_out c: no training row has this domain; the domains are a, b"):
        load(tmp_path, rows, rows, leave_out="c")
    with pytest.raises(InputError, match=r"--leave_out a: each row of .*train\.jsonl has this domain"):
        load(tmp_path, rows[:1], rows, leave_out="a")
    with pytest.raises(InputError, match="--leave_out a: the rows have no domains; add --domain_column"):
        load(tmp_path, rows, rows, column=None, leave_out="a")


def test_the_first_window_of_a_row_carries_its_domain():
    rows = {"domain": ["a", "b", "a"]}
    assert carry({"ids": [1, 2, 3]}, rows)["domain"] == ["a", "b", "a"]
    assert carry({"ids": [1, 2, 3, 4, 5]}, rows, [0, 0, 1, 2, 2])["domain"] == ["a", None, "b", "a", None]
    assert carry({"ids": [1]}, {"text": ["x"]}) == {"ids": [1]}


def test_scores_of_domains_are_those_of_their_rows():
    gold, predicted = np.array([0, 1, 1, 0, 1]), [0, 1, 0, 0, 0]
    output = EvalPrediction(predictions=predicted, label_ids=gold)
    rows = Dataset.from_dict({"domain": ["a", "b", None, "b", "a", "b"]})  # the second row has two windows

    def score(select):
        part = select(output)
        right = np.array(part.predictions) == part.label_ids
        return {"accuracy": float(right.mean()), "errors": float((~right).sum())}

    found = by_domain(rows, score, arguments(metric_for_best_model="worst_domain_accuracy"))
    assert found == {
        "accuracy": 0.6, "errors": 2.0, "domain_a_accuracy": 1.0, "domain_a_rows": 2, "domain_b_accuracy": 1 / 3,
        "domain_b_rows": 3, "mean_domain_accuracy": pytest.approx(2 / 3), "worst_domain_accuracy": 1 / 3,
    }  # fmt: skip

    class Lower(TrainingArguments):
        lower_is_better = ("errors",)

    lower = Lower(output_dir="unused", metric_for_best_model="mean_domain_errors")
    assert by_domain(rows, score, lower)["worst_domain_errors"] == 2
    assert lower.greater_is_better is False
    assert by_domain(Dataset.from_dict({"text": ["x"] * 5}), score, lower) == {"accuracy": 0.6, "errors": 2.0}

    def of_both_classes(select):
        part = select(output)
        return score(select) | ({"area": 0.5} if len(set(part.label_ids)) > 1 else {})

    one_class = Dataset.from_dict({"domain": ["a", "b", "b", "b", "a"]})
    found = by_domain(one_class, of_both_classes, arguments(metric_for_best_model="worst_domain_area"))
    assert (found["mean_domain_area"], found["worst_domain_area"]) == (0.5, 0.5)
    one_class = Dataset.from_dict({"domain": ["a", "a", "b", "a", "b"]})
    found = by_domain(one_class, of_both_classes, arguments(metric_for_best_model="area"))
    assert {"domain_a_area", "domain_b_area"} - found.keys() == {"domain_b_area"}


def test_arguments_that_need_domains_are_checked(tmp_path):
    file = write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    plain = LabeledDataArguments(train_file=file)
    for given, named in (
        ({"metric_for_best_model": "worst_domain_f1"}, "--metric_for_best_model worst_domain_f1"),
        ({"domain_temperature": 2.0}, "--domain_temperature 2"),
    ):
        with pytest.raises(
            InputError, match=f"{named}: the rows have no domains; name their column by --domain_column"
        ):
            check_together(arguments(**given), plain, [])
        check_together(arguments(**given), LabeledDataArguments(train_file=file, domain_column="topic"), [])
    check_best_metric(arguments(metric_for_best_model="eval_mean_domain_f1"), ["f1"])
    for name in ("worst_domain_f2", "worst_domain_loss", "worst_f1"):
        with pytest.raises(InputError, match=f"{name}: no such score"):
            check_best_metric(arguments(metric_for_best_model=name), ["f1"])
    for given in ({"domain_temperature": 0.5}, {"domain_temperature": 2, "train_sampling_strategy": "sequential"}):
        with pytest.raises(InputError, match="--domain_temperature"):
            arguments(**given)
