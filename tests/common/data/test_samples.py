"""Test that samples are random, the same each time, nested, and in the shares of the classes."""

from collections import Counter

import numpy as np
import pytest

from common.data.samples import carve, rarest, sample

SORTED = ["neg"] * 500 + ["pos"] * 300 + ["rare"] * 3


def counts(rows: np.ndarray, classes: list) -> Counter:
    return Counter(classes[i] for i in rows)


def test_a_sample_of_a_sorted_file_has_the_shares_of_its_classes():
    drawn = counts(sample(SORTED, 200), SORTED)
    assert drawn.total() == 200
    assert abs(drawn["neg"] - 125) <= 1
    assert abs(drawn["pos"] - 75) <= 1
    assert drawn["rare"] == 1


@pytest.mark.parametrize("classes", [SORTED, [None] * 803])
def test_samples_are_sorted_nested_and_not_the_first_rows(classes):
    small, large = sample(classes, 50), sample(classes, 400)
    assert sorted(set(small.tolist())) == small.tolist()
    assert set(small.tolist()) < set(large.tolist())
    assert small.max() > 400
    assert sample(classes, 10_000).tolist() == list(range(803))


def test_each_class_has_a_row_when_there_is_room():
    classes = [f"c{i % 70}" for i in range(700)] + ["big"] * 5000
    assert len(counts(sample(classes, 71), classes)) == 71
    assert len(sample(classes, 40)) == 40


@pytest.mark.parametrize("count", [1, 80, 400, 802])
def test_carved_rows_leave_a_row_of_each_class_in_train(count):
    carved = carve(SORTED, count)
    assert len(set(carved.tolist())) == count
    left = counts(np.setdiff1d(np.arange(803), carved), SORTED)
    assert set(left) == set(SORTED) or count > 800
    if count == 80:
        assert abs(counts(carved, SORTED)["neg"] - 50) <= 1


def test_single_rows_of_a_class_are_carved_last():
    assert carve(["a", "b", "c"], 1).size == 1  # no other rows are left
    assert carve(["a", "b", "c", "c"], 1).tolist()[0] in (2, 3)


def test_rows_of_several_classes_count_for_the_rarest():
    assert rarest([["a", "b"], ["a"], [], ["a"]]) == ["b", "a", None, "a"]
