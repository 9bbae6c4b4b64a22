"""Promise: seed and epoch alone decide which rows an optimizer step takes. Evaluation sorts rows by length."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow.compute as pc
import transformers
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler

from common.data.workers import spare_workers

#: grouped by length, a step is cut from the rows of so many, sorted (transformers' LengthGroupedSampler: 50)
STEPS_SORTED_TOGETHER = 50


def row_lengths(dataset: Dataset, name: str = "input_ids") -> np.ndarray:
    """Length in sub-tokens of each row of an encoded data set, read from Arrow column `name`. Shape (rows,)."""
    column = dataset.select_columns(name).with_format("arrow")[:][name]
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
        if last is not None and steps and self._are_evened(len(last)):
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
        if rest and full and self._are_evened(rest):
            rest = self.step_rows + rest - (self.step_rows + rest) // 2
        return (full if rest else full - 1) * self.accumulation + self._last_batches(rest or self.step_rows)

    def _are_evened(self, rest: int) -> bool:
        """Whether the last two steps share their rows, as the last alone would have few: `rest`.

        Not where the last but one, which has as many batches as all before it, would then have more batches than rows,
        as it can with batches of one row: a row would count several times.
        """
        least = (self.step_rows + rest) // 2
        return rest < self.step_rows / 2 and least >= self.accumulation * self.processes

    def _last_batches(self, rows: int) -> int:
        return -(-rows * self.accumulation // self.step_rows)


class TokenBudgetBatches(BatchRebalanceSampler):
    """Batch sampler of training with as many rows a batch as a budget of sub-tokens allows, padding included.

    As max-tokens of fairseq (Ott et al. 2019, https://aclanthology.org/N19-4009): rows times the longest row. An
    optimizer step takes `step_tokens` of them: the budget of a device, times processes, times accumulation. Which rows
    make up a step depends on `step_tokens`, `seed` and epoch only, so it does not matter how a step is cut into
    batches. `lengths` has shape (rows,): of a pair of texts the longer one's.

    With rows of no more than the budget of a device in length, no batch exceeds it but by part of a row, where a step's
    rows are no multiple of its batches.

    Rows are sorted by length rounded up to `multiple`, to which batches are padded, those of one such length in random
    order. So rows meet other neighbours in each epoch, and yet each epoch has the same number of steps, by which a
    resumed run finds its place. The number of rows is a multiple of 8 where 8 fit. Every row is taken once an epoch.

    Subclasses BatchRebalanceSampler for the reason that `TrainingBatches` does.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        step_tokens: int,
        accumulation: int,
        processes: int,
        rank: int,
        seed: int,
        multiple: int = 8,
    ):
        self.lengths, self.seed = np.asarray(lengths), seed
        self.accumulation, self.processes, self.rank = accumulation, processes, rank
        self.padded = -(-self.lengths // multiple) * multiple
        self.epoch = 0
        self.sizes = self._sizes(step_tokens, accumulation * processes)

    def _sizes(self, step_tokens: int, parts: int) -> list[int]:
        """Rows of each step, from the step with the longest rows on: the same in each epoch."""
        longest_first = np.sort(self.padded)[::-1]
        sizes, start = [], 0
        while start < len(longest_first):
            fit = max(1, step_tokens // int(longest_first[start]))
            even = fit - fit % 8
            sizes.append(min(even if even >= parts else fit, len(longest_first) - start))
            start += sizes[-1]
        # a small last step would be noise
        if len(sizes) > 1 and sizes[-1] < sizes[-2] / 2 and sizes[-1] + sizes[-2] >= 2 * parts:
            both = sizes.pop() + sizes.pop()
            sizes += [both - both // 2, both // 2]
        return sizes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def steps(self) -> list[np.ndarray]:
        """Row indices of each optimizer step of this epoch, each sorted from the longest row to the shortest."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        order = order[np.argsort(-self.padded[order], kind="stable")]
        steps = np.split(order, np.cumsum(self.sizes)[:-1])
        steps = [rows[np.argsort(-self.lengths[rows], kind="stable")] for rows in steps]
        random.shuffle(steps)
        # what has fewer rows than a step has batches comes last, as the Trainer takes it for a whole step only there
        return sorted(steps, key=lambda rows: self._batches(len(rows)) < self.accumulation)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            batches = self._batches(len(rows))
            for batch in range(batches):
                yield share(rows, batches * self.processes)[batch * self.processes + self.rank]

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        return sum(map(self._batches, self.sizes))

    def _batches(self, rows: int) -> int:
        return min(self.accumulation, -(-rows // self.processes))


class StepBatches(BatchRebalanceSampler):
    """Batch sampler of a run whose rows are numbered from 0: each step takes those that come next.

    A step takes `step_rows` rows. With `ramp`, a pair of a number of rows and of steps, the first step takes as many
    and each of these steps some more, until it is `step_rows`: a batch that grows costs less where the gradient is
    large (Smith et al. 2018, https://arxiv.org/abs/1711.00489). Which rows a step takes does not depend on how it is
    cut into batches. A process takes every row whose number is its rank, modulo processes.

    Subclasses BatchRebalanceSampler for the reason that `TrainingBatches` does.
    """

    def __init__(
        self, steps: int, step_rows: int, ramp: tuple[int, int] | None, accumulation: int, processes: int, rank: int
    ):
        self.steps, self.accumulation, self.processes, self.rank = steps, accumulation, processes, rank
        self.starts = step_starts(steps, step_rows, ramp, processes)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: there is one epoch, which is the run."""

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in pairwise(self.starts.tolist()):
            rows = np.arange(start + self.rank, end, self.processes)
            yield from (part.tolist() for part in np.array_split(rows, self.accumulation))

    def __len__(self) -> int:
        return self.steps * self.accumulation


def step_starts(steps: int, step_rows: int, ramp: tuple[int, int] | None, processes: int) -> np.ndarray:
    """The first row of each step of `StepBatches`, and behind them the number of all rows. Shape (steps + 1,).

    The rows of a step are a multiple of `processes`.
    """
    sizes = np.full(steps, step_rows)
    if ramp is not None:
        first, growing = ramp
        grown = first + (step_rows - first) * np.arange(min(steps, growing)) / growing
        sizes[: len(grown)] = np.floor(grown / processes).astype(int) * processes
    return np.concatenate([[0], np.cumsum(sizes)])


class Repeated(TorchDataset):
    """The rows of a data set pass after pass, in another order in each, under numbers that go on: for `StepBatches`.

    Column `row` becomes that number, so that what is drawn by it differs in each pass.
    """

    def __init__(self, rows: Dataset, seed: int):
        self.of_one_pass, self.seed, self.rows = rows, seed, 0  # of the run: the trainer sets it
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        return [self.of_one_pass[self.index(number)] | {"row": number} for number in numbers]

    def index(self, number: int) -> int:
        """Which row of the data set it is that has `number`."""
        done, place = divmod(number, len(self.of_one_pass))
        if done != self._pass:
            self._pass = done
            self._order = np.random.default_rng([self.seed, done]).permutation(len(self.of_one_pass))
        return int(self._order[place])


class LengthSortedSampler(Sampler):
    """Evaluation order: longest rows first, so that batches hold little padding and memory peaks at once."""

    def __init__(self, dataset: Dataset):
        self.order = np.argsort(-row_lengths(dataset), kind="stable")

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())

    def __len__(self) -> int:
        return len(self.order)


def row_parts(batch: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """`batch` in parts of whole rows, each of which begins before `most` sub-tokens of the last part's begin are over.

    Counted are those that `attention_mask`, of shape (rows, length), shows. A batch that has no such mask, or more than
    values of rows, is one part.
    """
    mask = batch.get("attention_mask")
    if (
        mask is None
        or mask.dim() != 2
        or not all(isinstance(x, Tensor) and len(x) == len(mask) for x in batch.values())
    ):
        return [dict(batch)]
    sizes = mask.sum(1)
    rows = ((sizes.cumsum(0) - sizes) // most).unique_consecutive(return_counts=True)[1].tolist()
    return [dict(zip(batch, part, strict=True)) for part in zip(*(x.split(rows) for x in batch.values()), strict=True)]


def in_dataset_order(batches: list[np.ndarray], order: np.ndarray) -> list[np.ndarray]:
    """Rows of `batches`, which came in `order` (as from `LengthSortedSampler`), as one list in data set order."""
    rows: list = [None] * len(order)
    for index, row in zip(order, (row for batch in batches for row in batch), strict=True):
        rows[index] = row
    return rows


# In the trainer


@runtime_checkable
class EpochSeeded(Protocol):
    """A collator that draws at random: what it draws must follow from its seed, the epoch and the row alone.

    The trainer names the epoch before its first batch. Drawn from the global random state, the masks of a resumed run
    would be others than those of the run that was not stopped.
    """

    def set_epoch(self, epoch: int) -> None: ...


class NameEpoch(TrainerCallback):
    """Names each epoch to the batch sampler and the collator before its first batch.

    The training loop names it through one wrapper of the sampler; a resumed epoch on several processes has two.
    """

    def __init__(self, trainer: "SeededOrder"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        for part in (self.trainer.train_batches, self.trainer.data_collator):
            if isinstance(part, EpochSeeded):
                part.set_epoch(int(state.epoch))


class SeededOrder(transformers.Trainer):
    """Takes training rows in an order of its own, under `--train_sampling_strategy random` and `group_by_length`."""

    #: rows of an optimizer step, and the sampler that cuts them into batches; None for a sampler of transformers
    step_rows: int
    train_batches: Sampler | None = None

    def cut(self) -> dict[str, int]:
        """Return the arguments of a batch sampler that say how a step is cut, and its seed."""
        args = self.args
        return {
            "accumulation": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "rank": args.process_index,
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }

    def make_batches(self, dataset: Dataset) -> Sampler:
        """Return the batch sampler of a training set."""
        by_length = self.args.train_sampling_strategy == "group_by_length"
        return TrainingBatches(row_lengths(dataset), self.step_rows, by_length=by_length, **self.cut())

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        # upstream: `get_train_dataloader` calls it with the data set, and hands on a BatchRebalanceSampler as it is
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, Dataset) and self.args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        self.train_batches = self.make_batches(dataset)
        return self.train_batches

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training set. Its workers ignore signals to the process group."""
        return spare_workers(super().get_train_dataloader())
