"""Train several tasks: gradients, loss, rows and tokens of each task in each optimizer step, and scores of each task.

The gradient of each task is computed on its own and kept until the step is complete. It is then averaged over the
processes, and the weighted gradients are added up. The norm of each is known without a second pass, and a weighting
by gradients needs nothing more.
"""

import json
import math
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from transformers import TrainerCallback

from common import training
from common.errors import InputError, tell
from common.hardware import sharding
from common.models.structure import depths, layer_names
from common.speed.apply import Speed
from common.training import checkpoints
from common.training.draws import draws_of
from common.training.progress import Progress
from common.training.resume import reading
from common.training.tasks import TaskRows
from common.tuning import TunedModel
from common.tuning.tune import is_beside

from .arguments import MultitaskTrainingArguments, SharingArguments
from .earlier import importance_of, save_importance
from .model import freeze
from .sampling import SampledTasks
from .weighting import Weighting, weighting_of, without_conflicts

#: file of a checkpoint with the state of the weights, and the rows, tokens and seconds so far
STATE = "tasks.json"
#: entries of a batch: the batch of each task, and its numbers of rows and tokens
BATCHES, SEEN = "batches", "seen"


class MixedCollator:
    """Collate rows of several tasks: a batch for each task by its own collator."""

    def __init__(self, trainers: dict[str, training.Trainer]):
        self.inner = [trainer.data_collator for trainer in trainers.values()]
        self.collators = {
            name: trainer._get_collator_with_removed_columns(trainer.data_collator)
            for name, trainer in trainers.items()
        }

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of every collator that draws random numbers."""
        for collator in self.inner:
            if hasattr(collator, "set_epoch"):
                collator.set_epoch(epoch)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        by_task: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_task.setdefault(row["task"], []).append({k: v for k, v in row.items() if k != "task"})
        seen = {name: [len(some), sum(len(row["input_ids"]) for row in some)] for name, some in by_task.items()}
        return {BATCHES: {name: dict(self.collators[name](some)) for name, some in by_task.items()}, SEEN: seen}


class RestoreTasks(TrainerCallback):
    """Restore the state of the weights before the first step, or begin a new one."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin(state.max_steps)


class Trainer(training.Trainer):
    """Train the tasks of `SharedModel`, each batch of a task by the trainer of its recipe.

    Args:
        trainers: the trainer of each task, for its model with the shared encoder.
        sharing: how rows and weights are chosen.
        fixed: share of each task in the file of `--tasks`.
        scores: the score of each task that counts in the mean.
    """

    args: MultitaskTrainingArguments

    def __init__(
        self,
        model: TunedModel,
        args: MultitaskTrainingArguments,
        *,
        trainers: dict[str, training.Trainer],
        sharing: SharingArguments,
        fixed: list[float],
        scores: dict[str, str],
        **kwargs,
    ):
        if sharding():
            raise InputError(f"several tasks: do not work under {sharding()}; launch with common/launch/multi_gpu.yaml")
        self.trainers, self.sharing, self.fixed, self.scores = trainers, sharing, np.array(fixed), scores
        self.draws = [draws_of(t.train_dataset, t.args, f"a pass over task {n}") for n, t in trainers.items()]
        super().__init__(model, args, **kwargs)
        if sharing.batches == "mixed" and self.step_rows < len(trainers):
            least = -(-len(trainers) * args.per_device_train_batch_size // self.step_rows)
            raise InputError(
                f"--per_device_train_batch_size: {len(trainers)} tasks in a step of {self.step_rows} rows; give at "
                f"least {least}, or --batches homogeneous"
            )
        for trainer in trainers.values():
            trainer.pop_callback(Progress)
        values = dict(self.model.named_parameters())
        self.trained = {name: value for name, value in values.items() if value.requires_grad}
        inside = set(self.model.shared_names().values())
        self.shared = {name for name in self.trained if name in inside}
        at, last = depths(self.model, ()), len(layer_names(self.model)) - (sharing.own_layers or 0)
        self.last_shared = {name for name in self.shared if at[name] == last}
        self.add_callback(RestoreTasks(self))

    def quicken(self, args: MultitaskTrainingArguments) -> Speed:
        """Return how the model of the first task computes faster: the trainer of each task has seen to its model."""
        return next(iter(self.trainers.values())).speed

    def merged(self, folder: str, save: bool) -> nn.Module:
        """Return the model as it is: the models of the tasks are saved on their own."""
        return self.model

    def take_tasks(self, args, **kwargs) -> dict[str, Any]:
        """Return rows and collator of all tasks."""
        self.by_task = True
        return {
            "train_dataset": TaskRows({name: trainer.train_dataset for name, trainer in self.trainers.items()}),
            "eval_dataset": {name: trainer.eval_dataset for name, trainer in self.trainers.items()},
            "data_collator": MixedCollator(self.trainers),
        }

    # After an earlier run

    def take_old_task(self, args, unlabeled) -> None:
        """Do nothing: the trainer of each task has the old model of its task."""

    def fisher(self) -> dict[str, Tensor]:
        """Return the importance of each weight for the tasks of the earlier run."""
        return importance_of(self.model, self.trainers)

    def check_fisher(self) -> None:
        """Do nothing: the trainer of each task checks its rows."""

    def save_fisher(self) -> None:
        """Save the importance of each weight for the training rows of all tasks, and for those before them."""
        model = self.accelerator.unwrap_model(self.model)
        save_importance(self.args.folder, model, self.trainers, self.fisher_pull.importance if self.fisher_pull else {})

    # Rows

    def make_batches(self, dataset: TaskRows) -> SampledTasks:
        """Return the batch sampler."""
        return SampledTasks(
            dataset, self.step_rows, self.sharing, self.fixed, self.run_steps, **self.cut(), draws=self.draws
        )

    def run_steps(self, epoch_steps: int) -> int:
        """Return the steps of the run."""
        return self.args.max_steps if self.args.max_steps > 0 else math.ceil(self.args.num_train_epochs * epoch_steps)

    # A step

    def begin(self, max_steps: int) -> None:
        """Begin the weights of a run, or restore those of a checkpoint."""
        tasks = len(self.trainers)
        window = max(1, min(self.train_batches.epoch_steps, max_steps // 20))
        self.weighting: Weighting = weighting_of(tasks, self.sharing, window)
        self.seen = {name: [0, 0] for name in self.trainers}
        self.begun, self.earlier_seconds = time.monotonic(), 0.0
        for trainer in self.trainers.values():
            trainer.forget_losses()
        if self.resumed_from is not None:
            with reading(self.resumed_from):
                state = json.loads(Path(self.resumed_from, STATE).read_text(encoding="utf-8"))
                self.weighting.load(state["weighting"])
                self.seen = {name: list(state["seen"][name]) for name in self.trainers}
                self.earlier_seconds = float(state["seconds"])
        self.forget_step()
        self.forget_gradients()

    def save_beside(self, folder: Path) -> None:
        """Save the state of the weights."""
        if self.args.should_save:
            seconds = self.earlier_seconds + time.monotonic() - self.begun
            state = {"weighting": self.weighting.state(), "seen": self.seen, "seconds": seconds}
            (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def forget_step(self) -> None:
        """Forget gradients and losses of the last step."""
        self.gradients: dict[str, dict[str, Tensor]] = {name: {} for name in self.trainers}
        self.step_loss = torch.zeros(len(self.trainers), dtype=torch.float64, device=self.args.device)

    def forget_gradients(self) -> None:
        """Forget the norms of gradients that `log` reports."""
        self.norms = np.zeros((2, len(self.trainers)))

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Return the batches of a step, as the trainers of the tasks complete them, and the labels of each task."""
        batches = list(islice(epoch_iterator, num_batches))
        counts, seen = {}, torch.zeros((len(self.trainers), 2), dtype=torch.int64, device=device)
        for i, (name, trainer) in enumerate(self.trainers.items()):
            with_rows = [batch for batch in batches if name in batch[BATCHES]]
            own = iter([batch[BATCHES][name] for batch in with_rows])
            completed, counts[name] = trainer.get_batch_samples(own, len(with_rows), device)
            for batch, new in zip(with_rows, completed, strict=True):
                batch[BATCHES][name] = new
                seen[i] += torch.tensor(batch[SEEN][name], device=device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(seen)
        self.present = [bool(rows) for rows, _ in seen.tolist()]
        for name, new, present in zip(self.trainers, seen.tolist(), self.present, strict=True):
            self.seen[name] = [old + more for old, more in zip(self.seen[name], new, strict=True)]
            self._parts[name][1] += present
        self.share = self.train_batches.share_at(self.state.global_step)
        return batches, counts

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Compute gradient and loss of each task in a batch; return the weighted loss, whose gradient is complete."""
        weights = dict(zip(self.trainers, self.weighting.weights(self.share), strict=True))
        total = torch.zeros((), device=self.args.device)
        for i, (name, trainer) in enumerate(self.trainers.items()):
            if name not in inputs[BATCHES]:
                continue
            batch, counts = inputs[BATCHES][name], num_items_in_batch[name]
            loss = trainer.compute_loss(partial(self.model, name), batch, num_items_in_batch=counts)
            self.accelerator.backward(loss)
            self._take_gradients(name)
            self.step_loss[i] += loss.detach()
            self._parts[name][0] += loss.detach()
            total += weights[name] * loss.detach()
        return total.requires_grad_()

    def _take_gradients(self, task: str) -> None:
        kept = self.gradients[task]
        for name, value in self.trained.items():
            if value.grad is not None:
                kept[name] = kept[name] + value.grad if name in kept else value.grad
                value.grad = None

    def _complete_gradient(self) -> None:
        """Give the parameters the weighted sum of the gradients of the tasks, and learn from the step."""
        if self.args.world_size > 1:
            torch.distributed.all_reduce(self.step_loss)
            self.step_loss /= self.args.world_size
            for i, name in enumerate(self.trainers):
                if self.present[i]:
                    self._average(self.gradients[name])
        weights = self.weighting.weights(self.share)
        shared = weights
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        if self.sharing.weighting == "pcgrad":
            order = np.random.default_rng([self.args.seed, self.state.global_step])
            shared = without_conflicts(self._products(), order)
        self.norms += self._norms(self.trained.keys()) / scale, self.present
        within = {"gradnorm": self.last_shared, "equal_norms": self.shared}.get(self.sharing.weighting)
        norms = None if within is None else self._norms(within) / scale
        for i, gradients in enumerate(self.gradients.values()):
            for name, gradient in gradients.items():
                value, weight = self.trained[name], float(shared[i] if name in self.shared else weights[i])
                if value.grad is None:
                    value.grad = gradient.mul_(weight) if weight != 1 else gradient
                else:
                    value.grad.add_(gradient, alpha=weight)
        losses = np.where(self.present, self.step_loss.cpu().numpy(), np.nan)
        if norms is None or np.isfinite(norms).all():  # else fp16 has overflowed, and the step is skipped
            self.weighting.update(losses, losses if norms is None else norms)
        self.forget_step()
        super()._complete_gradient()

    def _average(self, gradients: dict[str, Tensor]) -> None:
        """Average the gradients of a task over the processes; a process without rows of the task adds nothing."""
        has = torch.tensor([name in gradients for name in self.trained], dtype=torch.int32, device=self.args.device)
        torch.distributed.all_reduce(has, torch.distributed.ReduceOp.MAX)
        names = [name for name, any_of in zip(self.trained, has.tolist(), strict=True) if any_of]
        parts = [gradients.get(name, torch.zeros_like(self.trained[name])) for name in names]
        flat = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(flat)
        flat /= self.args.world_size
        sums = flat.split([part.numel() for part in parts])
        gradients.update({name: new.view_as(old) for name, new, old in zip(names, sums, parts, strict=True)})

    def _norms(self, names) -> np.ndarray:
        """Return the norm of the gradient of each task over some parameters; 0 without rows, shape (tasks,).

        Its parts are summed in the order of `trained`, so that all processes get the same number.
        """
        found = []
        for gradients in self.gradients.values():
            inside = [name for name in self.trained if name in names and name in gradients]
            parts = [gradients[name].norm().double() for name in inside]
            found.append(float(torch.stack(parts).norm()) if parts else 0.0)
        return np.array(found)

    def _products(self) -> np.ndarray:
        """Return the inner products of the gradients of the tasks over the shared parameters, (tasks, tasks)."""
        every = list(self.gradients.values())
        gram = np.zeros((len(every), len(every)))
        for i, one in enumerate(every):
            for j, other in enumerate(every[: i + 1]):
                both = [name for name in self.shared if name in one and name in other]
                products = [torch.dot(one[name].flatten(), other[name].flatten()).double() for name in sorted(both)]
                gram[i, j] = gram[j, i] = float(torch.stack(products).sum()) if products else 0.0
        return gram

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as the parent does, with rows, tokens, weight and norm of the gradient of each task."""
        if "loss" in logs:
            weights = self.weighting.weights(self.share)
            for i, name in enumerate(self.trainers):
                rows, tokens = self.seen[name]
                logs |= {f"rows_{name}": rows, f"tokens_{name}": tokens, f"weight_{name}": float(weights[i])}
                if self.norms[1, i]:
                    logs[f"grad_norm_{name}"] = float(self.norms[0, i] / self.norms[1, i])
            self.forget_gradients()
        super().log(logs, *args, **kwargs)

    # Scores

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate each task by its trainer.

        Returns:
            The metrics of a task as `eval_TASK_...`; `eval_loss`: the sum of the losses; `eval_mean` and `eval_worst`
            over the scores of the tasks.
        """
        metrics: dict[str, float] = {}
        with self.averaged():
            for name, trainer in self.trainers.items():
                metrics |= trainer.evaluate(metric_key_prefix=f"{metric_key_prefix}_{name}")
        metrics = {name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_per_second"))}
        found = {name: metrics[f"{metric_key_prefix}_{name}_{score}"] for name, score in self.scores.items()}
        metrics |= summary(found, metric_key_prefix)
        metrics[f"{metric_key_prefix}_loss"] = sum(
            metrics[f"{metric_key_prefix}_{name}_loss"] for name in self.trainers
        )
        self.log(metrics)
        if self.is_in_train:
            tell(", ".join(f"{name} {self.scores[name]} {value:.4g}" for name, value in found.items()))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # upstream: `save_model` calls it in the main process. A checkpoint has the names of `state_dict`; the folder of
        # the run gets the shared encoder, and in a folder of its name the model of each task
        folder = Path(output_dir or self.args.folder)
        if folder.parent.name == checkpoints.STAGING:
            super()._save(output_dir, state_dict)
            return
        self.accelerator.unwrap_model(self.model).save(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        for name, trainer in self.trainers.items() if folder == self.args.folder else ():
            trainer.args.output_dir = str(folder / name)
            if is_beside(trainer.model):
                freeze(trainer.model)
            trainer.model = trainer.merged(str(folder / name), save=True)
            trainer.save_model(_internal_call=True)


def summary(scores: dict[str, float], prefix: str) -> dict[str, float]:
    """Return mean and worst of the scores of the tasks."""
    return {f"{prefix}_mean": float(np.mean(list(scores.values()))), f"{prefix}_worst": float(min(scores.values()))}
