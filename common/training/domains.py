"""Train an adapter for each domain, and the gate that mixes them (`--tuning domains`, `common.tuning.adapters`).

A training row goes through the adapter of its domain, and the gate learns to tell the domains of the training rows. An
evaluated row of a known domain goes through its adapter too, unless `--domain_given false`. The gate mixes the adapters
for a row of a domain that no training row has.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from common.args import TrainingArguments
from common.data.domains import DOMAIN
from common.errors import InputError
from common.training.draws import of_windows
from common.training.evaluation import RowEvaluation, RowLoader
from common.tuning.adapters import Gate, gate_of
from common.tuning.tune import give_domains

#: column of the number of the domain of a window, -1 if unknown
NUMBER = "domain_number"


class DomainCollator:
    """Collate rows by a collator, and add `domain`: the number of the domain of each row, (rows,)."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of a collator that draws random numbers."""
        if hasattr(self.collate, "set_epoch"):
            self.collate.set_epoch(epoch)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = [row.get(NUMBER, -1) for row in rows]
        batch = self.collate([{name: value for name, value in row.items() if name != NUMBER} for row in rows])
        domains = torch.tensor(numbers)
        return {**batch, DOMAIN: domains[batch["owner"]] if "owner" in batch else domains}  # of pieces of packed rows


class MixedDomains(RowEvaluation):
    """Give the model the domain of each row, and add the loss of the gate."""

    gate: Gate | None = None
    #: rows of an evaluation whose domain the gate tells, and rows of known domain
    _told: Tensor

    def take_domains(
        self, args: TrainingArguments, train_dataset=None, eval_dataset=None, data_collator=None, **kwargs
    ) -> dict[str, Any]:
        """Insert the adapters of the domains of `train_dataset`; return the arguments of the parent that change.

        Raises:
            InputError: the training rows have no domains, or are not in memory; a combination that is not supported.
        """
        if self.tuned.tuning.method != "domains":
            if not args.domain_given:
                raise InputError("--domain_given false: needs adapters of domains; add --tuning domains")
            return {}
        if not isinstance(train_dataset, Dataset):
            raise InputError(
                "--tuning domains: needs one training set in memory; leave --augment and --streaming out, or give "
                "--tuning full"
            )
        if DOMAIN not in train_dataset.column_names:
            raise InputError("--tuning domains: the rows have no domains; name their column by --domain_column")
        if args.keep in ("ewc", "lwf"):
            raise InputError(f"--tuning domains: cannot be combined with --keep {args.keep}; give --tuning full")
        names = sorted(set(of_windows(train_dataset, DOMAIN)))
        if len(names) < 2:
            raise InputError(f"--tuning domains: all training rows have the domain {names[0]}; give --tuning full")
        give_domains(self.tuned, names)
        self.gate = gate_of(self.tuned.model)
        return {
            "train_dataset": self._numbered(train_dataset, given=True),
            "eval_dataset": self._numbered(eval_dataset, args.domain_given),
            "data_collator": DomainCollator(data_collator),
        }

    def _numbered(self, rows: Any, given: bool) -> Any:
        """Add column `domain_number` to a data set; without `given` all domains are unknown."""
        if (
            self.gate is None
            or not isinstance(rows, Dataset)
            or DOMAIN not in rows.column_names
            or NUMBER in rows.column_names
        ):
            return rows
        known = {name: number for number, name in enumerate(self.gate.domains)} if given else {}
        return rows.add_column(NUMBER, [known.get(name, -1) for name in of_windows(rows, DOMAIN)])

    def keep_numbers(self) -> None:
        """Let the batches have the numbers of domains, beside the arguments of the model and the labels."""
        if self.gate is not None:
            self._set_signature_columns_if_needed()
            cast(list[str], self._signature_columns).append(NUMBER)

    def get_test_dataloader(self, test_dataset: Dataset) -> RowLoader:
        """Return the loader of a data set to predict."""
        return super().get_test_dataloader(self._numbered(test_dataset, self.args.domain_given))

    def get_batch_samples(  # type: ignore[override]  # as in `MeanLoss`
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, dict[str, Tensor]]:
        """Return the batches of a step, and the number of its labels and of its rows of known domain."""
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.gate is not None:
            count = sum((batch[DOMAIN] >= 0).sum() for batch in batches).to(device)
            counts[DOMAIN] = self.accelerator.reduce(count, "sum") if self.args.world_size > 1 else count
        return batches, counts

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Compute the share of a batch in the loss of its step, with that of the gate in training."""
        if self.gate is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.gate.given is not None:
            known = self.gate.given >= 0
            logits, domains = self.gate.logits[known], self.gate.given[known]
            if not model.training:
                self._told += torch.stack([(logits.argmax(-1) == domains).sum(), known.sum()])
            else:
                count = known.sum() if num_items_in_batch is None else num_items_in_batch[DOMAIN]
                share = F.cross_entropy(logits, domains, reduction="sum") / count.clamp(min=1)
                loss = loss + (share if num_items_in_batch is None else share * self.accelerator.num_processes)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """Evaluate as the parent does, and add `gate_accuracy`: how often the gate prefers the domain of a row."""
        if self.gate is None:
            return super().evaluation_loop(*args, **kwargs)
        self._told = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        told = self.accelerator.reduce(self._told, "sum")
        if told[1] and output.metrics is not None:
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_gate_accuracy"] = float(told[0] / told[1])
        return output
