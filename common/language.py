"""Training of language models: the head only where there is a label, and perplexities."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import EvalPrediction, PreTrainedModel
from transformers.utils import ModelOutput

from common.args import TrainingArguments
from common.batching import Repeated, StepBatches, step_starts
from common.cpu import head_losses
from common.errors import InputError, is_main_process, tell
from common.faults import HOW_TO_GO_ON
from common.report import print_table
from common.stream import TextStream
from common.trainer import Trainer, reading
from common.unpadded import PackedBatch, compute_chosen_only, leaves_out_padding

WHEN = ("before", "after")


class Selection:
    """Lets the head of a model see only the vectors at chosen positions: its cost falls with their number.

    It takes them from what the encoder gives out, and knows no model by name. `works` tells whether, on a test batch,
    the head then gives the scores that it gives at these positions of a whole batch. Where it does not, as with a head
    that looks at neighbours, nothing is changed.

    With `chunk` the last layer, which scores the vocabulary, also takes only so many vectors at a time, and gives their
    losses instead of their scores: those of more vectors never exist at once, neither on the way forth nor back.
    `chunked` tells whether that works.
    """

    def __init__(self, model: PreTrainedModel, chunk: int | None = None):
        self.positions: Tensor | None = None
        self.labels: Tensor | None = None
        self.chunk, self.label_smoothing = chunk, 0.0
        self.works = self.chunked = self._taken = False
        if model.base_model is not model:
            hook = model.base_model.register_forward_hook(self._select)
            self.works = self._gives_the_same(model)
            if not self.works:
                hook.remove()
        if self.works and leaves_out_padding(model):
            self._begin_in_the_last_layer(model)
        if chunk and self.works and model.get_output_embeddings() is not None:
            self._head = model.get_output_embeddings()
            self._scores = self._head.forward
            self._head.forward = self._losses
            self.chunked = self._gives_the_same(model)
            if not self.chunked:
                self._head.forward = self._scores

    def make_way(self, model: nn.Module) -> None:
        """Give up `chunked` where tuning has put a layer of its own around the last one of `model`, or in its place."""
        if self.chunked and model.get_output_embeddings() is not self._head:
            tell("the layer that scores the vocabulary is tuned as well: the scores of a whole batch exist at once")
            self._head.forward = self._scores
            self.chunked = False

    @contextmanager
    def at(self, labels: Tensor, scores: bool = False) -> Iterator[None]:
        """Within it the head sees the n vectors where `labels` (rows, length) is not -100.

        It gives scores (1, n, classes), or if `chunked` and no `scores` are asked for, losses and hits (1, n, 2); hits
        are 0 or 1, and 0 in a training on a CPU, which needs none.
        """
        chosen = labels != -100
        self.positions = chosen.flatten().nonzero()[:, 0] if self.works else None
        self.labels = labels[chosen] if self.chunked and not scores else None
        try:
            yield
        finally:
            self.positions = self.labels = None

    def _select(self, module: nn.Module, args: tuple, output):
        if self.positions is None:
            return output
        picked = output[0].flatten(0, 1)
        if not self._taken:
            picked = picked.index_select(0, self.positions)
        self._taken, picked = False, picked[None]
        if isinstance(output, tuple):
            return (picked, *output[1:])
        output[next(iter(output))] = picked
        return output

    def _begin_in_the_last_layer(self, model: PreTrainedModel) -> None:
        """Let the last layer compute chosen positions only as well, where nothing else of the output changes."""
        ids = torch.randint(0, model.config.vocab_size, (3, 13), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(13) < torch.tensor([[5], [13], [7]])).long()}

        def run() -> list[Tensor]:
            with self.at(ids.masked_fill(inputs["attention_mask"] * ids % 3 != 1, -100)):
                return [value for value in model(**inputs).values() if isinstance(value, Tensor)]

        compute_chosen_only(model, self._places, run)

    def _places(self, batch: PackedBatch) -> Tensor | None:
        if self.positions is None or batch.causal:  # a decoder has labels nearly everywhere
            return None
        self._taken = True
        return batch.packed_of_padded[self.positions]

    def _losses(self, vectors: Tensor) -> Tensor:
        if self.labels is None:
            return self._scores(vectors)
        vectors, labels = vectors[0].split(self.chunk), self.labels.split(self.chunk)
        if len(labels) == 1:  # all exist at once anyway
            return self._part(vectors[0], labels[0])[None]
        parts = zip(vectors, labels, strict=True)
        return torch.cat([checkpoint(self._part, *part, use_reentrant=False) for part in parts])[None]

    def _part(self, vectors: Tensor, labels: Tensor) -> Tensor:
        if torch.is_grad_enabled() and vectors.device.type == "cpu" and type(self._head) is nn.Linear:
            losses = head_losses(self._head, vectors, labels, self.label_smoothing)
            return torch.stack([losses, torch.zeros_like(losses)], 1)
        scores = self._scores(vectors).float()
        losses = F.cross_entropy(scores, labels, reduction="none", label_smoothing=self.label_smoothing)
        return torch.stack([losses, (scores.argmax(-1) == labels).float()], 1)

    def _gives_the_same(self, model: PreTrainedModel) -> bool:
        random = torch.Generator().manual_seed(0)
        ids, labels = (torch.randint(0, model.config.vocab_size, (3, 13), generator=random) for _ in range(2))
        chosen = torch.zeros(3, 13, dtype=torch.bool)
        chosen[[0, 0, 1, 2, 2], [1, 12, 5, 0, 7]] = True
        labels = labels.masked_fill(~chosen, -100)
        ids, labels, chosen = (x.to(model.device) for x in (ids, labels, chosen))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        training, trying_chunks = model.training, self.works
        model.eval()
        try:
            with torch.no_grad():
                expected = scores_of(model(**inputs))[chosen]
                self.works, self.chunked = True, trying_chunks
                with self.at(labels):
                    found = scores_of(model(**inputs))[0]
            if trying_chunks:
                expected = F.cross_entropy(expected.float(), labels[chosen], reduction="none")
                found = found[:, 0]
            return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        except Exception:  # whatever it is, this architecture cannot
            return False
        finally:
            self.works, self.chunked = trying_chunks, False
            model.train(training)


def scores_of(output) -> Tensor:
    """The scores of the vocabulary in the output of a model."""
    return output.prediction_logits if "prediction_logits" in output else output.logits


def losses_at_labels(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each label, in the shape of `labels` (rows, length); 0 where the label is -100.

    `logits` are those of all positions, (rows, length, classes), or those of the labels one after the other,
    (1, labels, classes).
    """
    at = labels != -100
    if logits.shape[:-1] == labels.shape:
        logits = logits[at]
    losses = F.cross_entropy(
        logits.float().flatten(0, -2), labels[at], reduction="none", label_smoothing=label_smoothing
    )
    return torch.zeros(labels.shape, dtype=losses.dtype, device=losses.device).masked_scatter(at, losses)


def hits_at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels of each row have the highest score; shape (rows,). Arguments as for `losses_at_labels`."""
    at = labels != -100
    if logits.shape[:-1] == labels.shape:
        logits = logits[at]
    right = (logits.flatten(0, -2).argmax(-1) == labels[at]).long()
    return torch.zeros(labels.shape, dtype=torch.int64, device=right.device).masked_scatter(at, right).sum(1)


def chunked_losses(found: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """As `losses_at_labels`, from what a chunked `Selection` gives."""
    losses = torch.zeros(labels.shape, dtype=found.dtype, device=found.device)
    return losses.masked_scatter(labels != -100, found[0, :, 0])


def chunked_hits(found: Tensor, labels: Tensor) -> Tensor:
    """As `hits_at_labels`, from what a chunked `Selection` gives."""
    hits = torch.zeros(labels.shape, dtype=torch.int64, device=found.device)
    return hits.masked_scatter(labels != -100, found[0, :, 1].long()).sum(1)


@dataclass
class LanguageArguments(TrainingArguments):
    """Training of language models."""

    warmup_steps: float = field(default=0.06, metadata={"help": "steps, or below 1 the share of all steps"})
    dropout: float | None = field(default=0.0, metadata={"help": "in place of the model's, in this run only"})
    batch_ramp_start: int | None = field(
        default=None, metadata={"help": "rows of the first step; grows to the batch over --batch_ramp_steps"}
    )
    batch_ramp_steps: int | None = field(default=None, metadata={"help": "steps over which the batch grows"})
    metric_for_best_model: str | None = field(default="loss", metadata={"help": "score that picks the best checkpoint"})
    include_num_input_tokens_seen: str = field(default="non_padding")
    remove_unused_columns: bool = field(default=False)  # the collator takes them

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def __init__(self, *, args: LanguageArguments, train_dataset: Dataset | TextStream, selection: Selection, **kwargs):
        selection.make_way(kwargs["model"])
        chunked = selection.chunked
        if args.ramp is not None and isinstance(train_dataset, Dataset):
            rows = len(train_dataset) * args.num_train_epochs
            train_dataset = Repeated(train_dataset, args.seed if args.data_seed is None else args.data_seed)
        if not isinstance(train_dataset, Dataset):
            self._one_epoch(args, rows if isinstance(train_dataset, Repeated) else 0)
        super().__init__(
            args=args,
            train_dataset=train_dataset,
            losses=chunked_losses if chunked else losses_at_labels,
            preprocess_logits_for_metrics=chunked_hits if chunked else hits_at_labels,
            compute_metrics=self._accuracy,
            **kwargs,
        )
        self.selection = selection
        selection.label_smoothing = self.args.label_smoothing_factor
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
        with self.selection.at(inputs["labels"]):
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


def print_perplexities(metrics: dict[str, float]) -> None:
    """A table of what `LanguageTrainer.scores` found before and after training."""
    splits = [
        k.removeprefix("before_").removesuffix("_perplexity") for k in metrics if re.match("before_.*perplexity", k)
    ]
    rows = [
        [split, *(metrics[f"{when}_{split}_{name}"] for name in ("perplexity", "accuracy") for when in WHEN)]
        for split in splits
    ]
    tell("")
    print_table(["texts", "perplexity before", "after", "accuracy before", "after"], rows)


def perplexity(loss: float) -> float:
    """The exponential of a loss, infinite where that is too large for a number."""
    return math.exp(loss) if loss < 700 else math.inf


def draw_curve(path: str | Path, history: list[dict], before: float) -> None:
    """A picture of the losses against the sub-tokens seen; `history` is the trainer's log, `before` the first loss."""
    if not is_main_process():
        return
    from matplotlib.figure import Figure  # only here: what does not draw is spared its time and memory

    figure = Figure(figsize=(6.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, start in (("loss", "training", []), ("eval_loss", "validation", [(0, before)])):
        points = start + [(entry["num_input_tokens_seen"] / 1e6, entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="sub-tokens seen (millions)", ylabel="loss (nats a label)")
    axes.legend()
    figure.savefig(path, dpi=120)
