"""Test the choice of rows: which are left out, what is kept, and that memory does not grow with the pool."""

import numpy as np
import pytest

from common.tools.annotate.pool import Guess, Highest, Seen, Selection, digest


class Table:
    """Guesses that a row names itself."""

    def text(self, row):
        return row["text"]

    def has_label(self, row):
        return "gold" in row

    def guesses(self, rows, gradients):
        for row in rows:
            vector = np.array(row.get("vector", [0.0, 1.0]))
            gradient = (vector, np.ones(1)) if gradients else None
            yield Guess(row["text"], row.get("margin", 0.5), row.get("entropy", 0.5), vector, gradient)


def chosen(rows, strategy, count, labeled=(), **more):
    seen = Seen()
    for text in labeled:
        seen.add(text)
    selection = Selection(strategy, count, **more)
    found = selection.choose(rows, Table(), seen)
    return [one.row["text"] for one in found], selection.counts


ROWS = [
    {"text": "a", "margin": 0.3, "entropy": 0.9},
    {"text": "b", "margin": 0.1, "entropy": 0.2},
    {"text": "c", "margin": 0.2, "entropy": 0.8},
    {"text": "d", "margin": 0.1, "entropy": 0.9},
]


def test_the_most_uncertain_rows_come_first_and_equal_ones_in_the_order_of_the_file():
    assert chosen(ROWS, "margin", 3)[0] == ["b", "d", "c"]
    assert chosen(ROWS, "entropy", 3, buffer_rows=1)[0] == ["a", "d", "c"]
    assert chosen(ROWS, "margin", 9)[0] == ["b", "d", "c", "a"]
    assert chosen([], "badge", 9)[0] == chosen([], "diverse", 9)[0] == []


def test_repeated_labelled_and_equal_rows_are_left_out_and_counted():
    rows = [*ROWS, {"text": " b\n"}, {"text": "e", "gold": 1}, {"text": "cafe\u0301"}, {"text": "caf\u00e9"}]
    found, counts = chosen(rows, "margin", 9, labeled=["d ", "x"])
    assert found == ["b", "c", "a", "cafe\u0301"]
    assert (counts["rows"], counts["fresh"]) == (8, 4)
    assert (counts["have a label"], counts["equal a labelled row"], counts["repeat another row"]) == (1, 1, 2)
    assert "e" in chosen(rows, "margin", 9, relabel=True)[0]


def test_random_rows_do_not_depend_on_the_order_of_the_file():
    rows = [{"text": str(i)} for i in range(1000)]
    found = chosen(rows, "random", 100, seed=3)[0]
    assert chosen(rows[::-1], "random", 100, seed=3)[0] == found
    assert chosen(rows, "random", 100, seed=4)[0] != found
    assert np.mean([int(text) for text in found]) == pytest.approx(500, abs=100)


def test_badge_and_diverse_choose_among_candidates():
    rows = [{"text": str(i), "margin": i / 100, "vector": [float(i), 1.0]} for i in range(100)]
    found, counts = chosen(rows, "badge", 5, candidates=10, seed=1)
    assert found[0] == "9"  # the longest vector of the ten rows with the smallest margin
    assert set(map(int, found)) <= set(range(10))
    assert (counts["candidates"], counts["fresh"]) == (10, 100)
    found, counts = chosen(rows, "diverse", 5, candidates=20)
    drawn = sorted(range(100), key=lambda i: -digest(str(i), 0))[:20]
    assert set(map(int, found)) <= set(drawn)
    assert counts["candidates"] == 20
    assert len(chosen(rows, "badge", 30, candidates=10)[0]) == 30


def test_gradients_are_kept_within_a_bound(monkeypatch):
    monkeypatch.setattr("common.tools.annotate.pool.MOST_BYTES", 200)  # a row has 2 + 1 numbers of 8 bytes
    rows = [{"text": str(i), "margin": i / 100, "vector": [float(i), 1.0]} for i in range(100)]
    assert chosen(rows, "badge", 5)[1]["candidates"] == 8


def test_only_the_highest_items_are_held():
    highest = Highest(3)
    for i in range(10_000):
        highest.offer(i % 7, i)
    assert len(highest._heap) == 3
    assert highest.items() == [6, 13, 20]
