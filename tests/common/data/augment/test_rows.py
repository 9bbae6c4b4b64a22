"""Test the training set with augmented copies: they follow from seed, epoch and row, and windows take turns."""

import numpy as np
from datasets import Dataset

from common.data.augment.rows import AugmentedRows
from common.training.order import TrainingBatches, row_lengths

SIZES = (1, 3, 2, 1)


def made(copies: int = 2, seed: int = 7, more: int = 0) -> AugmentedRows:
    """Return rows of numbers whose copies are ten random numbers; windows have a number of the copy each."""
    row_of = np.repeat(np.arange(len(SIZES)), SIZES)
    windows = Dataset.from_dict({"input_ids": [[number] * (1 + number % 3) for number in range(len(row_of))]})
    rows = Dataset.from_dict({"row": list(range(len(SIZES)))})

    def augment(row: dict, rng: np.random.Generator) -> dict:
        return row | {
            "ids": [100 * (1 + row["row"]) + i for i in range(SIZES[row["row"]] + more)],
            "drawn": rng.random(),
        }

    def encode(row: dict) -> dict[str, list]:
        return {"input_ids": [[number, row["drawn"]] for number in row["ids"]]}

    return AugmentedRows(windows, row_of, rows, augment, encode, seed, copies)


def all_rows(rows: AugmentedRows) -> list[list]:
    return [row["input_ids"] for row in rows.__getitems__(list(range(len(rows))))]


def test_copies_follow_from_seed_epoch_row_and_copy_alone():
    rows = made()
    first = all_rows(rows)
    assert len(rows) == len(first) == 3 * sum(SIZES)
    assert first[: sum(SIZES)] == rows.windows["input_ids"][:]
    again = made()
    assert [again[number]["input_ids"] for number in reversed(range(len(again)))] == first[::-1]
    copies = first[sum(SIZES) :]
    assert [ids[0] for ids in copies] == 2 * [100, 200, 201, 202, 300, 301, 400]
    assert len({ids[1] for ids in copies}) == 2 * len(SIZES)  # a draw for each copy of a row
    for other in (made(seed=8), rows):
        other.set_epoch(0 if other is not rows else 1)
        assert not {ids[1] for ids in all_rows(other)[sum(SIZES) :]} & {ids[1] for ids in copies}


def test_windows_of_a_longer_text_take_turns_and_those_of_a_shorter_one_repeat():
    longer = made(copies=1, more=1)
    seen = set()
    for epoch in range(5):
        longer.set_epoch(epoch)
        windows = [ids[0] for ids in all_rows(longer)[sum(SIZES) :]]
        assert len(set(windows)) == len(windows)
        seen |= set(windows)
    assert seen >= {100, 101, 200, 201, 202, 203}
    shorter = made(copies=1, more=-1)
    shorter.encode = lambda row: {"input_ids": [[number] for number in row["ids"] or [0]]}
    assert [ids[0] for ids in all_rows(shorter)[sum(SIZES) :]] == [0, 200, 201, 200, 300, 300, 0]


def test_each_epoch_takes_every_row_and_every_copy_once():
    rows = made()
    lengths = np.tile(row_lengths(rows.windows), 1 + rows.copies)
    batches = TrainingBatches(lengths, 4, accumulation=2, processes=1, rank=0, seed=1, by_length=True)
    assert sorted(number for batch in batches for number in batch) == list(range(len(rows)))


def test_models_read_the_texts_once():
    calls = []
    rows = made()
    rows.prepare = lambda: calls.append(1)
    for epoch in range(3):
        rows.set_epoch(epoch)
    assert calls == [1]
