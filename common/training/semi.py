"""Train on unlabelled rows beside the labelled ones: each step takes both, and adds their losses.

The loss of a step is the mean over the labels, plus a weight times the mean over the unlabelled rows of the
cross-entropy of the model and a target. A row counts 0 where no class reaches the threshold of probability.

- `pseudo` (Lee 2013, Pseudo-Label: the simple and efficient semi-supervised learning method): the target is the class
  that a trained teacher predicts.
- `noisy_student` (Xie et al. 2020, arXiv:1911.04252): the target is the probabilities of the teacher; the model reads
  the row with masked tokens and dropout. It becomes the teacher of the next round.
- `fixmatch` (Sohn et al. 2020, arXiv:2001.07685): the target is the class that the model in training predicts for the
  row as it is, without dropout; it learns from the row with masked tokens. The weight grows over the first steps.

Masks follow from seed, epoch and the tokens of a row, so a resumed run is exact.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from common.args import SpeedArguments, TrainingArguments
from common.data.augment.rows import AugmentedRows
from common.data.pool import PoolArguments
from common.errors import InputError, tell, warn
from common.models.load import LoadedModel
from common.speed import apply
from common.training.order import LengthSortedSampler, SeededOrder, StepSampler, row_lengths, share

#: label column of the unlabelled rows, and the entry of a batch with these rows as they are
TARGETS, CLEAN = "unlabeled", "clean"
#: share of the rows of a step that are labelled
LABELED_SHARE = 0.25
#: share of the steps in which the weight of fixmatch grows from 0
RAMP = 0.25
#: threshold if the validation rows have no label to choose it by (Sohn et al. 2020)
UNKNOWN_THRESHOLD = 0.95


@dataclass
class Unlabeled:
    """Unlabelled rows, and how to learn from them.

    Attributes:
        rows: encoded rows with a placeholder in `labels`; -100 where the model needs no label.
        args: the method, and the threshold, weight and noise that the user chose.
        teacher: a trained model whose outputs have `logits`.
        background: the class that most labels have, such as "no entity"; None without one. The threshold is then chosen
            on the labels where the prediction or the gold label is another class.
    """

    rows: Dataset
    args: PoolArguments
    teacher: nn.Module
    background: int | None = None


def trust(wrong: np.ndarray | int, labels: np.ndarray | int, classes: int) -> np.ndarray:
    """Return the weight of labels of which some are wrong: 1 for labels without an error, 0 for guesses.

    It is 1 - e K / (K - 1) for K classes and a share e of wrong labels, estimated as (wrong + 1) / (labels + 2).
    """
    errors = (np.asarray(wrong) + 1) / (np.asarray(labels) + 2)
    return np.clip(1 - errors * classes / (classes - 1), 0, None)


def best_threshold(confidence: np.ndarray, right: np.ndarray, classes: int) -> float:
    """Return the threshold of probability with the most worth, by predictions for labelled rows.

    n labels with weight w (see `trust`) are worth n w^2 correct ones (Angluin and Laird 1988, Learning from noisy
    examples; the rule by which Goldman and Zhou 2000 take labels into co-training).

    Args:
        confidence: largest probability of each prediction, (labels,).
        right: whether the prediction is the gold label, (labels,).
        classes: number of classes.

    Returns:
        The smallest value of `confidence` to keep.
    """
    order = np.argsort(-confidence, kind="stable")
    sizes = np.arange(1, len(order) + 1)
    worth = sizes * trust(np.cumsum(~right[order]), sizes, classes) ** 2
    last = np.append(confidence[order][1:] < confidence[order][:-1], True)  # a threshold cannot separate equal values
    return float(confidence[order][int(np.argmax(np.where(last, worth, -1)))])


class MixedRows(TorchDataset):
    """Concatenate labelled and unlabelled rows; column `TARGETS` says whether a row is unlabelled."""

    def __init__(self, labeled: Dataset | AugmentedRows, unlabeled: Dataset):
        self.labeled, self.unlabeled = labeled, unlabeled
        self.lengths = np.concatenate([row_lengths(rows) for rows in (labeled, unlabeled)])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of augmented rows."""
        if isinstance(self.labeled, AugmentedRows):
            self.labeled.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        first = len(self.labeled)
        return [
            (self.unlabeled[int(number) - first] if number >= first else self.labeled[int(number)])
            | {TARGETS: int(number >= first)}
            for number in numbers
        ]


class MixedBatches(StepSampler):
    """Sample training batches of labelled and unlabelled rows, in an order that follows from `seed` and epoch.

    A step takes `LABELED_SHARE` of its `step_rows` rows from the labelled rows. An epoch takes each row at least once:
    the rows of the smaller part come again, in another order, until the larger part is through.
    """

    def __init__(self, rows: MixedRows, step_rows: int, accumulation: int, processes: int, rank: int, seed: int):
        self.lengths, self.seed = rows.lengths, seed
        self.accumulation, self.processes, self.rank = accumulation, processes, rank
        self.shortest = int(self.lengths.argmin())
        self.parts = np.split(np.arange(len(rows)), [len(rows.labeled)])
        labeled = max(1, round(step_rows * LABELED_SHARE))
        self.sizes = (labeled, max(1, step_rows - labeled))
        self.count = max(-(-len(part) // size) for part, size in zip(self.parts, self.sizes, strict=True))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def steps(self) -> list[np.ndarray]:
        """Return the row numbers of each optimizer step of this epoch, longest row first."""
        random = np.random.default_rng([self.seed, self.epoch])
        columns = []
        for part, size in zip(self.parts, self.sizes, strict=True):
            needed = self.count * size
            passes = [random.permutation(part) for _ in range(-(-needed // len(part)))]
            columns.append(np.concatenate(passes)[:needed].reshape(self.count, size))
        return [rows[np.argsort(-self.lengths[rows], kind="stable")] for rows in np.concatenate(columns, axis=1)]

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            yield from share(rows, self.accumulation * self.processes)[self.rank :: self.processes]

    def __len__(self) -> int:
        """Return the number of batches of one process in an epoch."""
        return self.count * self.accumulation


class Views:
    """Collate rows; of unlabelled ones with masked tokens, and as they are in entry `CLEAN` of the batch.

    A batch of labelled rows only, such as one of an evaluation, is that of the inner collator.

    Args:
        collate: the inner collator; it pads `labels`.
        tokenizer: names the mask token and the special tokens, which are not masked.
        noise: share of the tokens that are masked.
        seed: seed of the masks.
    """

    def __init__(self, collate: Callable, tokenizer: PreTrainedTokenizerBase, noise: float, seed: int):
        self.collate, self.noise, self.seed, self.epoch = collate, noise, seed, 0
        mask = tokenizer.mask_token_id
        self.mask = tokenizer.unk_token_id if mask is None else mask
        if noise and self.mask is None:
            raise InputError("--semi_noise: the tokenizer has neither a mask nor an unknown token; give --semi_noise 0")
        self.special = np.array(tokenizer.all_special_ids)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def noised(self, ids: list[int]) -> list[int]:
        """Return the tokens with some of them masked; their number and the special tokens stay."""
        tokens = np.array(ids)
        random = np.random.default_rng([self.seed, self.epoch, zlib.crc32(tokens.tobytes())])
        masked = (random.random(len(tokens)) < self.noise) & ~np.isin(tokens, self.special)
        return np.where(masked, self.mask, tokens).tolist()

    def __call__(self, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        if TARGETS not in rows[0]:
            return self.collate(rows)
        marks = torch.tensor([row[TARGETS] for row in rows]).bool()
        rows = [{name: value for name, value in row.items() if name != TARGETS} for row in rows]
        views = [
            row | {"input_ids": self.noised(row["input_ids"])} if mark else row
            for row, mark in zip(rows, marks, strict=True)
        ]
        batch = dict(self.collate(views))
        labels = batch["labels"]
        marks = marks.view(-1, *[1] * (labels.dim() - 1))
        batch |= {"labels": labels.masked_fill(marks, -100), TARGETS: labels.masked_fill(~marks, -100)}
        clean = [row for row, mark in zip(rows, marks, strict=True) if mark.any()]
        if clean:
            batch[CLEAN] = {name: value for name, value in self.collate(clean).items() if name != "labels"}
        return batch


def target_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of each label and its target; 0 for a target of zeros.

    Args:
        logits: scores, (rows, ..., classes).
        targets: a share for each class, in the shape of `logits`.
        label_smoothing: not used: targets are predictions.
    """
    return -(targets * F.log_softmax(logits.float(), -1)).sum(-1)


class SemiSupervised(SeededOrder):
    """Train on labelled and unlabelled rows in each step."""

    unlabeled: Unlabeled | None = None
    threshold: float
    weight: float

    def take_unlabeled(self, args: TrainingArguments, unlabeled: Unlabeled | None, **kwargs) -> dict[str, Any]:
        """Return the arguments of the parent that replace the training rows; empty without unlabelled rows."""
        if unlabeled is None:
            return {}
        for name in ("r_drop", "adversarial", "domain_temperature"):
            if getattr(args, name):
                raise InputError(f"--{name}: cannot be combined with --semi; leave one of them out")
        self.unlabeled = unlabeled
        self.losses[TARGETS] = self._target_losses
        noise = unlabeled.args.semi_noise or 0.0
        assert self.tuned.tokenizer is not None
        collator = Views(kwargs["data_collator"], self.tuned.tokenizer, noise, args.seed)
        return {"train_dataset": MixedRows(kwargs["train_dataset"], unlabeled.rows), "data_collator": collator}

    def choose_threshold(self) -> None:
        """Set threshold and weight: those of the arguments, else by the teacher's predictions for validation rows."""
        if self.unlabeled is None:
            return
        args, teacher = self.unlabeled.args, self.unlabeled.teacher
        teacher.eval().to(self.args.device)
        apply(LoadedModel(teacher, self.tuned.tokenizer), SpeedArguments(self.args.speed))
        confidence, right, classes = self._validation_predictions()
        threshold, weight = args.semi_threshold, args.semi_weight
        if threshold is None:
            threshold = best_threshold(confidence, right, classes) if len(right) else UNKNOWN_THRESHOLD
        kept = right[confidence >= threshold]
        if weight is None:
            weight = float(trust((~kept).sum(), len(kept), classes))
        self.threshold, self.weight = threshold, weight
        tell(
            f"unlabelled rows count with weight {weight:.2f} from a probability of {threshold:.2f} on: {len(kept):,} "
            f"of {len(right):,} validation labels reach it, and {kept.sum():,} of these are right"
        )
        if weight == 0:
            warn("--semi: the labels of the teacher are no better than guesses on validation rows; they count 0")

    def _validation_predictions(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Return confidence and correctness of the teacher at each label of the validation rows, and the classes.

        Each process reads all rows, so that all have the same threshold.
        """
        assert self.unlabeled is not None
        background, classes = self.unlabeled.background, 0
        confidences, rights = [], []
        rows, size = self._remove_unused_columns(self.eval_dataset), self.args.per_device_eval_batch_size
        order = LengthSortedSampler(rows).order
        for start in range(0, len(order), size):
            batch = self.data_collator([rows[int(number)] for number in order[start : start + size]])
            batch = self._prepare_inputs(dict(batch))
            labels = batch.pop("labels")
            probabilities = self._probabilities(self.unlabeled.teacher, batch)
            classes = probabilities.shape[-1]
            confidence, best = probabilities.max(-1)
            counted = labels != -100
            if background is not None:
                counted &= (labels != background) | (best != background)
            confidences.append(confidence[counted].cpu().numpy())
            rights.append((best == labels)[counted].cpu().numpy())
        return np.concatenate(confidences), np.concatenate(rights), classes

    @torch.no_grad()
    def _probabilities(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with self.accelerator.autocast():
            return model(**inputs)["logits"].float().softmax(-1)

    def make_batches(self, dataset: Any) -> StepSampler:
        """Return the batch sampler of labelled and unlabelled rows, or of one training set."""
        if isinstance(dataset, MixedRows):
            return MixedBatches(dataset, self.step_rows, **self.cut())
        return super().make_batches(dataset)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Compute the share of a batch in the loss of its step, with targets for its unlabelled rows."""
        if TARGETS in inputs:
            inputs = {**inputs, TARGETS: self.targets(model, inputs)}
            inputs.pop(CLEAN, None)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def targets(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return a share for each class, (rows, ..., classes); zeros where a row is labelled or no class is probable.

        Args:
            model: the model in training, in training mode.
            inputs: a batch of `Views`.
        """
        assert self.unlabeled is not None
        places, method = inputs[TARGETS], self.unlabeled.args.semi
        unlabeled = (places != -100).flatten(1).any(1) if places.dim() > 1 else places != -100
        if CLEAN not in inputs or not unlabeled.any():
            return torch.zeros((*places.shape, 1), device=places.device)
        if method == "fixmatch":
            itself = self.accelerator.unwrap_model(model)  # the wrapper counts passes on several processes
            itself.eval()
            probabilities = self._probabilities(itself, inputs[CLEAN])
            itself.train()
        else:
            probabilities = self._probabilities(self.unlabeled.teacher, inputs[CLEAN])
        confidence, best = probabilities.max(-1, keepdim=True)
        found = probabilities if method == "noisy_student" else torch.zeros_like(probabilities).scatter_(-1, best, 1.0)
        found = found * (confidence >= self.threshold)
        if places.dim() > 1:  # padded on the right, to another length than the whole batch
            found = F.pad(found, (0, 0, 0, places.shape[1] - found.shape[1]))
        targets = torch.zeros((*places.shape, found.shape[-1]), device=places.device)
        targets[unlabeled] = found
        return targets * (places != -100)[..., None]

    def _target_losses(self, logits: Any, targets: Tensor, label_smoothing: float) -> Tensor:
        assert self.unlabeled is not None
        weight = self.weight
        if self.unlabeled.args.semi == "fixmatch":
            weight *= min(1.0, self.state.global_step / max(1, RAMP * self.state.max_steps))
        return weight * target_losses(logits, targets)
