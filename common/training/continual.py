"""Learn a new task or domain without forgetting the one before, under `--after MODEL --keep METHOD`.

- `ewc` (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796): pull each weight toward its value in MODEL, as
  strongly as the old rows need it. `regularisation.PullToPretrained` adds the gradient. The Fisher information of
  several earlier tasks is added up, and the pull is toward the last model (online EWC, Schwarz et al. 2018,
  https://arxiv.org/abs/1805.06370, with gamma 1).
- `lwf` (Li and Hoiem 2016, https://arxiv.org/abs/1606.09282): learn the outputs of MODEL for the new rows too.
- `replay`: train on some old rows in each epoch (`draws`).

`fisher_information` is computed on the initial weights, and the outputs of MODEL come from a frozen copy: a resumed run
has the same.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.args import FISHER, SpeedArguments, TrainingArguments
from common.data.augment.rows import AugmentedRows
from common.data.domains import OLD
from common.errors import InputError, is_main_process, tell
from common.inference.predictor import load_saved
from common.models.load import LoadedModel, load_config, resolve_model
from common.models.structure import input_embeddings, transformer_of
from common.speed import apply
from common.training.collator import EpochSeeded
from common.training.draws import of_windows
from common.training.order import SeededOrder
from common.training.regularisation import Logits, Regularised
from common.tuning.methods import METHODS
from common.tuning.tune import is_beside

#: most rows whose gradients give the Fisher information
FISHER_ROWS = 1000


# Learning without forgetting


def distillation(new: Logits, old: Logits, labels: Tensor, temperature: float) -> Tensor:
    """Compute the cross-entropy of the old and the new probabilities, summed over the labels that are not -100.

    The probabilities are softmax(logits / temperature) (Li and Hoiem 2016, equations 2 and 3).

    Args:
        new: logits of the model in training: shape (rows, ..., classes), or (1, labels, classes) at the labels that are
            not -100; the shape of `labels` for independent binary labels; or a tuple with (rows, classes) for each
            column of `labels`.
        old: logits of the old model, at all positions.
        labels: shape (rows, ...).
        temperature: divides the logits.
    """
    if isinstance(new, tuple):
        pairs = zip(new, old, labels.unbind(-1), strict=True)
        return torch.stack([distillation(a, b, of, temperature) for a, b, of in pairs]).sum()
    old = cast(Tensor, old)
    if old.shape == labels.shape:  # sigmoid(x) is the first value of softmax((x, 0))
        new, old = (torch.stack([x, torch.zeros_like(x)], dim=-1) for x in (new, old))
    new, old = (x[labels != -100] if x.shape[:-1] == labels.shape else x.flatten(0, -2) for x in (new, old))
    return cross_entropies(new, old, temperature).sum()


def cross_entropies(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of softmax(old / temperature) and softmax(new / temperature) over the last dimension."""
    logs = F.log_softmax(new.float() / temperature, dim=-1)
    return -(F.softmax(old.float() / temperature, dim=-1) * logs.masked_fill(logs == -torch.inf, 0)).sum(-1)


class OldTask:
    """The outputs of the old model, which the model in training keeps.

    If the model has the head of the old one, its own outputs are compared. With another head, the old head reads the
    encoder in training: it is not trained, and fits the trained encoder afterwards.

    Args:
        tuned: the model before training, and before `common.speed.apply`.
        args: the training arguments.
    """

    def __init__(self, tuned: LoadedModel, args: TrainingArguments):
        self.temperature, self.strength = args.keep_temperature or 1.0, args.keep_strength or 0.0
        self.with_old_head: nn.Module | None = None
        if not tuned.new_parameters:
            self.old = copy.deepcopy(tuned.model)
        else:
            self.old = _saved(tuned.source or "")
            add_embeddings(self.old, input_embeddings(transformer_of(tuned.model)).weight)
            self.with_old_head = copy.deepcopy(self.old)
            names = share_weights(self.with_old_head, tuned.model)
            if not names or is_beside(tuned.model):
                raise InputError(
                    "--keep lwf: with another head than that of --after, the encoder itself must be trained; leave "
                    "--tuning and --lora_r out, or give --keep replay"
                )
            tell(f"--keep lwf: the head of {tuned.source} is kept beside the new one")
        self.old.requires_grad_(False).eval()
        kernel = tuned.attn_implementation  # packed rows need one
        apply(LoadedModel(self.old, tuned.tokenizer, attn_implementation=kernel), SpeedArguments(args.speed))

    def to(self, device: torch.device) -> None:
        """Move the old model to a device."""
        self.old.to(device)
        if self.with_old_head is not None:
            self.with_old_head.to(device).train()

    @torch.no_grad()
    def outputs(self, inputs: dict[str, Any]) -> Any:
        """Return the outputs of the old model."""
        return self.old(**inputs)

    def of_old_head(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the loss of each row with the old head on the encoder in training, of shape (rows,)."""
        assert self.with_old_head is not None
        read: dict[str, Any] = {n: inputs[n] for n in ("input_ids", "attention_mask", "token_type_ids") if n in inputs}
        new, old = self.with_old_head(**read), self.outputs(read)
        mask = inputs["attention_mask"]
        names = [name for name in new if name.endswith("logits")]
        parts = [row_losses(new[name], old[name], mask, self.temperature, name != "logits") for name in names]
        return torch.stack(parts).mean(0)


def row_losses(new: Tensor, old: Tensor, mask: Tensor, temperature: float, of_positions: bool = False) -> Tensor:
    """Return the mean cross-entropy of old and new probabilities in each row, of shape (rows,).

    Args:
        new: logits, (rows, classes) or (rows, length, classes); (rows, length) with `of_positions`.
        old: the same of the old model.
        mask: 1 at tokens, 0 at padding; (rows, length).
        temperature: divides the logits.
        of_positions: the logits choose a position, such as the start of an answer.
    """
    if of_positions:
        new, old = (x.float().masked_fill(mask == 0, -torch.inf) for x in (new, old))
    each = cross_entropies(new, old, temperature)
    return each if each.dim() == 1 else (each * mask).sum(1) / mask.sum(1)


def _saved(source: str) -> PreTrainedModel:
    """Load the model in folder `source` with its head, by the class that its configuration names."""
    path = resolve_model(source)
    name = (load_config(path).architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None or not name.count("For"):
        raise InputError(f"--keep lwf: {source} has no head that learned a task; name a trained model by --after")
    return load_saved(kind, path)


def add_embeddings(model: PreTrainedModel, embeddings: Tensor) -> None:
    """Give `model` the last rows of `embeddings`, of tokens that were added since, such as the markers of relations."""
    known = len(input_embeddings(model).weight)
    if len(embeddings) > known:
        model.resize_token_embeddings(len(embeddings), mean_resizing=False)
        with torch.no_grad():
            input_embeddings(model).weight[known:] = embeddings[known:]


def share_weights(model: nn.Module, trained: nn.Module) -> list[str]:
    """Let `model` use the weights of the encoder of `trained` that have the same name and shape; freeze its others.

    Returns:
        The names of the shared weights.
    """
    ours = dict(trained.named_parameters())
    prefix = getattr(trained, "base_model_prefix", "")
    shared = []
    for name, weight in list(model.named_parameters()):
        other = ours.get(name)
        if name.startswith(f"{prefix}.") and other is not None and other.shape == weight.shape:
            part, _, last = name.rpartition(".")
            setattr(model.get_submodule(part), last, other)
            shared.append(name)
        else:
            weight.requires_grad_(False)
    return shared


# Fisher information


class Continual(Regularised, SeededOrder):
    """Train under `--keep`, and save the Fisher information under `--save_fisher`."""

    old_task: OldTask | None = None

    def take_old_task(self, args: TrainingArguments, unlabeled: Any) -> None:
        """Copy the old model for `--keep lwf`; call it before `common.speed.apply` changes the model."""
        if args.keep != "none" and unlabeled is not None:
            raise InputError(f"--keep {args.keep}: cannot be combined with --semi; leave one of them out")
        if args.keep == "lwf":
            self.old_task = OldTask(self.tuned, args)

    def check_fisher(self) -> None:
        """Raise `InputError` if `--save_fisher` could not be carried out after training."""
        if not self.args.save_fisher:
            return
        self._windows()
        method = self.tuned.tuning.method
        if method in METHODS and METHODS[method].saved == "apart":
            raise InputError(f"--save_fisher: {self.tuned.tuning.asked} is not merged into the weights; leave it out")

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Compute the share of a batch in the loss of its step, with that of the old outputs in training."""
        if self.old_task is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        read = dict(inputs)
        labels = self.labels_of(read)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + self.old_task.strength * self._old_loss(read, outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _old_loss(
        self, read: dict, outputs: Any, labels: dict[str, Tensor], counts: dict[str, Tensor] | None
    ) -> Tensor:
        """Return the mean loss of the old outputs over the labels of the step, for each label column."""
        task = self.old_task
        assert task is not None
        of_rows = task.of_old_head(read) if task.with_old_head is not None else None
        old = task.outputs(read) if of_rows is None else {}
        parts = []
        for name, values in labels.items():
            real = values != -100
            if of_rows is not None:  # each row counts as often as it has labels, or one has no number of rows
                total = (of_rows * real.flatten(1).sum(1) if real.dim() > 1 else of_rows * real).sum()
            else:
                total = distillation(self.logits_of(outputs, name), self.logits_of(old, name), values, task.temperature)
            parts.append(total / (real.sum() if counts is None else counts[name]).clamp(min=1))
        share = torch.stack(parts).sum()
        return share if counts is None else share * self.accelerator.num_processes

    def fisher(self) -> dict[str, Tensor]:
        """Return the importance of each weight for the old rows: of `--replay_file`, or saved with the old model.

        Raises:
            InputError: the old rows have labels that the old model does not know.
        """
        rows = self.train_dataset
        rows = rows.windows if isinstance(rows, AugmentedRows) else rows
        if not (isinstance(rows, Dataset) and OLD in rows.column_names):
            return load_file(Path(resolve_model(self.tuned.source or ""), FISHER))
        if self.tuned.new_parameters:
            raise InputError(
                f"--keep ewc: {self.tuned.source} has no head for these labels, so --replay_file cannot tell what it "
                "needs; train that model with --save_fisher true, and leave --replay_file out"
            )
        old = np.flatnonzero(of_windows(rows, OLD))
        return self._information(rows.select(old), list(self.tuned.pretrained))

    def save_fisher(self) -> None:
        """Save the importance of each weight of the trained model for the training rows, and for those before them."""
        found = self.importance()
        for name, value in ((self.fisher_pull and self.fisher_pull.importance) or {}).items():
            if name in found and found[name].shape == value.shape:
                found[name] += value.to(found[name].device)
        write_importance(self.args.folder, found)

    def importance(self) -> dict[str, Tensor]:
        """Return the importance of each weight of the trained model for the training rows."""
        rows = self._windows()
        if OLD in rows.column_names and self.args.keep == "ewc":
            rows = rows.select(np.flatnonzero(~np.asarray(of_windows(rows, OLD))))
        return self._information(rows, [name for name, _ in self.model.named_parameters()])

    def _windows(self) -> Dataset:
        rows = self.train_dataset
        rows = rows.windows if isinstance(rows, AugmentedRows) else rows
        if not isinstance(rows, Dataset):
            raise InputError(
                "--save_fisher: needs one training set in memory; leave --semi, --streaming and --batch_ramp_start out"
            )
        return rows

    def _information(self, rows: Dataset, names: list[str]) -> dict[str, Tensor]:
        """Return the diagonal of the Fisher information of each parameter, estimated on `rows` with their labels.

        It is the mean over the rows of the squared gradient of the log-likelihood of the labels of a row (Kirkpatrick
        et al. 2017; with the gold labels it is the empirical Fisher information). At most `FISHER_ROWS` rows are read.
        """
        chosen = np.sort(np.random.default_rng(self.args.seed).permutation(len(rows))[:FISHER_ROWS])
        tell(f"the importance of the weights is computed on {len(chosen):,} of {len(rows):,} rows")
        rows = self._remove_unused_columns(rows)
        if isinstance(self.data_collator, EpochSeeded):
            self.data_collator.set_epoch(0)  # the epoch of the last batch differs in a resumed run
        with _differentiable(self.model, names, self.args) as parameters:
            total = {name: torch.zeros_like(value) for name, value in parameters.items()}
            self.forget_losses()
            for number in chosen.tolist():
                batch = self._prepare_inputs(dict(self.data_collator([rows[number]])))
                one = {name: torch.ones((), device=self.args.device) for name in self.losses}  # the sum over labels
                loss = self.compute_loss(self.model, batch, num_items_in_batch=one) / self.accelerator.num_processes
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for value, gradient in zip(total.values(), gradients, strict=True):
                    if gradient is not None:
                        value.add_(gradient.detach() ** 2)
            self.forget_losses()
        return {name: value / len(chosen) for name, value in total.items()}


def write_importance(folder: Path, importance: dict[str, Tensor]) -> None:
    """Write the importance of each weight into a model folder, for `--keep ewc` of a later run."""
    if is_main_process():
        file = folder / FISHER
        file.parent.mkdir(exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in importance.items()}, file)


@contextmanager
def _differentiable(model: nn.Module, names: list[str], args: TrainingArguments) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the named parameters with gradients, without dropout and label smoothing, within a `with` block."""
    parameters = {name: value for name, value in model.named_parameters() if name in set(names)}
    trained = {name: value.requires_grad for name, value in parameters.items()}
    training, smoothing = model.training, args.label_smoothing_factor
    model.eval()
    args.label_smoothing_factor = 0.0
    try:
        for value in parameters.values():
            value.requires_grad_(True)
        yield parameters
    finally:
        for name, value in parameters.items():
            value.requires_grad_(trained[name])
        args.label_smoothing_factor = smoothing
        model.train(training)
