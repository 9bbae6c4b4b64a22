"""The Trainer of transformers with the promises its users take for granted. No fork: hooks and a sampler.

- Loss: an optimizer step's loss is the mean over all its labels, however they are spread over accumulated batches and
  processes. (The stock Trainer multiplies gradient and loss by the number of accumulated batches, or of processes, for
  most heads: https://github.com/huggingface/transformers/issues/47688.) `eval_loss` is the mean over all labels too.
- Order: seed and epoch alone decide which rows an optimizer step takes. `evaluate` and `predict` sort rows by length,
  but give predictions and labels back in data set order, as a list of one array a row.
- Memory: `preprocess_logits_for_metrics` reduces the logits of each batch on the device, and rows of different length
  are never padded together.
- Counting: on several processes each row is evaluated once.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import EarlyStoppingCallback, EvalPrediction, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from common.batching import LengthSortedSampler, TrainingBatches, in_dataset_order, row_lengths
from common.cpu import leaves_out_padding
from common.errors import InputError


def label_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each label; 0 where the label is -100.

    `logits` has shape (rows, ..., classes) and `labels` (rows, ...); the result has the shape of `labels`.
    """
    flat = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return flat.view(labels.shape)


class Progress(ProgressCallback):
    """The progress bar of transformers with the losses and the deciding score only, not every metric."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        best = args.metric_for_best_model or "loss"
        shown = {"loss", "grad_norm", "learning_rate", "eval_loss", f"eval_{best.removeprefix('eval_')}", "epoch"}
        super().on_log(args, state, control, logs={k: v for k, v in logs.items() if k in shown}, **kwargs)


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for models with classes over labels, with the promises of this module.

    Takes what its parent takes, with two differences. `compute_metrics(prediction, dataset)` also gets the data set
    that was evaluated, with all its columns; `prediction.predictions` and `.label_ids` are lists of one array a row, in
    the order of that data set. `preprocess_logits_for_metrics(logits, labels)` runs on the device, batch by batch.
    """

    def __init__(
        self,
        *args,
        compute_metrics: Callable[[EvalPrediction, Dataset], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs,
    ):
        super().__init__(*args, compute_metrics=self._metrics, compute_loss_func=self._loss, **kwargs)
        self.args.eval_do_concat_batches = False  # lists of batches: joining them pads all rows to the longest
        if self.args.train_sampling_strategy == "auto":
            self.args.train_sampling_strategy = "random" if leaves_out_padding(self.model) else "group_by_length"
        self._user_metrics = compute_metrics
        self._reduce = preprocess_logits_for_metrics
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    # Loss

    def _loss(self, outputs, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        losses = label_losses(outputs.logits, labels, self.args.label_smoothing_factor)
        return losses.sum() / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    # Batches

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        accumulation, processes = self.args.gradient_accumulation_steps, self.args.world_size
        self._train_batches = TrainingBatches(
            row_lengths(dataset),
            step_rows=self._train_batch_size * accumulation * processes,
            accumulation=accumulation,
            processes=processes,
            rank=self.args.process_index,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            by_length=self.args.train_sampling_strategy == "group_by_length",
        )
        return self._train_batches

    def _run_epoch(self, *args, epoch: int, **kwargs):
        # accelerate loses `set_epoch` behind the wrappers of several processes or of a resumed epoch
        if self.args.train_sampling_strategy in ("random", "group_by_length"):
            self._train_batches.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    # Evaluation

    def _get_eval_sampler(self, eval_dataset: Dataset) -> LengthSortedSampler:
        return LengthSortedSampler(eval_dataset)

    def _get_dataloader(self, dataset: Dataset, *args, **kwargs):
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        loader.full_dataset = dataset  # the loader's own has lost the columns that the model does not take
        return loader

    def evaluation_loop(self, dataloader, *args, **kwargs) -> EvalLoopOutput:
        self._evaluated = dataloader.full_dataset
        self._order = LengthSortedSampler(self._evaluated).order
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.pop(f"{prefix}_model_preparation_time", None)
        predictions, labels, _ = self._rows(output.predictions, output.label_ids)
        return output._replace(predictions=predictions, label_ids=labels)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Reduces a batch on the device to (predictions, summed loss of each row, labels of each row), and labels."""
        _, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        if labels is None:
            return None, (logits if self._reduce is None else self._reduce(logits, labels),), None
        losses = label_losses(logits, labels, self.args.label_smoothing_factor).view(len(labels), -1).sum(1)
        counts = (labels != -100).view(len(labels), -1).sum(1)
        if self._user_metrics is None or prediction_loss_only:
            reduced = torch.zeros_like(losses)
        else:
            reduced = logits if self._reduce is None else self._reduce(logits, labels)
        return None, (reduced, losses, counts), labels

    def _rows(self, predictions: list[tuple], labels: list[np.ndarray] | None) -> tuple:
        """Predictions, labels and mean loss from the batches that `prediction_step` made; rows in data set order."""
        rows = in_dataset_order([batch[0] for batch in predictions], self._order)
        if labels is None:
            return rows, None, None
        losses = np.concatenate([batch[1] for batch in predictions]).sum(dtype=np.float64)
        counts = np.concatenate([batch[2] for batch in predictions]).sum()
        return rows, in_dataset_order(labels, self._order), losses / counts

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        rows, labels, loss = self._rows(prediction.predictions, prediction.label_ids)
        metrics = {"loss": loss}
        if self._user_metrics is not None:
            metrics |= self._user_metrics(EvalPrediction(predictions=rows, label_ids=labels), self._evaluated)
        return metrics

    # Saving

    def init_hf_repo(self, *args, **kwargs) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except (OSError, ValueError) as error:  # no network, not logged in, or no right to write there
            raise InputError(f"--push_to_hub: {' '.join(str(error).split())}; log in first by: hf auth login") from None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / transformers.trainer.TRAINING_ARGS_NAME).unlink()  # a pickle; run.json has the arguments
            umask = os.umask(0)
            os.umask(umask)
            for file in folder.glob("*.safetensors"):
                file.chmod(0o666 & ~umask)  # safetensors leaves 0600, which no colleague can read

    def create_model_card(self, *args, **kwargs) -> None:
        """Drafts a card as the stock Trainer does before a push to the hub, unless the recipe wrote one."""
        if not Path(self.args.output_dir, "README.md").exists():
            super().create_model_card(*args, **kwargs)
