"""Shared arguments, fast defaults, and one parser: command line over `--config` YAML over the recipe's defaults.

The names are those of the transformers example scripts. Recipes subclass `TrainingArguments` for their own defaults.

A field says by `metadata={"resume": ...}` what a new value means for a run that resumes:

- `fixed`: the checkpoint does not fit another value, so the run is refused.
- `splits_step`: the value divides an optimizer step into parts; the rows of the step stay the same.
- `incidental`: the value changes no result.
- without the key: the run resumes with a warning, as its results differ from the original run.
"""

import difflib
import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import transformers
from accelerate import PartialState
from transformers.integrations import get_available_reporting_integrations

from common.errors import InputError, nearest_file, tell
from common.hardware import native_bf16

SPLITS = ("train", "validation", "test")
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def _file(help: str) -> Any:
    """An optional argument that names an existing file."""
    return field(default=None, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which pretrained model to start from."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default=DEFAULT_ENCODER,
        metadata={
            "help": "local folder, hub id, or the embedded default, which needs no network",
            "resume": "fixed",
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    attn_implementation: str = field(
        default="auto", metadata={"help": "auto (fastest measured on this hardware), sdpa, eager, ..."}
    )
    attention_dropout: float | None = field(
        default=None, metadata={"help": "attention dropout in place of the checkpoint's; 0 is faster on a CPU"}
    )


@dataclass
class DataArguments:
    """Where the rows come from. Recipes subclass this to name their columns.

    Attributes:
        sample: folder with `train.*`, `validation.*` and `test.*`, read when the user names no data; None if there is
            none.
    """

    _argument_group_name = "data"
    sample: ClassVar[Path | None] = None

    train_file: str | None = _file("training rows: .jsonl .json .csv .tsv .parquet, or a format of the recipe")
    validation_file: str | None = _file("validation rows; carved from the training rows when missing")
    test_file: str | None = _file("test rows, scored once at the end")
    dataset_name: str | None = field(
        default=None, metadata={"help": "a hub data set, or a folder saved by datasets, instead of files"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of the hub data set"})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "share of the training rows carved for validation when there is none"}
    )
    max_chars: int = field(
        default=1_000_000, metadata={"help": "characters a row may have; a longer one is told as an error"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "use only the first N training rows"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use only the first N validation rows"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "use only the first N test rows"})

    def __post_init__(self) -> None:
        if not self.has_source():
            if self.validation_file or self.test_file:
                raise InputError("--validation_file and --test_file need --train_file beside them")
            for split, file in self.sample_files().items():
                setattr(self, f"{split}_file", file)
        files = {f"{split}_file": getattr(self, f"{split}_file") for split in SPLITS}
        for name, path in files.items():
            if path is not None:
                self.check_path(name, path)
        if self.dataset_name and any(files.values()):
            raise InputError("--dataset_name and files exclude each other: give one or the other")
        if not 0 < self.validation_split_percentage < 100:
            raise InputError("--validation_split_percentage must lie between 1 and 99")
        for name in ("max_chars", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")

    def has_source(self) -> bool:
        """Return whether the user named training data."""
        return bool(self.train_file or self.dataset_name)

    def sample_files(self) -> dict[str, str]:
        """Return the sample's file for each split."""
        if self.sample is None:
            return {}
        return {split: str(file) for split in SPLITS for file in self.sample.glob(f"{split}.*")}

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless argument `name` may be `path`: here, unless that is a file."""
        if not Path(path).is_file():
            what = "is a folder, not a file" if Path(path).is_dir() else "no such file"
            raise InputError(f"--{name} {path}: {what}{nearest_file(path)}")

    def files(self) -> dict[str, str]:
        """The files of the run, each under the argument that names it."""
        named = {f"{split}_file": getattr(self, f"{split}_file") for split in SPLITS}
        return {name: path for name, path in named.items() if path}


@dataclass
class SpeedArguments:
    """Whether `common.speed` may change how a model computes."""

    speed: Literal["auto", "off"] = field(
        default="auto", metadata={"help": "auto: faster code with the same results; off: plain transformers"}
    )


@dataclass
class RegularisationArguments:
    """Regularisation beside weight decay, each off unless given. Code: `common.training.regularisation`."""

    dropout: float | None = field(
        default=None, metadata={"help": "share that every dropout drops, attention's too; the model's own if not given"}
    )
    r_drop: float = field(
        default=0.0,
        metadata={"help": "weight of R-Drop: rows pass twice, and the two outputs are drawn together"},
    )
    adversarial: Literal["fgm", "freelb"] | None = field(
        default=None,
        metadata={"help": "train on embeddings moved against the loss, in 2 passes or --adversarial_steps"},
    )
    adversarial_epsilon: float | None = field(
        default=None,
        metadata={"help": "how far a row's embeddings are moved at most, as one vector; fgm 0.1, freelb 1"},
    )
    adversarial_steps: int | None = field(default=None, metadata={"help": "passes of freelb; 3 if not given"})
    adversarial_step_size: float | None = field(
        default=None, metadata={"help": "how far freelb moves between two passes; 0.1 if not given"}
    )
    mixout: float = field(
        default=0.0, metadata={"help": "share of pretrained weights that stand in for the trained ones in a step"}
    )
    l2_sp: float = field(
        default=0.0, metadata={"help": "pull toward the pretrained weights, in place of weight decay toward 0"}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "evaluate and save an exponential moving average of the weights; such as 0.99",
            "resume": "fixed",
        },
    )
    swa_start: float | None = field(
        default=None,
        metadata={
            "help": "evaluate and save the mean weights from a step, or below 1 a share, on",
            "resume": "fixed",
        },
    )

    def check_regularisation(self) -> None:
        """Fill in what follows from `--adversarial`; raise `InputError` for what is out of range or contradicts."""
        for name, value in (("dropout", self.dropout), ("mixout", self.mixout), ("ema_decay", self.ema_decay)):
            if value is not None and not 0 <= value < 1:
                raise InputError(f"--{name} {value}: must be at least 0 and below 1")
        for name in ("r_drop", "l2_sp"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be 0 or more")
        if self.swa_start is not None and not self.swa_start >= 0:
            raise InputError(f"--swa_start {self.swa_start}: a step, or below 1 a share of all steps")
        if self.ema_decay is not None and self.swa_start is not None:
            raise InputError("--ema_decay and --swa_start: two ways to average the weights; give one")
        if self.r_drop and self.adversarial:
            raise InputError("--r_drop and --adversarial exclude each other: both decide what a step's passes are")
        if self.r_drop and self.dropout == 0:
            raise InputError("--r_drop: without dropout the two passes are the same; give a --dropout above 0")
        freelb = {"adversarial_steps": 3, "adversarial_step_size": 0.1}
        for name, value in ({"adversarial_epsilon": 0.1 if self.adversarial == "fgm" else 1.0} | freelb).items():
            if getattr(self, name) is None:
                if self.adversarial == "freelb" or (self.adversarial and name not in freelb):
                    setattr(self, name, value)
            elif self.adversarial is None or (self.adversarial == "fgm" and name in freelb):
                raise InputError(f"--{name}: needs --adversarial {'freelb' if name in freelb else 'fgm or freelb'}")
            elif not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")


#: numbers among the training arguments, and the least that they may be
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "early_stopping_patience": 1, "save_min_seconds": 0, "learning_rate": 0, "weight_decay": 0, "num_train_epochs": 0,
    "warmup_steps": 0, "max_grad_norm": 0, "adam_epsilon": 0,
}  # fmt: skip


@dataclass
class TrainingArguments(RegularisationArguments, SpeedArguments, transformers.TrainingArguments):
    """The arguments of transformers with fast, safe defaults, and a few of our own.

    Attributes:
        lower_is_better: names of a recipe's scores, losses aside, of which a lower value is better.
    """

    _argument_group_name = "training"
    lower_is_better: ClassVar[tuple[str, ...]] = ()

    output_dir: str | None = field(
        default=None,
        metadata={"help": "where model and results go; outputs/RECIPE when not given", "resume": "incidental"},
    )
    seed: int = field(default=42, metadata={"help": "seed of weights, order and dropout", "resume": "fixed"})
    data_seed: int | None = field(
        default=None, metadata={"help": "seed of the order of rows; --seed when not given", "resume": "fixed"}
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "name of the optimizer", "resume": "fixed"})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "batches a device adds up to one step", "resume": "splits_step"}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true: the newest whole checkpoint in --output_dir; or a folder", "resume": "incidental"},
    )
    run_name: str | None = field(default=None, metadata={"help": "name for loggers", "resume": "incidental"})
    disable_tqdm: bool | None = field(default=None, metadata={"help": "no progress bars", "resume": "incidental"})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "processes that collate batches", "resume": "incidental"}
    )

    precision: Literal["auto", "bf16", "fp16", "fp32"] = field(
        default="auto", metadata={"help": "auto is bf16 where the hardware computes it natively, else fp32"}
    )
    bf16: bool | None = field(default=None)  # None: decided by --precision
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better score"}
    )
    save_min_seconds: float = field(
        default=60,
        metadata={
            "help": "with --save_strategy epoch: seconds between two checkpoints, or more",
            "resume": "incidental",
        },
    )
    accept_unverified_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "resume from a checkpoint that has no manifest, such as the stock Trainer's",
            "resume": "incidental",
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "remove the run in --output_dir instead of keeping it aside", "resume": "incidental"},
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "loggers: tensorboard, wandb, ... (several allowed)", "resume": "incidental"},
    )
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "rows a device takes at a time", "resume": "splits_step"}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "the same for evaluation and test"})
    warmup_steps: float = field(default=0.0, metadata={"help": "steps, or below 1 the share of all steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "on all weights but biases and norms"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, steps, epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint: no, steps, epoch, best"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept beside the best"})
    load_best_model_at_end: bool = field(default=True)
    logging_steps: float = field(default=50)
    hub_strategy: str = field(default="end")
    train_sampling_strategy: str = field(
        default="auto", metadata={"help": "random, or group_by_length; auto: by length where padding costs time"}
    )
    ddp_find_unused_parameters: bool | None = field(default=False)
    ddp_timeout: int = field(
        default=600,
        metadata={"help": "seconds to wait for another process before giving up", "resume": "incidental"},
    )
    restore_callback_states_from_checkpoint: bool = field(default=True)  # or early stopping forgets its patience
    auto_find_batch_size: bool = field(
        default=False,
        metadata={
            "help": "out of memory: halve the batch, double the accumulation, begin again",
            "resume": "splits_step",
        },
    )

    def __post_init__(self) -> None:
        if self.output_dir is None:  # named after the folder of the recipe, so that a copy has its own
            self.output_dir = f"outputs/{Path(inspect.getfile(type(self))).resolve().parent.name}"
        if not torch.accelerator.is_available():
            self.use_cpu = True  # also what makes torchrun start one run of many processes, and not many runs of one
        if self.precision != "auto":
            self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        elif self.bf16 is None:
            self.bf16 = not self.fp16 and native_bf16(self.use_cpu)
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False
        if self.resume_from_checkpoint in ("true", "True"):
            self.resume_from_checkpoint = True  # the newest checkpoint in output_dir
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise InputError("--early_stopping_patience: needs evaluations to count; leave --eval_strategy no out")
        self._check_numbers()
        if self.auto_find_batch_size and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("--auto_find_batch_size: for one process only; with several give a smaller batch")
        if self.save_only_model:
            raise InputError("--save_only_model: such a checkpoint cannot be resumed; leave it out")
        if self.push_to_hub and self.hub_strategy != "end":
            raise InputError(
                f"--hub_strategy {self.hub_strategy}: must be end; the others upload a pickle of the arguments"
            )
        there = {"none", "all", *get_available_reporting_integrations()}
        for name in set(self.report_to) - there:
            raise InputError(f"--report_to {name}: not installed (run: pip install {name}), or no such logger")
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # transformers hands --ddp_timeout on for GPUs only
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        self.check_regularisation()
        best = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and best in self.lower_is_better:
            self.greater_is_better = False  # transformers knows that of losses only
        super().__post_init__()
        if self.n_gpu > 1:  # the stock Trainer would take all of them by torch.nn.DataParallel, which is slow
            tell(f"this machine has {self.n_gpu} GPUs and the run uses one; to use all, add GPUS={self.n_gpu} to make")
            self._n_gpu = 1
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:
            raise InputError(
                f"{launched} processes were launched but each sees {self.world_size}: they would train apart into one "
                "folder; launch with torchrun, or with accelerate launch --multi_gpu"
            )

    def _check_numbers(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # a NaN is not
                raise InputError(f"--{name} {value}: must be at least {least}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 0 and below 1")
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(f"--max_steps {self.max_steps}: must be at least 1; leave it out to count epochs")


Resume = Literal["fixed", "splits_step", "incidental"]


def resume_rules(groups: Iterable[type]) -> dict[str, Resume]:
    """Return what a new value of each argument means for a run that resumes; see the top of this module.

    A field that a subclass declares anew, such as for another default, keeps the rule of its parent.

    Raises:
        ValueError: a field has another value of `resume` than the three.
    """
    rules: dict[str, Resume] = {}
    for group in groups:
        for name in group.__dataclass_fields__:
            declared = (base.__dict__.get("__dataclass_fields__", {}).get(name) for base in group.__mro__)
            rule = next((f.metadata["resume"] for f in declared if f and "resume" in f.metadata), None)
            if rule is not None:
                rules[name] = rule
            if rule not in (None, *get_args(Resume)):
                raise ValueError(f"{group.__name__}.{name}: resume is {rule!r}; use {', '.join(get_args(Resume))}")
    return rules


def check_best_metric(args: TrainingArguments, metrics: Iterable[str]) -> None:
    """Raise `InputError` unless `--metric_for_best_model` names one of `metrics`, or the loss."""
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", *metrics]
    if name not in known:
        nearest = difflib.get_close_matches(name.lower(), known, n=1)
        more = f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(known)}"
        raise InputError(f"--metric_for_best_model {name}: no such score{more}")
