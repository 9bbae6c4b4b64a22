"""Test the rows of each epoch: shares of domains, equal use of all rows, and steps that resume and divide exactly."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from common.data.augment.rows import AugmentedRows
from common.training.draws import EpochRows, draws_of, of_windows, shares
from common.training.order import TrainingBatches


def test_shares_follow_the_temperature():
    assert shares([80, 20], 1, 100) == [80, 20]
    assert shares([900, 100], 2, 400) == [300, 100]
    assert shares([50, 30, 20], 1, 9) == [4, 3, 2]  # 4.5, 2.7 and 1.8: the largest remainders get one more
    assert shares([900, 100, 1], 1e9, 300) == [100, 100, 100]
    assert shares([10_000, 1], 1, 3) == [2, 1]


def test_each_row_of_a_group_comes_equally_often():
    draws = EpochRows([np.arange(7), np.arange(7, 10), np.arange(10, 12)], [3, 6, 0], seed=5)
    epochs = [draws.rows(epoch) for epoch in range(7)]
    assert all(len(rows) == len(draws) == 9 for rows in epochs)
    counts = Counter(np.concatenate(epochs).tolist())
    assert [counts[row] for row in range(12)] == [3] * 7 + [14] * 3 + [0, 0]
    assert all(sorted(Counter((rows[rows >= 7]).tolist()).values()) == [2, 2, 2] for rows in epochs)
    assert np.array_equal(draws.rows(4), EpochRows(draws.groups, draws.counts, seed=5).rows(4))
    assert not np.array_equal(draws.rows(0), EpochRows(draws.groups, draws.counts, seed=6).rows(0))


@pytest.mark.parametrize("rows", [64, 70, 90])
def test_steps_of_drawn_rows_do_not_depend_on_processes_or_accumulation(rows):
    lengths = np.random.default_rng(0).integers(3, 30, size=100)
    draws = EpochRows([np.arange(40), np.arange(40, 100)], [rows - 30, 30], seed=1)

    def steps(accumulation, processes):
        ranks = []
        for rank in range(processes):
            batches = TrainingBatches(lengths, 32, accumulation, processes, rank, 1, True, draws=draws)
            batches.set_epoch(3)
            ranks.append(list(batches))
            assert len(ranks[-1]) == len(batches)
        starts = range(0, len(ranks[0]), accumulation)
        return [sorted(r for of in ranks for batch in of[i : i + accumulation] for r in batch) for i in starts]

    alone = steps(1, 1)
    assert sorted(row for step in alone for row in step) == sorted(draws.rows(3).tolist())
    assert steps(4, 1) == steps(1, 2) == steps(2, 2) == alone


def test_windows_have_the_domain_of_their_row(capsys):
    windows = Dataset.from_dict({"input_ids": [[1]] * 5, "domain": ["a", None, "b", "a", None]})
    assert of_windows(windows, "domain") == ["a", "a", "b", "a", "a"]
    copies = AugmentedRows(windows, [0, 0, 1, 2, 2], windows, None, None, seed=0, copies=1)
    assert of_windows(copies, "domain") == ["a", "a", "b", "a", "a"] * 2
    args = SimpleNamespace(domain_temperature=1e9, keep="none", seed=1, data_seed=None)
    draws = draws_of(windows, args)
    assert draws.counts == [3, 2]
    assert [rows.tolist() for rows in draws.groups] == [[0, 1, 3, 4], [2]]
    assert "rows of an epoch: a 3 of 4, b 2 of 1" in capsys.readouterr().out
    assert draws_of(windows, SimpleNamespace(domain_temperature=None)) is None
