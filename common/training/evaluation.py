"""Promise: evaluations return rows in data set order, count each row once, and keep only the reduced outputs.

- `evaluate` and `predict` sort rows by length, and return predictions and labels in data set order, one array a row.
- `preprocess_logits_for_metrics` reduces the logits of each batch on the device; rows of different length are never
  padded together.
- `eval_loss` is the mean over all labels.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat
from transformers.trainer_utils import EvalLoopOutput

from common.data.workers import spare_workers
from common.hardware import reraise_out_of_memory
from common.training.interrupts import HOW_TO_RESUME, reraise_lost_ranks
from common.training.loss import MeanLoss
from common.training.order import LengthSortedSampler, in_dataset_order, row_parts
from common.training.regularisation import Logits, Regularised
from common.training.resume import early_stopping

#: tokens that a CPU evaluates at a time
EVALUATED_TOGETHER = 4096

#: reduce(logits, labels) -> the part of the logits of a batch that the scores need; labels is None if there are none
Reducer = Callable[[Any, Any], Any]


class RowLoader(DataLoader):
    """A loader that also has the whole data set, with the columns that the model does not take."""

    full_dataset: Dataset


def batches_of(output: EvalLoopOutput | EvalPrediction) -> tuple[list, list | None]:
    """Return predictions and labels as lists of batches, which they are under `eval_do_concat_batches` false."""
    return cast(list, output.predictions), cast("list | None", output.label_ids)


class RowEvaluation(Regularised, MeanLoss):
    """Evaluate and predict with one result a row.

    With several label columns, predictions, labels and losses are each a dictionary by column.
    """

    #: by label column or task; None keeps the logits
    reducers: dict[str, Reducer | None]
    user_metrics: Callable[[EvalPrediction, Dataset], dict[str, float]] | None

    def _get_eval_sampler(self, eval_dataset: Dataset) -> LengthSortedSampler:
        # upstream: `get_eval_dataloader` and `get_test_dataloader` call it with the data set
        return LengthSortedSampler(eval_dataset)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> RowLoader:
        """Return the loader of an evaluation set."""
        if not (eval_dataset is None or eval_dataset is self.eval_dataset or isinstance(eval_dataset, str)):
            return self.get_test_dataloader(eval_dataset)  # persistent workers of the parent would keep the first set
        loader = cast(RowLoader, spare_workers(super().get_eval_dataloader(eval_dataset)))
        named = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        loader.full_dataset = self.eval_dataset if named is None else named
        return loader

    def get_test_dataloader(self, test_dataset: Dataset) -> RowLoader:
        """Return the loader of a data set to predict."""
        loader = cast(RowLoader, spare_workers(super().get_test_dataloader(test_dataset)))
        loader.full_dataset = test_dataset
        return loader

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluate one data set, or several by name. `eval_loss` of several tasks is the sum of their losses."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        several = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.by_task and isinstance(several, dict):
            metrics[f"{metric_key_prefix}_loss"] = sum(metrics[f"{metric_key_prefix}_{name}_loss"] for name in several)
            total = {f"{metric_key_prefix}_loss": metrics[f"{metric_key_prefix}_loss"]}
            for callback in early_stopping(self) if self.is_in_train else []:  # the parent gave it the scores by task
                callback.on_evaluate(self.args, self.state, self.control, total)
        return metrics

    def evaluation_loop(self, dataloader: DataLoader, *args, **kwargs) -> EvalLoopOutput:
        """Evaluate as the parent does, and return the rows in data set order."""
        self._evaluated = cast(RowLoader, dataloader).full_dataset
        self._order = LengthSortedSampler(self._evaluated).order
        where = (
            f"in an evaluation with {self.args.per_device_eval_batch_size} rows at a time; give a smaller "
            f"--per_device_eval_batch_size; {HOW_TO_RESUME}"
        )
        with reraise_out_of_memory(lambda: where), reraise_lost_ranks(), self.averaged():
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        (output.metrics or {}).pop(f"{prefix}_model_preparation_time", None)
        predictions, labels, _ = self.rows_of(*batches_of(output))
        return output._replace(predictions=predictions, label_ids=labels)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None) -> tuple:
        """Reduce a batch on the device to (predictions, summed loss of each row, labels of each row), and labels.

        A single process on a CPU takes about `EVALUATED_TOGETHER` tokens at a time: more tokens cost memory and save no
        time. Several processes must have the same number of parts, and take the batch at once.
        """
        alone = self.args.device.type == "cpu" and self.args.world_size == 1
        parts = row_parts(inputs, EVALUATED_TOGETHER) if alone else [inputs]
        results = [self._reduced(model, part, prediction_loss_only) for part in parts]
        if len(results) == 1:
            return None, *results[0]
        reduced, labels = zip(*results, strict=True)
        return None, reduce(nested_concat, reduced), None if labels[0] is None else reduce(nested_concat, labels)

    def _reduced(self, model, inputs, prediction_loss_only: bool) -> tuple:
        inputs = self._prepare_inputs(inputs)
        labels = self.labels_of(dict(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            _, outputs = self.compute_loss(model, dict(inputs), return_outputs=True)
        if not labels and len(self.losses) > 1 and not self.by_task:
            return {name: (self._reduce(name, self.logits_of(outputs, name), None),) for name in self.losses}, None
        if not labels:
            name = inputs["task"] if self.by_task else next(iter(self.losses))
            return (self._reduce(name, self.logits_of(outputs, name), None),), None
        results = {}
        for name, values in labels.items():
            logits = self.logits_of(outputs, name)
            losses = self.losses[name](logits, values, self.args.label_smoothing_factor).view(len(values), -1).sum(1)
            counts = (values != -100).view(len(values), -1).sum(1)
            loss_only = self.user_metrics is None or prediction_loss_only
            reduced = torch.zeros_like(losses) if loss_only else self._reduce(name, logits, values)
            results[name] = (reduced, losses, counts)
        return (results, labels) if len(labels) > 1 else (next(iter(results.values())), next(iter(labels.values())))

    def _reduce(self, name: str, logits: Logits, labels: Tensor | None) -> Any:
        reducer = self.reducers[name]
        return logits if reducer is None else reducer(logits, labels)

    def rows_of(self, predictions: list, labels: list | None) -> tuple:
        """Return predictions, labels and mean loss from the batches of `prediction_step`, in data set order."""
        if isinstance(predictions[0], dict):
            each = [
                self.rows_of([batch[name] for batch in predictions], labels and [batch[name] for batch in labels])
                for name in predictions[0]
            ]
            return tuple(dict(zip(predictions[0], values, strict=True)) for values in zip(*each, strict=True))
        rows = in_dataset_order([batch[0] for batch in predictions], self._order)
        if labels is None:
            return rows, None, None
        losses = np.concatenate([batch[1] for batch in predictions]).sum(dtype=np.float64)
        counts = np.concatenate([batch[2] for batch in predictions]).sum()
        return rows, in_dataset_order(labels, self._order), losses / counts

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the loss and the scores of `compute_metrics`, and `loss_<column>` for several label columns."""
        rows, labels, loss = self.rows_of(*batches_of(prediction))
        metrics = {"loss": loss}
        if isinstance(loss, dict):
            metrics = {"loss": sum(loss.values())} | {f"loss_{name}": value for name, value in loss.items()}
        if self.user_metrics is not None:
            metrics |= self.user_metrics(EvalPrediction(predictions=rows, label_ids=labels), self._evaluated)
        return metrics
