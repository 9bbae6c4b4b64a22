"""Choose the rows of each optimizer step from the rows of several tasks."""

from collections.abc import Iterator, Sequence

import numpy as np

from common.training.draws import EpochRows
from common.training.order import StepSampler, share
from common.training.tasks import TaskRows

from .arguments import SharingArguments


def shares(sizes: np.ndarray, args: SharingArguments, fixed: np.ndarray, progress: float = 0.0) -> np.ndarray:
    """Return the share of each task in the rows, with sum 1.

    - `temperature`: proportional to the number of rows to the power of 1 / T (Devlin 2018, multilingual BERT; Raffel et
      al. 2020, https://arxiv.org/abs/1910.10683, section 3.5.2).
    - `annealed`: the exponent falls from 1 / T to 0, which is equal, over the run (Stickland and Murray 2019,
      https://arxiv.org/abs/1902.02671, section 3.1).

    Args:
        sizes: number of training rows of each task.
        args: how the shares are chosen.
        fixed: share of each task in the file of `--tasks`.
        progress: share of the run that is over.
    """
    exponent = 1 / args.sampling_temperature
    weights = {
        "proportional": lambda: sizes.astype(float),
        "temperature": lambda: sizes**exponent,
        "equal": lambda: np.ones(len(sizes)),
        "annealed": lambda: sizes ** (exponent * (1 - min(1.0, progress))),
        "fixed": lambda: fixed.astype(float),
    }[args.sampling]()
    return weights / weights.sum()


class SampledTasks(StepSampler):
    """Sample training batches of several tasks, in an order that follows from `seed` and epoch.

    The rows of a task come in passes, each in another order; `draws` chooses those of a pass. A mixed step has at least
    one row of each task; the other rows follow the shares of the tasks, with what rounding leaves carried over to the
    next step. A homogeneous step has rows of one task, drawn with the shares as probabilities. An epoch has as many
    rows as a pass of each task.

    A row has its number, plus the number of all rows times the number of its pass: see `TaskRows`.

    Args:
        rows: the rows of all tasks.
        step_rows: rows of an optimizer step.
        args: how rows are chosen.
        fixed: share of each task in the file of `--tasks`.
        run_steps: function of the steps of an epoch; returns those of the run.
        accumulation: batches of a process in a step.
        processes: number of processes.
        rank: number of this process.
        seed: seed of the order.
        draws: the rows in a pass of each task; None for all.
    """

    def __init__(
        self,
        rows: TaskRows,
        step_rows: int,
        args: SharingArguments,
        fixed: np.ndarray,
        run_steps,
        accumulation: int,
        processes: int,
        rank: int,
        seed: int,
        draws: Sequence[EpochRows | None],
    ):
        self.draws = draws
        self.rows, self.step_rows, self.args, self.fixed, self.seed = rows, step_rows, args, fixed, seed
        self.accumulation, self.processes, self.rank = accumulation, processes, rank
        every = np.diff(rows.starts).tolist()
        self.sizes = np.array([size if some is None else len(some) for size, some in zip(every, draws, strict=True)])
        self.epoch_steps = max(1, round(self.sizes.sum() / step_rows))
        self.total = max(1, run_steps(self.epoch_steps))
        self.epoch = 0
        #: rows of each task before an epoch, and what rounding has left; by epoch
        self._begun = {0: (np.zeros(len(self.sizes), dtype=int), np.zeros(len(self.sizes)))}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def share_at(self, step: int) -> np.ndarray:
        """Return the share of each task in a step of the run, counted from 0."""
        return shares(self.sizes, self.args, self.fixed, step / self.total)

    def counts(self, epoch: int) -> np.ndarray:
        """Return the rows of each task in each step of an epoch, shape (steps, tasks)."""
        while epoch not in self._begun:
            last = max(self._begun)
            taken, left = self._counts(last)
            self._begun[last + 1] = (self._begun[last][0] + taken.sum(0), left)
        return self._counts(epoch)[0]

    def _counts(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        tasks, first = len(self.sizes), epoch * self.epoch_steps
        changing = self.args.sampling == "annealed"
        fixed = self.share_at(0)
        random = np.random.default_rng([self.seed, epoch])
        taken, left = np.zeros((self.epoch_steps, tasks), dtype=int), self._begun[epoch][1].copy()
        for step in range(self.epoch_steps):
            share_now = self.share_at(first + step) if changing else fixed
            if self.args.batches == "homogeneous":
                taken[step, random.choice(tasks, p=share_now)] = self.step_rows
                continue
            left += share_now * (self.step_rows - tasks)
            whole = np.maximum(np.floor(left).astype(int), 0)
            while whole.sum() > self.step_rows - tasks:  # rounding errors alone
                whole[whole.argmax()] -= 1
            most = np.argsort(-(left - whole), kind="stable")[: self.step_rows - tasks - whole.sum()]
            whole[most] += 1
            left -= whole
            taken[step] = 1 + whole
        return taken, left

    def steps(self) -> list[np.ndarray]:
        """Return the row numbers of each step of this epoch: task by task, longest row first."""
        counts = self.counts(self.epoch)
        streams = [self._stream(t, int(n)) for t, n in enumerate(self._begun[self.epoch][0])]
        return [self._step(row, streams) for row in counts]

    def _step(self, counts: np.ndarray, streams: list[Iterator[int]]) -> np.ndarray:
        parts = []
        for stream, count in zip(streams, counts.tolist(), strict=True):
            part = np.array([next(stream) for _ in range(count)], dtype=int)
            parts.append(part[np.argsort(-self.rows.lengths[part % len(self.rows)], kind="stable")])
        return np.concatenate(parts)

    def _stream(self, task: int, done: int) -> Iterator[int]:
        """Yield the rows of a task from row `done` of its passes on."""
        number, place = divmod(done, int(self.sizes[task]))
        while True:
            some = self.draws[task]
            random = np.random.default_rng([self.seed, task, number])
            order = random.permutation(self.sizes[task]) if some is None else some.rows(number)
            yield from (self.rows.starts[task] + order[place:] + number * len(self.rows)).tolist()
            number, place = number + 1, 0

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            yield from share(rows, self.accumulation * self.processes)[self.rank :: self.processes]

    def __len__(self) -> int:
        """Return the number of batches of one process in an epoch."""
        return self.epoch_steps * self.accumulation
