"""Extend the training arguments of transformers, with fast and safe defaults."""

import difflib
import inspect
import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import ClassVar, Literal

import torch
import transformers
from accelerate import PartialState
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from common.args.regularisation import RegularisationArguments
from common.args.scores import score_of_rows
from common.errors import InputError, tell
from common.hardware import native_bf16


@dataclass
class SpeedArguments:
    """Switch the faster code of `common.speed` on or off."""

    speed: Literal["auto", "off"] = field(
        default="auto", metadata={"help": "auto: faster code with the same results; off: plain transformers"}
    )


#: training argument -> smallest valid value
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "early_stopping_patience": 1, "save_min_seconds": 0, "learning_rate": 0, "weight_decay": 0, "num_train_epochs": 0,
    "warmup_steps": 0, "max_grad_norm": 0, "adam_epsilon": 0, "save_total_limit": 1, "logging_steps": 0, "seed": 0,
}  # fmt: skip

#: argument of transformers that no run may have -> the reason
REJECTED = {
    "dataloader_drop_last": "every row is trained and evaluated",
    "save_only_model": "the checkpoints cannot be resumed",
    "prediction_loss_only": "the scores of an evaluation need the predictions",
    "batch_eval_metrics": "the scores of an evaluation need all its rows",
    "bf16_full_eval": "it would leave the weights in bfloat16; evaluations compute in --precision",
    "fp16_full_eval": "it would leave the weights in float16; evaluations compute in --precision",
}


@dataclass
class TrainingArguments(RegularisationArguments, SpeedArguments, transformers.TrainingArguments):
    """Extend the arguments of transformers, with fast and safe defaults.

    Attributes:
        lower_is_better: names of the recipe's scores, besides losses, for which lower is better.
        usual_epochs: passes over the rows if `num_train_epochs` is None.
        least_steps: fewest steps of such a run; few rows are passed over more often.
        few_rows: whether `choose_length` found that the rows are few.
    """

    _argument_group_name = "training"
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    usual_epochs: ClassVar[float] = 3.0
    least_steps: ClassVar[int] = 0
    few_rows = False

    output_dir: str | None = field(
        default=None,
        metadata={"help": "folder for model and results; default: outputs/RECIPE", "resume": "incidental"},
    )
    seed: int = field(default=42, metadata={"help": "seed of new weights, row order and dropout", "resume": "fixed"})
    data_seed: int | None = field(
        default=None, metadata={"help": "seed of the row order; default: --seed", "resume": "fixed"}
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "name of the optimizer", "resume": "fixed"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "batches per device in one optimizer step", "resume": "splits_step"}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "true (newest complete checkpoint in --output_dir), or a checkpoint folder",
            "resume": "incidental",
        },
    )
    run_name: str | None = field(default=None, metadata={"help": "name of the run in loggers", "resume": "incidental"})
    disable_tqdm: bool | None = field(default=None, metadata={"help": "hide progress bars", "resume": "incidental"})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "processes that load batches; 0: the main process", "resume": "incidental"}
    )

    precision: Literal["auto", "bf16", "fp16", "fp32"] = field(
        default="auto", metadata={"help": "auto: bf16 if the hardware computes it natively, else fp32"}
    )
    bf16: bool | None = field(default=None)  # type: ignore[assignment]  # None: `__post_init__` reads --precision
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after N evaluations without a better score"}
    )
    save_min_seconds: float = field(
        default=60,
        metadata={
            "help": "with --save_strategy epoch: minimum seconds between two checkpoints",
            "resume": "incidental",
        },
    )
    accept_unverified_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "resume from a checkpoint without a manifest, such as one of the stock Trainer",
            "resume": "incidental",
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "delete the run in --output_dir instead of moving it aside", "resume": "incidental"},
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "loggers, one or several: tensorboard, wandb, ...", "resume": "incidental"},
    )
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "rows per device in a training batch", "resume": "splits_step"}
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "rows per device in an evaluation or test batch"}
    )
    warmup_steps: float = field(default=0.0, metadata={"help": "warm-up steps; below 1: share of all steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay of all weights except biases and norms"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, steps, epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint: no, steps, epoch, best"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept besides the best"})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "end with the weights of the best evaluation; false: with the last weights"}
    )
    logging_steps: float = field(default=50, metadata={"help": "steps between two entries of the log"})
    max_steps: int = field(default=-1, metadata={"help": "steps of training, instead of --num_train_epochs"})
    label_smoothing_factor: float = field(default=0.0, metadata={"help": "share of each label spread over all classes"})
    push_to_hub: bool = field(
        default=False, metadata={"help": "upload --output_dir to the hub at the end, test predictions included"}
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "repository for --push_to_hub"})
    hub_strategy: str = field(default="end", metadata={"help": "end: upload once, after training; no other value"})
    train_sampling_strategy: Literal["auto", "random", "group_by_length", "sequential"] = field(
        default="auto",
        metadata={
            "help": "random, group_by_length, sequential (as in the file), or auto: by length if padding costs time"
        },
    )
    domain_temperature: float | None = field(
        default=None,
        metadata={
            "help": "sample domains by rows ** (1 / T): 1 in proportion to their rows, 5 nearly equally; needs "
            "--domain_column",
            "resume": "fixed",
        },
    )
    domain_given: bool = field(
        default=True,
        metadata={
            "help": "with --tuning domains: score a row with the adapter of its domain; false: mix the adapters by the "
            "gate"
        },
    )
    ddp_find_unused_parameters: bool | None = field(default=False)
    ddp_timeout: int = field(
        default=600,
        metadata={"help": "seconds to wait for another process before stopping", "resume": "incidental"},
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True
    )  # else a resumed run resets the patience counter of early stopping
    auto_find_batch_size: bool = field(
        default=False,
        metadata={
            "help": "when out of memory: halve the batch, double gradient accumulation, restart",
            "resume": "splits_step",
        },
    )

    def passes(self, rows: int) -> float:
        """Return the passes over `rows` training rows: `num_train_epochs`, or the default for so many rows."""
        if self.num_train_epochs is not None:
            return self.num_train_epochs
        return max(self.usual_epochs, math.ceil(self.least_steps / self._steps_of_pass(rows)))

    def _steps_of_pass(self, rows: int) -> int:
        return max(1, math.ceil(rows / (self.train_batch_size * self.gradient_accumulation_steps * self.world_size)))

    def choose_length(self, rows: int) -> None:
        """Set `num_train_epochs` if it is not given: few rows are passed over more often than `usual_epochs`.

        Training is then scored and saved as often as usual, instead of in each epoch. (Mosbach et al. 2021,
        https://arxiv.org/abs/2006.04884: few rows need more steps than a usual number of epochs has.)

        Args:
            rows: number of training rows.
        """
        if self.num_train_epochs is not None:
            return
        self.num_train_epochs = self.passes(rows)
        if self.max_steps > 0 or self.num_train_epochs == self.usual_epochs:
            return
        self.few_rows = True
        steps = math.ceil(self.num_train_epochs * self._steps_of_pass(rows) / self.usual_epochs)
        if self.eval_strategy == IntervalStrategy.EPOCH:
            self.eval_strategy, self.eval_steps = IntervalStrategy.STEPS, steps
        if self.save_strategy == SaveStrategy.EPOCH:
            self.save_strategy, self.save_steps = SaveStrategy.STEPS, steps
        tell(
            f"{rows:,} training rows are few: {self.num_train_epochs:g} epochs instead of {self.usual_epochs:g}, with "
            f"a score each {steps:,} steps (--num_train_epochs sets another length, with a score each epoch)"
        )

    @property
    def folder(self) -> Path:
        """Return `output_dir` as a path."""
        assert self.output_dir is not None  # `__post_init__` replaces None
        return Path(self.output_dir)

    def __post_init__(self) -> None:
        if self.output_dir is None:  # named after the recipe's folder: a copied recipe writes to another folder
            self.output_dir = f"outputs/{Path(inspect.getfile(type(self))).resolve().parent.name}"
        if ".." in Path(self.output_dir).parts:  # creating o/new/../out would leave an empty folder o/new
            self.output_dir = os.path.realpath(self.output_dir)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without this, torchrun starts several runs of one process each
        if self.precision != "auto":
            self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        elif self.bf16 is None:
            self.bf16 = not self.fp16 and native_bf16(self.use_cpu)
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False
        if self.resume_from_checkpoint in ("true", "True"):
            # the Trainer takes True as the newest checkpoint in output_dir; argparse allows one type in the annotation
            self.resume_from_checkpoint = True  # type: ignore[assignment]
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise InputError("--early_stopping_patience: needs evaluations; remove --eval_strategy no")
        self._check_numbers()
        if self.auto_find_batch_size and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "--auto_find_batch_size: works with one process only; set a smaller --per_device_train_batch_size"
            )
        for name, reason in REJECTED.items():
            if getattr(self, name):
                raise InputError(f"--{name}: {reason}; leave it out")
        if self.push_to_hub and self.hub_strategy != "end":
            raise InputError(
                f"--hub_strategy {self.hub_strategy}: uploads a pickle file of the arguments; set it to end"
            )
        available = {"none", "all", *get_available_reporting_integrations()}
        for name in set(self.report_to) - available:
            if name in INTEGRATION_TO_CALLBACK:
                raise InputError(f"--report_to {name}: its package is not installed; install it, or give none")
            nearest = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise InputError(f"--report_to {name}: no such logger; {hint}")
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # transformers applies --ddp_timeout to GPUs only
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        self.check_regularisation()
        self.check_keeping()
        evaluated, saved = (str(getattr(one, "value", one)) for one in (self.eval_strategy, self.save_strategy))
        if self.load_best_model_at_end and {evaluated, saved} == {"steps", "epoch"}:
            raise InputError(
                f"--eval_strategy {evaluated}, --save_strategy {saved}: the run ends with its best checkpoint, so both "
                "must be the same; give both"
            )
        if self.greater_is_better is None and score_of_rows(self.metric_for_best_model) in self.lower_is_better:
            self.greater_is_better = False  # transformers detects losses only
        super().__post_init__()
        if self.n_gpu > 1:  # else the Trainer uses torch.nn.DataParallel, which is slow
            tell(f"this run uses one of {self.n_gpu} GPUs; to use all, add GPUS={self.n_gpu} to the make command")
            self._n_gpu = 1
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:
            raise InputError(
                f"WORLD_SIZE {launched}: each process sees {self.world_size} and would train a separate model into one "
                "folder; launch with torchrun, or with accelerate launch --multi_gpu"
            )

    def _check_numbers(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # also rejects NaN
                raise InputError(f"--{name} {value}: must be at least {least}")
        if self.seed >= 2**32:
            raise InputError(f"--seed {self.seed}: must be below 2**32")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 0 and below 1")
        if self.domain_temperature is not None and not 1 <= self.domain_temperature < float("inf"):
            raise InputError(f"--domain_temperature {self.domain_temperature}: must be at least 1, and finite")
        if self.domain_temperature is not None and self.train_sampling_strategy == "sequential":
            raise InputError(
                "--domain_temperature: draws rows at random; leave --train_sampling_strategy sequential out"
            )
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(f"--max_steps {self.max_steps}: must be at least 1; remove it to count epochs")
