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

#: steps whose rows are sorted together by length (50 in LengthGroupedSampler of transformers)
STEPS_SORTED_TOGETHER = 50


def row_lengths(dataset: Dataset, name: str = "input_ids") -> np.ndarray:
    """Return the length of each row in tokens, from Arrow column `name` of an encoded data set; shape (rows,)."""
    column = dataset.select_columns(name).with_format("arrow")[:][name]
    return pc.list_value_length(column).to_numpy()


def share(rows: np.ndarray, parts: int) -> list[list[int]]:
    """Cut `rows` into `parts` contiguous parts whose sizes differ by at most one.

    With fewer rows than parts the last row is repeated, because every process must take every step.
    """
    if len(rows) < parts:
        rows = np.concatenate([rows, np.repeat(rows[-1:], parts - len(rows))])
    return [part.tolist() for part in np.array_split(rows, parts)]


class TrainingBatches(BatchRebalanceSampler):
    """Sample training batches in an order that follows from `seed` and epoch.

    An optimizer step takes `step_rows` rows: the batch of a device, times processes, times gradient accumulation. The
    rows of a step depend on `step_rows`, `seed` and epoch only. One process with batch 32, two with batch 16, and batch
    8 accumulated 4 times therefore make the same steps. Each epoch takes every row once. A last step of less than half
    the size would be noisy; it shares rows with the step before.

    With `by_length` the rows of a step have similar lengths: less padding, but a less mixed sample. Otherwise they are
    random. The rows of a step are always sorted by length, because batches of similar lengths hold little padding.

    The base class is BatchRebalanceSampler, because the Trainer passes a sampler of this type to the data loader
    without sharding it again. Nothing else is inherited.
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
        """Return the row numbers of each optimizer step of this epoch, longest row first."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        # at least four groups, because the rows of a small data set must mix too
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
        """Return the number of batches of one process in an epoch."""
        full, rest = divmod(len(self.lengths), self.step_rows)
        if rest and full and self._are_evened(rest):
            rest = self.step_rows + rest - (self.step_rows + rest) // 2
        return (full if rest else full - 1) * self.accumulation + self._last_batches(rest or self.step_rows)

    def _are_evened(self, rest: int) -> bool:
        """Return whether the last two steps share their rows, because the last step has only `rest` rows.

        They do not if the second last step, which has the full number of batches, would have more batches than rows: a
        row would then count several times.
        """
        least = (self.step_rows + rest) // 2
        return rest < self.step_rows / 2 and least >= self.accumulation * self.processes

    def _last_batches(self, rows: int) -> int:
        return -(-rows * self.accumulation // self.step_rows)


class TokenBudgetBatches(BatchRebalanceSampler):
    """Sample training batches by a budget of tokens, padding included.

    The tokens of a batch are rows times the longest row, as for `max-tokens` of fairseq (Ott et al. 2019,
    https://aclanthology.org/N19-4009). An optimizer step takes `step_tokens` tokens: the budget of a device, times
    processes, times gradient accumulation. The rows of a step depend on `step_tokens`, `seed` and epoch only.

    A batch may exceed the budget by part of a row, if the rows of its step are no multiple of the batches.

    Rows are sorted by length rounded up to `multiple`, the multiple of padding; rows of equal rounded length have a
    random order. Steps then mix rows in each epoch, and each epoch has the same number of steps, which resuming needs.
    The number of rows is a multiple of 8 if 8 rows fit. Each epoch takes every row once.

    The base class is that of `TrainingBatches`, for the same reason.

    Args:
        lengths: tokens of each row, shape (rows,); of the longer side for a pair of texts.
        step_tokens: tokens of an optimizer step.
        accumulation: batches of a process in a step.
        processes: number of processes.
        rank: number of this process.
        seed: seed of the order.
        multiple: the length of a batch is padded to a multiple of this.
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
        """Return the number of rows of each step, longest rows first; it is equal in all epochs."""
        longest_first = np.sort(self.padded)[::-1]
        sizes, start = [], 0
        while start < len(longest_first):
            fit = max(1, step_tokens // int(longest_first[start]))
            even = fit - fit % 8
            sizes.append(min(even if even >= parts else fit, len(longest_first) - start))
            start += sizes[-1]
        # a small last step would be noisy
        if len(sizes) > 1 and sizes[-1] < sizes[-2] / 2 and sizes[-1] + sizes[-2] >= 2 * parts:
            both = sizes.pop() + sizes.pop()
            sizes += [both - both // 2, both // 2]
        return sizes

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def steps(self) -> list[np.ndarray]:
        """Return the row numbers of each optimizer step of this epoch, longest row first."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        order = order[np.argsort(-self.padded[order], kind="stable")]
        steps = np.split(order, np.cumsum(self.sizes)[:-1])
        steps = [rows[np.argsort(-self.lengths[rows], kind="stable")] for rows in steps]
        random.shuffle(steps)
        # a step with fewer rows than batches comes last: only there the Trainer accepts fewer batches
        return sorted(steps, key=lambda rows: self._batches(len(rows)) < self.accumulation)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            batches = self._batches(len(rows))
            for batch in range(batches):
                yield share(rows, batches * self.processes)[batch * self.processes + self.rank]

    def __len__(self) -> int:
        """Return the number of batches of one process in an epoch."""
        return sum(map(self._batches, self.sizes))

    def _batches(self, rows: int) -> int:
        return min(self.accumulation, -(-rows // self.processes))


class StepBatches(BatchRebalanceSampler):
    """Sample batches of consecutive rows for a run whose rows are numbered from 0.

    A step takes `step_rows` rows. With `ramp` = (rows, steps) the first step takes `rows` rows, and the size grows
    linearly to `step_rows` over `steps` steps: small batches cost less while the gradient is large (Smith et al. 2018,
    https://arxiv.org/abs/1711.00489). The rows of a step do not depend on its batches. A process takes the rows whose
    number modulo `processes` is its rank.

    The base class is that of `TrainingBatches`, for the same reason.
    """

    def __init__(
        self, steps: int, step_rows: int, ramp: tuple[int, int] | None, accumulation: int, processes: int, rank: int
    ):
        self.steps, self.accumulation, self.processes, self.rank = steps, accumulation, processes, rank
        self.starts = step_starts(steps, step_rows, ramp, processes)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the run is one epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in pairwise(self.starts.tolist()):
            rows = np.arange(start + self.rank, end, self.processes)
            yield from (part.tolist() for part in np.array_split(rows, self.accumulation))

    def __len__(self) -> int:
        return self.steps * self.accumulation


def step_starts(steps: int, step_rows: int, ramp: tuple[int, int] | None, processes: int) -> np.ndarray:
    """Return the first row of each step of `StepBatches`, then the number of all rows; shape (steps + 1,).

    The size of a step is a multiple of `processes`.
    """
    sizes = np.full(steps, step_rows)
    if ramp is not None:
        first, growing = ramp
        grown = first + (step_rows - first) * np.arange(min(steps, growing)) / growing
        sizes[: len(grown)] = np.floor(grown / processes).astype(int) * processes
    return np.concatenate([[0], np.cumsum(sizes)])


class Repeated(TorchDataset):
    """Repeat a data set in passes, each with a new shuffle, and number the rows of all passes for `StepBatches`.

    Column `row` holds this number, because a collator that draws by `row` must draw differently in each pass.
    """

    def __init__(self, rows: Dataset, seed: int):
        self.one_pass, self.seed, self.rows = rows, seed, 0  # the trainer sets the rows of the run
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        return [self.one_pass[self.index(number)] | {"row": number} for number in numbers]

    def index(self, number: int) -> int:
        """Return the row of the data set for row `number` of the run."""
        done, place = divmod(number, len(self.one_pass))
        if done != self._pass:
            self._pass = done
            self._order = np.random.default_rng([self.seed, done]).permutation(len(self.one_pass))
        return int(self._order[place])


class LengthSortedSampler(Sampler):
    """Sample evaluation rows longest first: batches hold little padding, and the first batch shows the peak memory."""

    def __init__(self, dataset: Dataset):
        self.order = np.argsort(-row_lengths(dataset), kind="stable")

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())

    def __len__(self) -> int:
        return len(self.order)


def row_parts(batch: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Cut a batch into parts of whole rows with about `most` tokens each.

    The tokens are counted in `attention_mask` of shape (rows, length). A batch stays whole if it has no mask, or has
    values that are not one a row.
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
    """Return the rows of `batches`, which are in `order` (of `LengthSortedSampler`), as a list in data set order."""
    rows: list = [None] * len(order)
    for index, row in zip(order, (row for batch in batches for row in batch), strict=True):
        rows[index] = row
    return rows


# In the trainer


@runtime_checkable
class EpochSeeded(Protocol):
    """A collator that draws random numbers: they must follow from its seed, the epoch and the row.

    The trainer sets the epoch before the first batch. With the global random state the masks of a resumed run would
    differ from those of the uninterrupted run.
    """

    def set_epoch(self, epoch: int) -> None: ...


class SetEpoch(TrainerCallback):
    """Set the epoch of the batch sampler and the collator before the first batch of each epoch.

    The training loop sets the epoch through one wrapper of the sampler, but a resumed epoch on several processes has
    two wrappers.
    """

    def __init__(self, trainer: "SeededOrder"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        for part in (self.trainer.train_batches, self.trainer.data_collator):
            if isinstance(part, EpochSeeded):
                part.set_epoch(int(state.epoch))


class SeededOrder(transformers.Trainer):
    """Order the training rows by seed and epoch under `--train_sampling_strategy random` and `group_by_length`."""

    #: rows of an optimizer step, and its batch sampler; None for a sampler of transformers
    step_rows: int
    train_batches: Sampler | None = None

    def cut(self) -> dict[str, int]:
        """Return the arguments of a batch sampler that describe accumulation, processes and seed."""
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
        # upstream: `get_train_dataloader` calls it with the data set, and does not wrap a BatchRebalanceSampler
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, Dataset) and self.args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        self.train_batches = self.make_batches(dataset)
        return self.train_batches

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training set; its workers ignore signals to the process group."""
        return spare_workers(super().get_train_dataloader())
