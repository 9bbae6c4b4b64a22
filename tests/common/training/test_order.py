"""Test batches: the same steps on any number of processes, every row once, similar lengths, restored order."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from common.args import TrainingArguments
from common.training.order import (
    LengthSortedSampler,
    SeededOrder,
    SetEpoch,
    TokenBudgetBatches,
    TrainingBatches,
    in_dataset_order,
    row_lengths,
)

LENGTHS = np.random.default_rng(0).integers(3, 90, size=500)


def sampler(lengths=LENGTHS, rows=32, accumulation=1, processes=1, rank=0, seed=1, by_length=True, sequential=False):
    return TrainingBatches(lengths, rows, accumulation, processes, rank, seed, by_length, sequential)


def steps_of(lengths, accumulation, processes, epoch, rows=32, by_length=True) -> list[list[int]]:
    """Return the sorted row numbers of each optimizer step, over the batches of all processes."""
    ranks = []
    for rank in range(processes):
        batches = sampler(lengths, rows, accumulation, processes, rank, by_length=by_length)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    assert len({len(batches) for batches in ranks}) == 1  # a process with fewer batches would block the others
    steps = []
    for i in range(0, len(ranks[0]), accumulation):
        steps.append(sorted(row for batches in ranks for batch in batches[i : i + accumulation] for row in batch))
    return steps


@pytest.mark.parametrize("rows", [500, 513, 512, 520, 33, 31, 70])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("by_length", [True, False])
def test_steps_do_not_depend_on_processes_or_accumulation(rows, epoch, by_length):
    lengths = np.resize(LENGTHS, rows)
    alone = steps_of(lengths, 1, 1, epoch, by_length=by_length)
    assert sorted(row for step in alone for row in step) == list(range(rows))  # every row once
    assert len(alone) == -(-rows // 32)
    for accumulation, processes in [(4, 1), (1, 2), (2, 2), (1, 4)]:
        assert steps_of(lengths, accumulation, processes, epoch, by_length=by_length) == alone


def test_no_batch_is_larger_than_asked_for():
    for accumulation, processes in [(1, 1), (4, 1), (2, 2)]:
        for rank in range(processes):
            assert max(map(len, sampler(LENGTHS, 32, accumulation, processes, rank))) == 32 // accumulation // processes


def test_a_small_rest_is_shared_with_the_step_before_it():
    steps = steps_of(np.resize(LENGTHS, 65), 1, 1, 0)
    assert sorted(map(len, steps)) == [16, 17, 32]


def divisions(size: int) -> list[tuple[int, int]]:
    """Return each (accumulation, processes) whose product divides `size`."""
    return [(a, p) for a in range(1, size + 1) for p in range(1, size + 1) if size % (a * p) == 0]


@pytest.mark.parametrize("by_length", [True, False])
def test_steps_depend_on_their_size_alone_even_with_one_row_a_device(by_length):
    for step_rows in (4, 6, 12):
        for rows in (1, 2, 3, 5, 7, 9, 13, 25):
            lengths = np.resize(LENGTHS, rows)
            alone = steps_of(lengths, 1, 1, 1, step_rows, by_length)
            assert sorted(row for step in alone for row in step) == list(range(rows))
            for accumulation, processes in divisions(step_rows):
                assert steps_of(lengths, accumulation, processes, 1, step_rows, by_length) == alone


def test_order_depends_on_seed_and_epoch_alone():
    first, again, other_seed = list(sampler()), list(sampler()), list(sampler(seed=2))
    next_epoch = sampler()
    next_epoch.set_epoch(1)
    assert first == again
    assert first != other_seed
    assert first != list(next_epoch)


def test_sequential_steps_are_the_rows_as_they_are_once_on_any_number_of_processes():
    for rows, sizes in ((7, [2, 2, 2, 1]), (9, [2, 2, 2, 2, 1]), (12, [2] * 6)):
        for processes in (1, 2):
            ranks = [list(sampler(LENGTHS[:rows], 2, 1, processes, i, 1, False, True)) for i in range(processes)]
            steps = [sorted(row for batch in step for row in batch) for step in zip(*ranks, strict=True)]
            assert [len(step) for step in steps] == sizes
            assert [row for step in steps for row in step] == list(range(rows))


def test_grouping_by_length_saves_padding():
    def padded(batches) -> int:
        return sum(len(batch) * LENGTHS[batch].max() for batch in batches)

    assert padded(sampler()) < 0.75 * padded(sampler(by_length=False))


def test_steps_at_random_are_a_fair_sample():
    """Test that the mean lengths of random steps spread like independent draws, sd / sqrt(32)."""
    means = []
    for seed in range(20):
        means += [LENGTHS[batch].mean() for batch in sampler(seed=seed, by_length=False) if len(batch) == 32]
    assert np.std(means) == pytest.approx(LENGTHS.std() / np.sqrt(32), rel=0.1)


def test_small_data_meets_other_neighbours_in_each_epoch():
    batches = sampler(np.arange(64), rows=8)
    compositions = []
    for epoch in range(5):
        batches.set_epoch(epoch)
        compositions.append({frozenset(batch) for batch in batches})
    assert not set.intersection(*compositions)


def test_evaluation_order_is_sorted_and_undone():
    rows = [[1] * n for n in (3, 9, 5, 9, 1)]
    dataset = Dataset.from_dict({"input_ids": rows})
    assert row_lengths(dataset).tolist() == [3, 9, 5, 9, 1]
    order = LengthSortedSampler(dataset).order
    assert order.tolist() == [1, 3, 2, 0, 4]
    batches = [np.array([[i] for i in order[:2]]), np.array([[i] for i in order[2:]])]
    assert [row.tolist() for row in in_dataset_order(batches, order)] == [[0], [1], [2], [3], [4]]


def test_lengths_of_a_selected_data_set_follow_the_selection():
    dataset = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 9, 5)]}).select([2, 0])
    assert row_lengths(dataset).tolist() == [5, 3]


def budget_steps(lengths, tokens, accumulation, processes, epoch) -> list[list[int]]:
    """Return the sorted row numbers of each step under a budget of `tokens`, over all processes."""
    ranks = []
    for rank in range(processes):
        batches = TokenBudgetBatches(lengths, tokens, accumulation, processes, rank, seed=1)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
        limit = tokens / accumulation / processes
        for batch in filter(None, ranks[-1]):
            padded = -(-lengths[batch].max() // 8) * 8
            assert (len(batch) - 1) * padded <= limit or len(batch) * padded <= limit
    assert len({len(batches) for batches in ranks}) == 1
    return [
        sorted(row for batches in ranks for batch in batches[i : i + accumulation] for row in batch)
        for i in range(0, len(ranks[0]), accumulation)
    ]


@pytest.mark.parametrize("rows", [500, 513, 70, 9, 1])
@pytest.mark.parametrize("tokens", [96, 1536, 2048, 100_000])
def test_budget_steps_do_not_depend_on_processes_or_accumulation(rows, tokens):
    lengths = np.resize(LENGTHS, rows)
    for epoch in (0, 3):
        alone = budget_steps(lengths, tokens, 1, 1, epoch)
        assert sorted(row for step in alone for row in step) == list(range(rows))
        assert len(alone) == len(TokenBudgetBatches(lengths, tokens, 1, 1, 0, seed=1))  # the same in each epoch
        for accumulation, processes in [(4, 1), (1, 2), (2, 2), (1, 12), (12, 1), (3, 4)]:
            assert budget_steps(lengths, tokens, accumulation, processes, epoch) == alone


def test_budget_batches_hold_little_padding_and_other_neighbours_each_epoch():
    batches = TokenBudgetBatches(LENGTHS, 2048, 1, 1, 0, seed=1)
    first = {tuple(sorted(batch)) for batch in batches}
    size = sum(len(batch) * LENGTHS[list(batch)].max() for batch in first)
    assert LENGTHS.sum() / size > 0.85
    batches.set_epoch(1)
    assert len(first & {tuple(sorted(batch)) for batch in batches}) < len(first) / 4


class Drawing:
    """A collator that draws by epoch and row; labels follow the rows."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        draws = [np.random.default_rng([self.epoch, len(row["input_ids"])]).integers(1000) for row in rows]
        return {"draws": torch.tensor(draws), "labels": torch.tensor([[len(row["input_ids"])] * 2 for row in rows])}


class Loaded(SeededOrder):
    """The part of a trainer that loads batches."""

    losses, by_task = {"labels": None}, False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen.append((int(self.state.epoch), inputs["draws"].tolist(), inputs["labels"].tolist()))
        return sum(value.sum() for value in model.parameters())


@pytest.mark.parametrize(
    ("workers", "persistent"),
    [
        (0, False),
        (1, True),
        pytest.param(2, False, marks=pytest.mark.soak),
        pytest.param(2, True, marks=pytest.mark.soak),
    ],
)
def test_draws_follow_the_epoch_in_every_worker_and_a_part_without_a_row_has_no_labels(tmp_path, workers, persistent):
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in range(2, 11)]})
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=3,
        dataloader_num_workers=workers, dataloader_persistent_workers=persistent, save_strategy="no",
        eval_strategy="no", remove_unused_columns=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Loaded(torch.nn.Linear(1, 1), args, train_dataset=rows, data_collator=Drawing())
    trainer.step_rows, trainer.seen = 4, []
    trainer.args.train_sampling_strategy = "random"
    trainer.add_callback(SetEpoch(trainer))
    trainer.train()
    assert [epoch for epoch, _, _ in trainer.seen] == [e for e in range(3) for _ in range(11)]
    real = [seen for seen in trainer.seen if seen[2] != [[-100, -100]]]
    assert len(real) == 27  # two steps of 2 and 3 rows have 3 and 4 batches
    for epoch, draws, labels in real:
        assert draws == [np.random.default_rng([epoch, labels[0][0]]).integers(1000)]
