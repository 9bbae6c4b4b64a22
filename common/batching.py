"""Which rows make a batch: in training shuffled and seeded, in evaluation sorted by length and put back in order."""

from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler

#: grouped by length, a step is cut from the rows of so many, sorted (transformers' LengthGroupedSampler: 50)
STEPS_SORTED_TOGETHER = 50


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Length in sub-tokens of each row of an encoded data set, read from the Arrow column. Shape (rows,)."""
    column = dataset.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    return pc.list_value_length(column).to_numpy()


def share(rows: np.ndarray, parts: int) -> list[list[int]]:
    """Cut `rows` into `parts` runs whose sizes differ by one at most.

    Where there are fewer rows than parts the last row is repeated, since every process must take every step.
    """
    if len(rows) < parts:
        rows = np.concatenate([rows, np.repeat(rows[-1:], parts - len(rows))])
    return [part.tolist() for part in np.array_split(rows, parts)]


class TrainingBatches(BatchRebalanceSampler):
    """Batch sampler of training, in an order that `seed` and epoch alone decide.

    An optimizer step takes `step_rows` rows: rows a device takes at a time, times processes, times accumulation. Which
    rows make up a step depends on `step_rows`, `seed` and epoch only, so one process of 32, two of 16, and 8 rows
    accumulated 4 times make the same steps. Every row is taken once an epoch. A last step of less than half the size
    would be noise; it shares its rows with the step before it.

    `by_length` makes steps of rows of like length, which hold little padding, but are a less mixed sample; else the
    rows of a step are drawn at random. Within a step rows are sorted by length either way, so that the batches that
    are accumulated are of like length.

    Subclasses transformers' BatchRebalanceSampler because the Trainer hands a sampler of that type to the data loader
    as it is, instead of sharding it once more; nothing else is inherited.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        step_rows: int,
        accumulation: int,
        processes: int,
        rank: int,
        seed: int,
        by_length: bool,
    ):
        self.lengths, self.step_rows, self.seed, self.by_length = np.asarray(lengths), step_rows, seed, by_length
        self.accumulation, self.processes, self.rank = accumulation, processes, rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def steps(self) -> list[np.ndarray]:
        """Row indices of each optimizer step of this epoch, each sorted from the longest row to the shortest."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        # at least four groups, so that small data sets too meet other neighbours in each epoch
        together = min(STEPS_SORTED_TOGETHER, len(order) // (4 * self.step_rows)) if self.by_length else 1
        group = self.step_rows * max(1, together)
        steps: list[np.ndarray] = []
        for start in range(0, len(order), group):
            rows = order[start : start + group]
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            steps += [rows[i : i + self.step_rows] for i in range(0, len(rows), self.step_rows)]
        last = steps.pop() if len(steps[-1]) < self.step_rows else None
        random.shuffle(steps)
        if last is not None and steps and len(last) < self.step_rows / 2:
            both = np.concatenate([steps.pop(), last])
            both = both[np.argsort(-self.lengths[both], kind="stable")]
            steps.append(both[: len(both) // 2])
            last = both[len(both) // 2 :]
        return steps if last is None else [*steps, last]

    def __iter__(self) -> Iterator[list[int]]:
        steps = self.steps()
        for i, rows in enumerate(steps):
            batches = self.accumulation if i + 1 < len(steps) else self._last_batches(len(rows))
            for batch in range(batches):
                yield share(rows, batches * self.processes)[batch * self.processes + self.rank]

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        full, rest = divmod(len(self.lengths), self.step_rows)
        if rest and full and rest < self.step_rows / 2:
            rest = self.step_rows + rest - (self.step_rows + rest) // 2
        return (full if rest else full - 1) * self.accumulation + self._last_batches(rest or self.step_rows)

    def _last_batches(self, rows: int) -> int:
        return -(-rows * self.accumulation // self.step_rows)


class LengthSortedSampler(Sampler):
    """Evaluation order: longest rows first, so that batches hold little padding and memory peaks at once."""

    def __init__(self, dataset: Dataset):
        self.order = np.argsort(-row_lengths(dataset), kind="stable")

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())

    def __len__(self) -> int:
        return len(self.order)


def in_dataset_order(batches: list[np.ndarray], order: np.ndarray) -> list[np.ndarray]:
    """Rows of `batches`, which came in `order` (as from `LengthSortedSampler`), as one list in data set order."""
    rows: list = [None] * len(order)
    for index, row in zip(order, (row for batch in batches for row in batch), strict=True):
        rows[index] = row
    return rows
