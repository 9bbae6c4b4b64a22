"""Promise: seed and epoch alone decide which rows an optimizer step takes. Evaluation sorts rows by length."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler

from common.data.augment.rows import AugmentedRows
from common.data.domains import DOMAIN
from common.data.workers import inner_loader, spare_workers
from common.errors import InputError
from common.training.collator import EpochSeeded, TrainingCollator
from common.training.draws import EpochRows, draws_of
from common.training.loss import MeanLoss

#: steps whose rows are sorted together by length (50 in LengthGroupedSampler of transformers)
STEPS_SORTED_TOGETHER = 50


def row_lengths(dataset: Dataset | AugmentedRows, name: str = "input_ids") -> np.ndarray:
    """Return the length of each row in tokens, from Arrow column `name` of an encoded data set; shape (rows,)."""
    if isinstance(dataset, AugmentedRows):  # a copy counts as long as its row, because its length differs by epoch
        return np.tile(row_lengths(dataset.windows, name), 1 + dataset.copies)
    column = dataset.select_columns(name).with_format("arrow")[:][name]
    return pc.list_value_length(column).to_numpy()


def share(rows: np.ndarray, parts: int) -> list[list[int]]:
    """Cut `rows` into `parts` contiguous parts whose sizes differ by at most one.

    With fewer rows than parts, the last parts are empty: `TrainingCollator` makes a batch without labels from them.
    """
    return [part.tolist() for part in np.array_split(rows, parts)]


class StepSampler(BatchRebalanceSampler):
    """Sample training batches: rows of the data set for each batch of an optimizer step.

    The base class is BatchRebalanceSampler, because the Trainer passes a sampler of this type to the data loader
    without sharding it again. Nothing else is inherited.
    """

    lengths: np.ndarray  # type: ignore[assignment]  # a list in the parent, whose methods are not called


class TrainingBatches(StepSampler):
    """Sample training batches in an order that follows from `seed` and epoch.

    An optimizer step takes `step_rows` rows: the batch of a device, times processes, times gradient accumulation. The
    rows of a step depend on `step_rows`, `seed` and epoch only. One process with batch 32, two with batch 16, and batch
    8 accumulated 4 times therefore make the same steps. Each epoch takes every row once. A last step of less than half
    the size would be noisy; it shares rows with the step before. A step may have fewer rows than parts (see `share`).

    With `by_length` the rows of a step have similar lengths: less padding, but a less mixed sample. With `sequential`
    they are neighbours in the data set. Otherwise they are random. The rows of a step are always sorted by length,
    because batches of similar lengths hold little padding. `draws` chooses the rows of an epoch, instead of all.
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
        sequential: bool = False,
        draws: EpochRows | None = None,
    ):
        self.lengths, self.step_rows, self.seed, self.by_length = np.asarray(lengths), step_rows, seed, by_length
        self.sequential, self.draws = sequential, draws
        self.accumulation, self.processes, self.rank = accumulation, processes, rank
        self.shortest = int(self.lengths.argmin())
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def steps(self) -> list[np.ndarray]:
        """Return the row numbers of each optimizer step of this epoch, longest row first."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = np.arange(len(self.lengths)) if self.sequential else random.permutation(len(self.lengths))
        if self.draws is not None:
            order = self.draws.rows(self.epoch)
        # at least four groups, because the rows of a small data set must mix too
        together = min(STEPS_SORTED_TOGETHER, len(order) // (4 * self.step_rows)) if self.by_length else 1
        group = self.step_rows * max(1, together)
        steps: list[np.ndarray] = []
        for start in range(0, len(order), group):
            rows = order[start : start + group]
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            steps += [rows[i : i + self.step_rows] for i in range(0, len(rows), self.step_rows)]
        last = steps.pop() if len(steps[-1]) < self.step_rows else None
        if not self.sequential:
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
        """Return the number of batches of one process in an epoch."""
        full, rest = divmod(len(self.lengths if self.draws is None else self.draws), self.step_rows)
        if full and 0 < rest < self.step_rows / 2:
            rest = self.step_rows + rest - (self.step_rows + rest) // 2
        return (full if rest else full - 1) * self.accumulation + self._last_batches(rest or self.step_rows)

    def _last_batches(self, rows: int) -> int:
        """Return the batches of a last step; only there the Trainer accepts fewer than `accumulation`."""
        return -(-rows * self.accumulation // self.step_rows)


class TokenBudgetBatches(StepSampler):
    """Sample training batches by a budget of tokens, padding included.

    The tokens of a batch are rows times the longest row, as for `max-tokens` of fairseq (Ott et al. 2019,
    https://aclanthology.org/N19-4009). An optimizer step takes `step_tokens` tokens: the budget of a device, times
    processes, times gradient accumulation. The rows of a step depend on `step_tokens`, `seed` and epoch only.

    A batch may exceed the budget by part of a row, if the rows of its step are no multiple of the batches.

    Rows are sorted by length rounded up to `multiple`, the multiple of padding; rows of equal rounded length have a
    random order. Steps then mix rows in each epoch, and each epoch has the same number of steps, which resuming needs.
    Each epoch takes every row once. A step may have fewer rows than parts (see `share`).

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
        self.shortest = int(self.lengths.argmin())
        self.epoch = 0
        self.sizes = self._sizes(step_tokens)

    def _sizes(self, step_tokens: int) -> list[int]:
        """Return the number of rows of each step, longest rows first; it is equal in all epochs."""
        longest_first = np.sort(self.padded)[::-1]
        sizes, start = [], 0
        while start < len(longest_first):
            fit = max(1, step_tokens // int(longest_first[start]))
            sizes.append(min(fit, len(longest_first) - start))
            start += sizes[-1]
        # a small last step would be noisy
        if len(sizes) > 1 and sizes[-1] < sizes[-2] / 2:
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
        return steps

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            yield from share(rows, self.accumulation * self.processes)[self.rank :: self.processes]

    def __len__(self) -> int:
        """Return the number of batches of one process in an epoch."""
        return len(self.sizes) * self.accumulation


class StepBatches(StepSampler):
    """Sample batches of consecutive rows for a run whose rows are numbered from 0.

    A step takes `step_rows` rows. With `ramp` = (rows, steps) the first step takes `rows` rows, and the size grows
    linearly to `step_rows` over `steps` steps: small batches cost less while the gradient is large (Smith et al. 2018,
    https://arxiv.org/abs/1711.00489). The rows of a step do not depend on its batches. A process takes the rows whose
    number modulo `processes` is its rank.
    """

    def __init__(
        self, steps: int, step_rows: int, ramp: tuple[int, int] | None, accumulation: int, processes: int, rank: int
    ):
        self.steps, self.accumulation, self.processes, self.rank = steps, accumulation, processes, rank
        self.starts = step_starts(steps, step_rows, ramp)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the run is one epoch."""

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in pairwise(self.starts.tolist()):
            rows = np.arange(start + (self.rank - start) % self.processes, end, self.processes)
            yield from (part.tolist() for part in np.array_split(rows, self.accumulation))

    def __len__(self) -> int:
        return self.steps * self.accumulation


def step_starts(steps: int, step_rows: int, ramp: tuple[int, int] | None) -> np.ndarray:
    """Return the first row of each step of `StepBatches`, then the number of all rows; shape (steps + 1,)."""
    sizes = np.full(steps, step_rows)
    if ramp is not None:
        first, growing = ramp
        grown = first + (step_rows - first) * np.arange(min(steps, growing)) / growing
        sizes[: len(grown)] = np.floor(grown).astype(int)
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


class SetEpoch(TrainerCallback):
    """Set the epoch of the batch sampler, the collator and the training set before the first batch of each epoch.

    The training loop sets the epoch through one wrapper of the sampler, but a resumed epoch on several processes has
    two wrappers.
    """

    def __init__(self, trainer: "SeededOrder"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        for part in (self.trainer.train_batches, self.trainer.train_collator, self.trainer.train_dataset):
            if isinstance(part, EpochSeeded):
                part.set_epoch(int(state.epoch))


class SeededOrder(MeanLoss):
    """Order the training rows by seed and epoch, or as they are under `--train_sampling_strategy sequential`."""

    #: rows of an optimizer step, and its batch sampler; None for a sampler of transformers
    step_rows: int
    train_batches: StepSampler | None = None
    train_collator: TrainingCollator

    def cut(self) -> dict[str, int]:
        """Return the arguments of a batch sampler that describe accumulation, processes and seed."""
        args = self.args
        return {
            "accumulation": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "rank": args.process_index,
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }

    def make_batches(self, dataset: Dataset | AugmentedRows) -> StepSampler:
        """Return the batch sampler of a training set."""
        return self.row_batches(row_lengths(dataset))

    def row_batches(self, lengths: np.ndarray) -> "TrainingBatches":
        """Return the batch sampler of rows with `lengths`, in the order of `--train_sampling_strategy`."""
        order = self.args.train_sampling_strategy
        by_length, sequential = order == "group_by_length", order == "sequential"
        draws = draws_of(self.train_dataset, self.args)
        return TrainingBatches(
            lengths, self.step_rows, by_length=by_length, sequential=sequential, draws=draws, **self.cut()
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        # upstream: `get_train_dataloader` calls it with the data set, and does not wrap a BatchRebalanceSampler
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self.train_batches = self.make_batches(dataset)
        return self.train_batches

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training set; its workers ignore signals to the process group.

        Raises:
            InputError: the training set draws by epoch, but persistent workers keep the copy of the first epoch.
        """
        loader = spare_workers(super().get_train_dataloader())
        if loader.persistent_workers and isinstance(loader.dataset, EpochSeeded):
            raise InputError(
                "--dataloader_persistent_workers true: the training set has a set_epoch, which persistent workers do "
                "not see; leave it out"
            )
        shortest = getattr(self.train_batches, "shortest", None)
        dataset: Any = loader.dataset
        filler = [] if shortest is None else dataset.__getitems__([shortest])
        labels = [*(["labels"] if self.by_task else self.losses), DOMAIN]  # the gate learns the domain of a row
        self.train_collator = TrainingCollator(loader.collate_fn, self.data_collator, filler, labels)
        inner_loader(loader).collate_fn = self.train_collator
        return loader
