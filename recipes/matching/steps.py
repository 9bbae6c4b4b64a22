"""Train on the rows of a whole optimizer step at once: each query sees the passages of all its batches and processes.

With one batch a step the loss is computed directly. With several, gradient caching (Gao et al. 2021,
https://arxiv.org/abs/2101.06983) needs the memory of one batch: a first pass computes the vectors of all texts without
gradients, the loss of the step gives the gradient of each vector, and a second pass carries it into the weights.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from common import training
from common.args import TrainingArguments
from common.errors import InputError
from common.models import ScratchArguments
from common.training.random_state import RandomState
from common.tuning.tune import BASE

from .vectors import Reading, pooled, save_modules

#: arguments that compare outputs of two passes of one batch
ONE_BATCH_ONLY = ("r_drop", "adversarial")


def check_arguments(args: TrainingArguments, scratch_args: ScratchArguments) -> None:
    """Raise `InputError` for a temperature out of range, regularisers that this recipe lacks, or a new model alone."""
    if not args.temperature > 0:
        raise InputError(f"--temperature {args.temperature}: must be above 0")
    if args.keep != "none" or args.save_fisher:
        raise InputError("--keep and --save_fisher: a pair alone has no loss of its own here; leave them out")
    for name in ONE_BATCH_ONLY:
        if getattr(args, name):
            raise InputError(f"--{name}: compares outputs of one batch, which vectors of texts do not have; remove it")
    if scratch_args.from_scratch and args.teacher is None:
        raise InputError("--tokenizer_train, --model_size, --config_overrides: a new model learns from a teacher; add "
                         "--teacher, or pretrain it by make mlm")  # fmt: skip


class Trainer(training.Trainer):
    """Train an encoder of texts on batches of `TextCollator`.

    Args:
        reading: how a text becomes a vector.
        in_batch: whether the loss of a row depends on the other rows of its step.
        max_seq_length: longest text, in tokens; saved for sentence-transformers.
    """

    def __init__(self, *args, reading: Reading, in_batch: bool, max_seq_length: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.reading, self.in_batch, self.max_seq_length = reading, in_batch, max_seq_length
        self.args.remove_unused_columns = False  # the collator reads columns that the model does not take

    def vectors(self, model, inputs: dict[str, Tensor]) -> Tensor:
        """Return the vectors of the texts in a batch, (texts, width)."""
        states = model(**inputs)["last_hidden_state"]
        return pooled(states, inputs["attention_mask"], self.reading.pooling)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Compute the share of a batch in the loss of its step; see the parent.

        A batch of `get_batch_samples` may have the gradient of its vectors: the loss then has this gradient. Dropout
        makes the same vectors again, whatever other tasks have drawn meanwhile.
        """
        inputs = dict(inputs)
        gradient, share, random = (inputs.pop(name, None) for name in ("gradient", "share", "random"))
        labels = self.labels_of(inputs)
        with random.again() if random else nullcontext():
            vectors = self.vectors(model, inputs)
        outputs = {"logits": vectors}
        if gradient is None:
            loss = self.mean_loss(outputs, labels, num_items_in_batch)
        else:
            carrier = (vectors * gradient).sum()
            loss = carrier - carrier.detach() + share
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Return the batches of a step as the parent does, with the gradients of their vectors if there are several."""
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.in_batch and batches and (num_batches > 1 or self.args.world_size > 1):
            self._add_gradients(batches, counts["labels"])
        return batches, counts

    def _add_gradients(self, batches: list[dict[str, Tensor]], count: Tensor) -> None:
        """Add to each batch the gradient of its vectors, and its share of the loss of the step."""
        if self.mixout:
            self.mixout.mix(self.state.global_step)
        self.model.train()
        parts, rows = [], []
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in batches:
                batch["random"] = RandomState()
                inputs = self._prepare_inputs(dict(batch))
                inputs.pop("random")
                rows.append(inputs.pop("labels"))
                parts.append(self.vectors(self.model, inputs))
        leaves = [part.detach().requires_grad_() for part in parts]
        pool, numbers = self._pool(leaves, rows)
        loss = self.losses["labels"](pool, numbers, self.args.label_smoothing_factor).sum() / count.clamp(min=1)
        own = loss.requires_grad  # else this process has no rows in the step
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if own else [None] * len(leaves)
        for batch, leaf, gradient in zip(batches, leaves, gradients, strict=True):
            # gradients are averaged over processes
            gradient = torch.zeros_like(leaf) if gradient is None else gradient * self.args.world_size
            batch |= {"gradient": gradient, "share": loss.detach() / len(batches)}

    def _pool(self, vectors: list[Tensor], rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the vectors and row numbers of the step in one batch: queries, positives, negatives of all processes.

        A part of a step without rows has labels of -100 and is left out.
        """
        columns: list[list[Tensor]] = [[], [], []]
        for part, numbers in zip(vectors, rows, strict=True):
            if (numbers != -100).all():
                for column, texts in zip(columns, part.tensor_split([len(numbers), 2 * len(numbers)]), strict=True):
                    column.append(texts)
        empty = vectors[0][:0]
        own = [torch.cat(column) if column else empty for column in columns]
        numbers = torch.cat([some[some != -100] for some in rows])
        if self.args.world_size == 1:
            return torch.cat(own), numbers
        every = [self._of_all_processes(column) for column in own]
        return torch.cat(every), self._of_all_processes(numbers)

    def _of_all_processes(self, own: Tensor) -> Tensor:
        """Return the rows of a tensor of all processes, in the order of the ranks; only the own ones have gradients."""
        sizes = self.accelerator.gather(torch.tensor([len(own)], device=own.device)).tolist()
        if not max(sizes):
            return own
        padded = own.new_zeros((max(sizes), *own.shape[1:]))
        padded[: len(own)] = own.detach()
        parts = list(self.accelerator.gather(padded).split(max(sizes)))
        parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        parts[self.args.process_index] = own
        return torch.cat(parts)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the parent does, with the files of sentence-transformers if the folder is the model's."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.folder)
        apart = (folder / BASE).is_dir()  # sentence-transformers reads no parameters beside a model
        if self.args.should_save and folder == self.args.folder and not apart:
            save_modules(folder, self.reading, self.model.config.hidden_size, self.max_seq_length)
