"""Training of language models: the head only where there is a label, and perplexities."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import EvalPrediction
from transformers.utils import ModelOutput

from common.args import TrainingArguments
from common.data.stream import TextStream
from common.errors import InputError, tell
from common.speed.head import hits_at_labels, losses_at_labels, scores_of
from common.training.interrupts import HOW_TO_GO_ON
from common.training.order import Repeated, StepBatches, step_starts
from common.training.trainer import Trainer, reading
from common.tuning import TunedModel


@dataclass
class LanguageArguments(TrainingArguments):
    """Training of language models."""

    lower_is_better: ClassVar[tuple[str, ...]] = ("perplexity",)

    warmup_steps: float = field(default=0.06, metadata={"help": "steps, or below 1 the share of all steps"})
    dropout: float | None = field(default=0.0, metadata={"help": "in place of the model's, in this run only"})
    batch_ramp_start: int | None = field(
        default=None,
        metadata={"help": "rows of the first step; grows to the batch over --batch_ramp_steps", "resume": "fixed"},
    )
    batch_ramp_steps: int | None = field(
        default=None, metadata={"help": "steps over which the batch grows", "resume": "fixed"}
    )
    loss_chunk: int = field(default=1024, metadata={"help": "tokens whose scores of the vocabulary exist at a time"})
    metric_for_best_model: str | None = field(default="loss", metadata={"help": "score that picks the best checkpoint"})
    include_num_input_tokens_seen: str = field(default="non_padding")
    remove_unused_columns: bool = field(default=False)  # the collator takes them

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_chunk < 1:
            raise InputError("--loss_chunk must be at least 1")
        if (self.batch_ramp_start is None) != (self.batch_ramp_steps is None):
            raise InputError("--batch_ramp_start and --batch_ramp_steps: give both, or none")
        if self.batch_ramp_start is None:
            return
        batches = self.gradient_accumulation_steps * self.world_size
        full = self.per_device_train_batch_size * batches
        if not batches <= self.batch_ramp_start < full:
            raise InputError(
                f"--batch_ramp_start {self.batch_ramp_start}: needed: at least {batches} (processes times accumulation)"
                f" and fewer than {full}, the rows of a whole step"
            )
        if self.batch_ramp_steps < 1:
            raise InputError("--batch_ramp_steps must be at least 1")
        if self.auto_find_batch_size:
            raise InputError("--auto_find_batch_size: not with --batch_ramp_start; give a smaller batch")

    @property
    def ramp(self) -> tuple[int, int] | None:
        return None if self.batch_ramp_start is None else (self.batch_ramp_start, self.batch_ramp_steps)


class LanguageTrainer(Trainer):
    """`Trainer` for language models: the head computes where there are labels; a row may be several rows of a batch.

    Batches have `labels`, and `owner` where pieces of a row are rows of the batch: the row that each is from, of shape
    (pieces,). Scores are of the rows of the data set: `loss`, `perplexity` (its exponential) and `accuracy`, the share
    of labels that have the highest score.

    With a `TextStream` to train on, or a batch that grows, the run is one epoch, and its rows are numbered through.
    """

    def __init__(self, model: TunedModel, args: LanguageArguments, *, train_dataset: Dataset | TextStream, **kwargs):
        if args.ramp is not None and isinstance(train_dataset, Dataset):
            rows = len(train_dataset) * args.num_train_epochs
            train_dataset = Repeated(train_dataset, args.seed if args.data_seed is None else args.data_seed)
        if not isinstance(train_dataset, Dataset):
            self._one_epoch(args, rows if isinstance(train_dataset, Repeated) else 0)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            losses=kwargs.pop("losses", losses_at_labels),
            preprocess_logits_for_metrics=hits_at_labels,
            compute_metrics=self._accuracy,
            **kwargs,
        )
        self.label_names = ["labels"]  # whatever else the model's own loss would take
        self._loss_shifts_labels = False  # each label stands where it is predicted

    @staticmethod
    def _one_epoch(args: LanguageArguments, rows: float) -> None:
        """Count by steps what would be counted by epochs; without `--max_steps` as many as take `rows` rows."""
        if args.max_steps < 1:
            full = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            bound = math.ceil(rows / full) + args.batch_ramp_steps
            starts = step_starts(bound, full, args.ramp, args.world_size)
            args.max_steps = int(np.searchsorted(starts, rows))
        args.dataloader_num_workers = 0  # a stream has its own, and rows in memory need none
        args.dataloader_prefetch_factor, args.dataloader_persistent_workers = None, False
        changed = []
        for name in ("eval", "save"):
            if getattr(args, f"{name}_strategy") == "epoch":
                setattr(args, f"{name}_strategy", type(getattr(args, f"{name}_strategy"))("steps"))
                changed.append(f"--{name}_strategy")
        if "--eval_strategy" in changed and args.eval_steps is None:
            args.eval_steps = args.save_steps
        if changed:
            tell(f"{' and '.join(changed)}: the run is one epoch, so every {args.save_steps:g} steps instead")

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        rows = self.train_dataset
        if isinstance(rows, Dataset):
            return super()._get_train_sampler(train_dataset)
        self._train_batches = StepBatches(
            self.args.max_steps,
            self._step_rows,
            self.args.ramp,
            self.args.gradient_accumulation_steps,
            self.args.world_size,
            self.args.process_index,
        )
        rows.rows = int(self._train_batches.starts[-1])
        if isinstance(rows, TextStream):
            rows.ahead = 3 * self._step_rows
        return self._train_batches

    def _init_training_state(self, *args) -> tuple[int, int]:
        *_, checkpoint, _ = args
        if isinstance(self.train_dataset, TextStream):
            with reading(str(checkpoint)):
                self.train_dataset.go_to(checkpoint)
        return super()._init_training_state(*args)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, TextStream):
            self.train_dataset.save(output_dir, int(self._train_batches.starts[self.state.global_step]))

    def get_batch_samples(self, *args, **kwargs):
        try:
            return super().get_batch_samples(*args, **kwargs)
        except InputError as error:  # of a stream, after the last step and before the next
            step = self.state.global_step
            if self.args.world_size == 1 and step > 0 and self._saved_step != step:
                self._save_checkpoint(self.model_wrapped, None)
            kept = f"{Path(self._last_whole).name} is whole; mend it, then {HOW_TO_GO_ON}" if self._last_whole else ""
            raise InputError(*str(error).split("\n"), *([kept] if kept else [])) from None

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if isinstance(self.train_dataset, TextStream):
                self.train_dataset.close()

    def _track_num_input_tokens(self, inputs) -> None:
        super()._track_num_input_tokens(inputs | {"attention_mask": inputs.get("real", inputs["attention_mask"])})

    def _logits(self, outputs: ModelOutput) -> Tensor:
        return scores_of(outputs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs.pop("owner", None)
        inputs.pop("real", None)
        with self.speed.at_labels(inputs["labels"], self.args.label_smoothing_factor):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Sums what the trainer keeps of each piece over the pieces of a row; the labels become their number."""
        owner = inputs.get("owner")
        _, (hits, losses, counts), _ = super().prediction_step(model, inputs, False, ignore_keys)
        if owner is not None:
            owner = owner.to(losses.device)
            rows = int(owner[-1]) + 1
            hits, losses, counts = (x.new_zeros(rows).index_add_(0, owner, x) for x in (hits, losses, counts))
        return None, (hits, losses, counts), counts[:, None]

    def scores(self, splits: DatasetDict, when: str) -> dict[str, float]:
        """Loss, perplexity and accuracy of each split but train, as `when_split_score`."""
        found = {}
        for split in splits:
            if split != "train":
                name = f"{when}_{split}"
                found |= self.predict(splits[split], metric_key_prefix=name).metrics
        return {k: v for k, v in found.items() if k.endswith(("_loss", "_perplexity", "_accuracy"))}

    @staticmethod
    def _accuracy(prediction: EvalPrediction, dataset: Dataset) -> dict[str, float]:
        return {"accuracy": float(np.sum(prediction.predictions) / np.sum(np.concatenate(prediction.label_ids)))}

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = super()._metrics(prediction)
        return metrics | {"perplexity": perplexity(metrics["loss"])}


def perplexity(loss: float) -> float:
    """The exponential of a loss, infinite where that is too large for a number."""
    return math.exp(loss) if loss < 700 else math.inf
