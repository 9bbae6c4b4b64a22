"""Train several tasks in one run; each optimizer step takes rows of one task."""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Dataset as TorchDataset

from common.data.augment.rows import AugmentedRows
from common.errors import InputError
from common.training.order import SeededOrder, StepSampler, row_lengths, share


class TaskRows(TorchDataset):
    """Concatenate the training sets of several tasks, and add the name of the task to each row as `task`.

    A number beyond the rows is one of a later pass over them. There column `row`, by which a collator may draw, has a
    number of its own for each pass.
    """

    def __init__(self, datasets: dict[str, Dataset | AugmentedRows]):
        self.datasets = datasets
        self.starts = np.cumsum([0, *map(len, datasets.values())])
        self.lengths = np.concatenate([row_lengths(rows) for rows in datasets.values()])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of training sets that draw random numbers."""
        for rows in self.datasets.values():
            if isinstance(rows, AugmentedRows):
                rows.set_epoch(epoch)

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        names = list(self.datasets)
        passes, places = np.divmod(numbers, len(self))
        tasks = np.searchsorted(self.starts, places, side="right") - 1
        found = []
        for task, place, again in zip(tasks, places, passes, strict=True):
            rows = self.datasets[names[task]]
            row = rows[int(place - self.starts[task])] | {"task": names[task]}
            found.append(row | {"row": int(row["row"]) + int(again) * len(rows)} if again and "row" in row else row)
        return found


class TaskBatches(StepSampler):
    """Sample training batches of several tasks, in an order that follows from `seed` and epoch.

    The rows of each task are shuffled and cut into even steps of at least `step_rows` rows. The steps of all tasks are
    shuffled: the share of a task follows from its size (Liu et al. 2019, arXiv:1901.11504, algorithm 1).
    Each epoch takes every row once. A task with fewer rows than two steps makes one larger step.
    """

    def __init__(self, rows: TaskRows, step_rows: int, accumulation: int, processes: int, rank: int, seed: int):
        self.rows, self.step_rows, self.seed = rows, step_rows, seed
        self.accumulation, self.processes, self.rank = accumulation, processes, rank
        self.shortest = int(rows.lengths.argmin())
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def steps(self) -> list[np.ndarray]:
        """Return the row numbers of each optimizer step of this epoch, longest row first."""
        random = np.random.default_rng([self.seed, self.epoch])
        steps: list[np.ndarray] = []
        for start, end in zip(self.rows.starts[:-1], self.rows.starts[1:], strict=True):
            parts = np.array_split(start + random.permutation(end - start), max(1, (end - start) // self.step_rows))
            steps += [part[np.argsort(-self.rows.lengths[part], kind="stable")] for part in parts]
        random.shuffle(steps)
        return steps

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            parts = share(rows, self.accumulation * self.processes)
            yield from parts[self.rank :: self.processes]

    def __len__(self) -> int:
        """Return the number of batches of one process in an epoch."""
        return sum(max(1, int(size) // self.step_rows) for size in np.diff(self.rows.starts)) * self.accumulation


class TaskCollator:
    """Collate rows of one task by the collator of the task, and add the entry `task`."""

    def __init__(self, collators: Callable | dict[str, Callable]):
        self.collators = collators

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of every collator that draws random numbers."""
        for collator in self.collators.values() if isinstance(self.collators, dict) else [self.collators]:
            if hasattr(collator, "set_epoch"):
                collator.set_epoch(epoch)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        task = rows[0]["task"]
        if others := sorted({row["task"] for row in rows} - {task}):
            raise InputError(f"task: one batch has rows of {task} and {others[0]}; evaluate or predict each task apart")
        collator = self.collators[task] if isinstance(self.collators, dict) else self.collators
        return {**collator([{k: v for k, v in row.items() if k != "task"} for row in rows]), "task": task}


class SeveralTasks(SeededOrder):
    """Train on a dictionary of training sets, by task.

    `losses` has a function for each task, for its column `labels`. `data_collator` may have a collator for each task.
    The model takes the name of the task as argument `task`, and returns `logits`. `eval_dataset` is a dictionary by
    task too; any other evaluation set needs a column `task`.
    """

    def take_tasks(self, args, train_dataset=None, eval_dataset=None, data_collator=None, **kwargs) -> dict[str, Any]:
        """Return the arguments of the parent that replace dictionaries by task; empty without tasks."""
        if not isinstance(train_dataset, dict):
            return {}
        model = self.tuned.model.get_base_model() if isinstance(self.tuned.model, PeftModel) else self.tuned.model
        if "task" not in signature(model.forward).parameters:
            raise InputError(f"{type(model).__name__}.forward: takes no argument `task`; add it to train several tasks")
        if unmatched := train_dataset.keys() ^ self.losses.keys():
            names = ", ".join(sorted(unmatched))
            raise InputError(f"losses: differ from the tasks of train_dataset ({names}); give one for each task")
        self.by_task = True
        if empty := [name for name, rows in train_dataset.items() if not len(rows)]:
            raise InputError(f"train_dataset[{empty[0]!r}]: has no rows; add some, or leave the task out")
        if isinstance(eval_dataset, dict):
            eval_dataset = {n: rows.add_column("task", [n] * len(rows)) for n, rows in eval_dataset.items()}
        collator = TaskCollator(data_collator)
        return {"train_dataset": TaskRows(train_dataset), "eval_dataset": eval_dataset, "data_collator": collator}

    def make_batches(self, dataset: Dataset | TaskRows) -> StepSampler:
        """Return the batch sampler of several tasks, or of one training set."""
        if isinstance(dataset, TaskRows):
            return TaskBatches(dataset, self.step_rows, **self.cut())
        return super().make_batches(dataset)
