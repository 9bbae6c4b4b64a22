"""Promise: the loss of an optimizer step is the mean over all its labels, and the sum of these means over tasks.

The loss does not depend on how a step is cut into batches and processes. (The stock Trainer multiplies gradient and
loss by the number of accumulated batches, or of processes, for most heads:
https://github.com/huggingface/transformers/issues/47688.)
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError
from common.training.base import TrainerBase
from common.training.regularisation import Logits, divergence
from common.tuning.peft_methods import is_adalora, orthogonality

#: losses(logits, labels, label_smoothing) -> the loss of each label, in the shape of `labels`
Losses = Callable[[Logits, Tensor, float], Tensor]


def label_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of each label; 0 where the label is -100.

    Args:
        logits: scores of shape (rows, ..., classes).
        labels: class ids of shape (rows, ...).
        label_smoothing: weight that is spread over all classes.

    Returns:
        Losses in the shape of `labels`.
    """
    flat = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return flat.view(labels.shape)


class MeanLoss(TrainerBase):
    """Compute the loss of a step by `losses`, for each label column or task.

    A function of `losses` gets the logits of its column: the output of the model with the name of the column, else
    `logits`, else a tuple of the outputs whose names end in `logits`, else a tuple of all outputs but `loss`.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the labels of the whole step
    losses: dict[str, Losses]
    by_task = False
    passes = 1  # forward passes of each batch

    def labels_of(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Remove the labels from a batch; return them by label column, or under the task of the batch."""
        if self.by_task:
            return {inputs["task"]: inputs.pop("labels")} if "labels" in inputs else {}
        return {name: inputs.pop(name) for name in self.losses if name in inputs}

    def get_batch_samples(  # type: ignore[override]  # the parent passes the counts to `compute_loss`, of any type
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, dict[str, Tensor]]:
        """Return the batches of a step, and the number of its labels on all processes by column or task."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in self.losses}
        for batch in batches:
            for name, labels in self.labels_of(dict(batch)).items():
                counts[name] += (labels != -100).sum().to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        if len(counts) > 1:
            for name, count in counts.items():
                self._parts[name][1] += count > 0
        return batches, counts

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Compute the share of a batch in the loss of its step.

        Args:
            model: the model, wrapped or not.
            inputs: the batch; its labels are removed.
            return_outputs: also return the outputs of the model.
            num_items_in_batch: number of labels in the whole step by column or task; None: labels of the batch.
        """
        labels = self.labels_of(inputs)
        outputs = model(**inputs)
        loss = self.mean_loss(outputs, labels, num_items_in_batch) if labels or model.training else None
        return (loss, outputs) if return_outputs else loss

    def logits_of(self, outputs: dict[str, Tensor], name: str) -> Logits:
        """Return the logits of label column `name` (see the class)."""
        logits = next((outputs[key] for key in (name, "logits") if key in outputs), None)
        if logits is not None:
            return logits
        # an encoder-decoder also returns the states of its encoder, and its cache
        named = tuple(v for k, v in outputs.items() if k.endswith("logits"))
        return named or tuple(v for k, v in outputs.items() if k != "loss")

    def mean_loss(self, outputs, labels: dict[str, Tensor], counts: dict[str, Tensor] | None = None) -> Tensor:
        """Sum the losses of each label column, divide by its `counts` in the step, and add up the columns."""
        if not labels:
            raise InputError(f"training rows: no column {' or '.join(self.losses)}; add the labels")
        model, training = self.model, self.model.training
        parts: dict[str, Tensor] = {}
        for name, values in labels.items():
            logits = self.logits_of(outputs, name)
            losses, real = self.losses[name](logits, values, self.args.label_smoothing_factor), values != -100
            if losses.dim() == 0:
                raise InputError(
                    f"losses: the function of {name} returns one number for the batch; return the loss of each label, "
                    f"in the shape of its labels {tuple(values.shape)}, and 0 where the label is -100"
                )
            total = losses.sum()
            if is_adalora(model) and training and not parts:
                total = total + orthogonality(model) * real.sum()  # its sum over batches counts once a step
            if self.args.r_drop and training:  # the batch holds each label twice
                total = total + 2 * self.args.r_drop * divergence(logits, values) * real.any()
            count = real.sum() if counts is None else counts[name]
            parts[name] = total / count.clamp(min=1)  # a step may have no labels
        if counts is not None:  # gradients are averaged over processes
            parts = {name: part * self.accelerator.num_processes for name, part in parts.items()}
            if len(self.losses) > 1:
                for name, part in parts.items():
                    self._parts[name][0] += part.detach() / self.passes
        return torch.stack(list(parts.values())).sum() if len(parts) > 1 else next(iter(parts.values()))

    def forget_losses(self) -> None:
        """Reset the means that `log` reports."""
        self._parts = {name: torch.zeros(2, dtype=torch.float32, device=self.args.device) for name in self.losses}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as the parent does, and add the mean `loss_<name>` of each label column or task since the last log."""
        if "loss" in logs and len(self.losses) > 1:
            parts = self.accelerator.reduce(self._parts, "mean")
            logs |= {f"loss_{name}": float(total / n) for name, (total, n) in parts.items() if n > 0}
            self.forget_losses()
        super().log(logs, *args, **kwargs)


def named_losses(losses: Losses | dict[str, Losses]) -> dict[str, Losses]:
    """Return `losses` by label column; a single function belongs to column `labels`."""
    return dict(losses) if isinstance(losses, dict) else {"labels": losses}
