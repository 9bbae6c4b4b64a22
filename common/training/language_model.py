"""Promise: language models compute the head at labels only, and report perplexities."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback

from common.args import TrainingArguments
from common.data.domains import OLD, Select, by_domain
from common.data.stream import TextStream
from common.errors import InputError, tell
from common.speed.head import hits_at_labels, losses_at_labels, scores_of
from common.training.evaluation import batches_of
from common.training.interrupts import HOW_TO_RESUME
from common.training.loss import Logits, Losses
from common.training.order import Repeated, StepBatches, StepSampler, in_dataset_order, step_starts
from common.training.resume import reading
from common.training.trainer import Trainer
from common.tuning import TunedModel


@dataclass
class LanguageArguments(TrainingArguments):
    """Training arguments of language models."""

    lower_is_better: ClassVar[tuple[str, ...]] = ("perplexity",)
    ewc_strength: ClassVar[float] = 100.0  # a row has many labels, and the importance of a weight grows with them

    warmup_steps: float = field(default=0.06, metadata={"help": "warm-up steps; below 1: share of all steps"})
    dropout: float | None = field(
        default=0.0, metadata={"help": "dropout during this run, instead of the rates of the model"}
    )
    batch_ramp_start: int | None = field(
        default=None,
        metadata={"help": "rows of the first step; the batch then grows over --batch_ramp_steps", "resume": "fixed"},
    )
    batch_ramp_steps: int | None = field(
        default=None, metadata={"help": "steps over which the batch grows", "resume": "fixed"}
    )
    loss_chunk: int = field(default=1024, metadata={"help": "labels whose logits are in memory at a time"})
    metric_for_best_model: str | None = field(
        default="loss", metadata={"help": "score that selects the best checkpoint"}
    )
    include_num_input_tokens_seen: str = field(default="non_padding")
    remove_unused_columns: bool = field(default=False)  # the collator takes them

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_chunk < 1:
            raise InputError("--loss_chunk must be at least 1")
        if (self.batch_ramp_start is None) != (self.batch_ramp_steps is None):
            raise InputError("--batch_ramp_start and --batch_ramp_steps: give both or neither")
        if self.batch_ramp_start is None or self.batch_ramp_steps is None:
            return
        batches = self.gradient_accumulation_steps * self.world_size
        full = self.per_device_train_batch_size * batches
        if not batches <= self.batch_ramp_start < full:
            raise InputError(
                f"--batch_ramp_start {self.batch_ramp_start}: must be at least {batches} (processes times accumulation)"
                f" and below {full}, the rows of a full step"
            )
        if self.batch_ramp_steps < 1:
            raise InputError("--batch_ramp_steps must be at least 1")
        if self.auto_find_batch_size:
            raise InputError("--auto_find_batch_size: does not work with --batch_ramp_start; give a smaller batch")

    @property
    def ramp(self) -> tuple[int, int] | None:
        """Return rows of the first step and steps of growth; None without growth."""
        if self.batch_ramp_start is None or self.batch_ramp_steps is None:
            return None
        return self.batch_ramp_start, self.batch_ramp_steps


class SeekStream(TrainerCallback):
    """Move a stream to the position that a checkpoint saved."""

    def __init__(self, stream: TextStream, trainer: Trainer):
        self.stream, self.trainer = stream, trainer

    def on_train_begin(self, args, state, control, **kwargs):
        with reading(str(self.trainer.resumed_from)):
            self.stream.go_to(self.trainer.resumed_from)


class LanguageTrainer(Trainer):
    """Train language models, with the head computed at labels only.

    Batches have `labels`. If a row is cut into pieces, the pieces are rows of the batch, and `owner` (pieces,) holds
    the row of each piece. Scores cover the rows of the data set: `loss`, `perplexity` (the exponential of the loss) and
    `accuracy` (the share of labels with the highest score).

    `losses` has the loss of `labels`, `losses_at_labels`, and may have losses of further label columns. For each
    further column `preprocess_logits_for_metrics` has a function that counts the hits of each row, for the score
    `<column>_accuracy`. `loss` and `perplexity` cover `labels` only.

    A run on a `TextStream`, or with a growing batch, is one epoch with consecutive row numbers.
    """

    args: LanguageArguments

    def __init__(
        self,
        model: TunedModel,
        args: LanguageArguments,
        *,
        train_dataset: Dataset | TextStream,
        losses: Losses | dict[str, Losses],
        preprocess_logits_for_metrics: dict[str, Callable] | None = None,
        **kwargs,
    ):
        if args.ramp is not None and isinstance(train_dataset, Dataset):
            if OLD in train_dataset.column_names or args.domain_temperature is not None:
                raise InputError(
                    "--batch_ramp_start: takes each row equally often; leave --replay_file and --domain_temperature out"
                )
            rows = len(train_dataset) * args.num_train_epochs
            train_dataset = Repeated(train_dataset, args.seed if args.data_seed is None else args.data_seed)
        if not isinstance(train_dataset, Dataset):
            self._one_epoch(args, rows if isinstance(train_dataset, Repeated) else 0)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            losses=losses,
            preprocess_logits_for_metrics={"labels": hits_at_labels} | (preprocess_logits_for_metrics or {}),
            compute_metrics=self._accuracy,
            **kwargs,
        )
        if isinstance(train_dataset, TextStream):
            self.add_callback(SeekStream(train_dataset, self))

    @staticmethod
    def _one_epoch(args: LanguageArguments, rows: float) -> None:
        """Replace epochs by steps in the arguments; the default of `--max_steps` covers `rows` rows."""
        if args.max_steps < 1:
            full = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            bound = math.ceil(rows / full) + args.batch_ramp_steps
            starts = step_starts(bound, full, args.ramp)
            args.max_steps = int(np.searchsorted(starts, rows))
        args.dataloader_num_workers = 0  # a stream has its own workers, and rows in memory need none
        args.dataloader_prefetch_factor, args.dataloader_persistent_workers = None, False
        changed = []
        for name in ("eval", "save"):
            if getattr(args, f"{name}_strategy") == "epoch":
                setattr(args, f"{name}_strategy", type(getattr(args, f"{name}_strategy"))("steps"))
                changed.append(f"--{name}_strategy")
        if "--eval_strategy" in changed and args.eval_steps is None:
            args.eval_steps = args.save_steps
        if changed:
            tell(f"{' and '.join(changed)}: every {args.save_steps:g} steps, because the run is one epoch")

    def make_batches(self, dataset: Dataset | TextStream | Repeated) -> StepSampler:
        """Return the batch sampler: `StepBatches` for a stream or a growing batch."""
        if isinstance(dataset, Dataset):
            return super().make_batches(dataset)
        cut = self.cut()
        del cut["seed"]
        batches = StepBatches(self.args.max_steps, self.step_rows, self.args.ramp, **cut)
        dataset.rows = int(batches.starts[-1])
        if isinstance(dataset, TextStream):
            dataset.ahead = 3 * self.step_rows
        return batches

    def save_beside(self, folder: Path) -> None:
        """Save the position of a stream."""
        if isinstance(self.train_dataset, TextStream):
            assert isinstance(self.train_batches, StepBatches)  # of `make_batches`
            self.train_dataset.save(str(folder), int(self.train_batches.starts[self.state.global_step]))

    def get_batch_samples(self, *args, **kwargs):
        """Return the batches of a step; save a checkpoint if a stream fails."""
        try:
            return super().get_batch_samples(*args, **kwargs)
        except InputError as error:  # from a stream, between two steps
            if self.args.world_size == 1 and self.state.global_step > 0:
                self.save_now()
            kept = (
                f"{Path(self.last_whole).name} is complete; correct the texts, then {HOW_TO_RESUME}"
                if self.last_whole
                else ""
            )
            raise InputError(*str(error).split("\n"), *([kept] if kept else [])) from None

    def train(self, *args, **kwargs):
        """Train as the parent does, then close a stream."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if isinstance(self.train_dataset, TextStream):
                self.train_dataset.close()

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Compute loss and gradient of a batch; afterwards its `attention_mask` is 1 at every token but padding."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if "real" in inputs:  # the training loop counts the tokens of a batch by `attention_mask` next
            inputs["attention_mask"] = inputs.pop("real")
        return loss

    def logits_of(self, outputs, name: str) -> Logits:
        """Return the scores of the vocabulary for `labels`; all outputs for another column."""
        if name == "labels":
            return scores_of(outputs)
        return tuple(value for key, value in outputs.items() if key != "loss")

    @property
    def _needs_scores(self) -> bool:
        """Return whether the loss needs the scores of the vocabulary."""
        return self.losses["labels"] is not losses_at_labels or self.args.keep == "lwf"

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Compute the loss of a batch as the parent does, with the head at labels only."""
        inputs.pop("owner", None)
        inputs.pop("real", None)
        with self.speed.at_labels(inputs["labels"], self.args.label_smoothing_factor, self._needs_scores):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Sum hits, losses and label counts over the pieces of a row; return label counts as labels."""
        owner = inputs.get("owner")
        _, reduced, _ = super().prediction_step(model, inputs, False, ignore_keys)
        if isinstance(reduced, dict):
            return None, reduced, {name: counts[:, None] for name, (_, _, counts) in reduced.items()}
        hits, losses, counts = reduced
        if owner is not None:
            owner = owner.to(losses.device)
            rows = int(owner[-1]) + 1
            hits, losses, counts = (x.new_zeros(rows).index_add_(0, owner, x) for x in (hits, losses, counts))
        return None, (hits, losses, counts), counts[:, None]

    def scores(self, splits: DatasetDict, when: str) -> dict[str, float]:
        """Return loss, perplexity and accuracy of each split except train, named `<when>_<split>_<score>`."""
        scores: dict[str, float] = {}
        for split in splits:
            if split != "train":
                name = f"{when}_{split}"
                scores |= self.predict(splits[split], metric_key_prefix=name).metrics or {}
        return {k: v for k, v in scores.items() if k.endswith(("_loss", "_perplexity", "_accuracy"))}

    @staticmethod
    def _accuracy(prediction: EvalPrediction, dataset: Dataset) -> dict[str, float]:
        hits: Any = prediction.predictions
        counts: Any = prediction.label_ids
        if not isinstance(hits, dict):
            hits, counts = {"labels": hits}, {"labels": counts}
        return {
            "accuracy" if name == "labels" else f"{name}_accuracy": float(
                np.sum(hits[name]) / np.sum(np.concatenate(counts[name]))
            )
            for name in hits
        }

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the scores of the parent; loss and perplexity cover `labels` only.

        Rows with a domain also have perplexity and accuracy by domain.
        """
        metrics = super().score(prediction)
        metrics["loss"] = metrics.get("loss_labels", metrics["loss"])
        of_labels = [batch["labels"] if isinstance(batch, dict) else batch for batch in batches_of(prediction)[0]]
        hits, losses, counts = (
            np.array(in_dataset_order(list(parts), self._order), dtype=np.float64)
            for parts in zip(*of_labels, strict=True)
        )

        def score(select: Select) -> dict[str, float]:
            labels = select(counts).sum()
            return {
                "perplexity": perplexity(select(losses).sum() / labels),
                "accuracy": float(select(hits).sum() / labels),
            }

        names = ("perplexity", "accuracy")
        return (
            by_domain(self._evaluated, score, self.args, names) | metrics | {"perplexity": perplexity(metrics["loss"])}
        )


def perplexity(loss: float) -> float:
    """Return the exponential of a loss; infinite if it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
