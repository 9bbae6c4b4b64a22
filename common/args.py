"""Define the arguments that all recipes share, with fast defaults.

The names follow the transformers example scripts. A recipe subclasses `TrainingArguments` to change defaults.
`common.cli` parses the command line over `--config` YAML over these defaults.

The key `resume` in a field's metadata says how resuming treats a changed value:

- `fixed`: the checkpoint does not fit another value; the run is rejected.
- `splits_step`: the value divides an optimizer step into parts; the rows of the step stay the same.
- `incidental`: the value changes no result.
- no key: the run resumes with a warning, because results will differ from the original run.
"""

import difflib
import inspect
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import transformers
from accelerate import PartialState
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from common.errors import InputError, check_file_exists, tell
from common.hardware import native_bf16

SPLITS = ("train", "validation", "test")
#: file of the importance of each weight in a model folder, for `--keep ewc`
FISHER = "fisher/fisher.safetensors"
#: begin of the names of a score over domains: the mean of the domains, and the worst domain
MEAN, WORST = "mean_domain_", "worst_domain_"
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def _file(help: str) -> Any:
    """Return an optional field that names an existing file."""
    return field(default=None, metadata={"help": help})


@dataclass
class ModelArguments:
    """Choose the pretrained model, its attention kernel and its attention dropout."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default=DEFAULT_ENCODER,
        metadata={
            "help": "local folder or hub id; the embedded default needs no network",
            "resume": "fixed",
        },
    )
    after: str | None = field(
        default=None,
        metadata={
            "help": "trained model to start from, instead of --model_name_or_path; see --keep",
            "resume": "fixed",
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    attn_implementation: str = field(
        default="auto",
        metadata={"help": "attention kernel: auto (fastest measured on this hardware), sdpa, eager, ..."},
    )
    attention_dropout: float | None = field(
        default=None, metadata={"help": "attention dropout instead of the checkpoint's; 0 is faster on a CPU"}
    )
    allow_special_tokens: bool = field(
        default=False,
        metadata={
            "help": "special tokens in texts, such as </s>, act as special tokens; false: they are plain text",
            "resume": "fixed",
        },
    )

    def __post_init__(self) -> None:
        if self.after is None:
            return
        default = type(self).__dataclass_fields__["model_name_or_path"].default
        if self.model_name_or_path not in (default, self.after):
            raise InputError("--after and --model_name_or_path: both name the model to start from; give one of them")
        self.model_name_or_path = self.after


@dataclass
class HeadArguments(ModelArguments):
    """Choose the pretrained model, and where a new head starts."""

    head_init: Literal["probe", "random"] = field(
        default="probe",
        metadata={
            "help": "weights of a new head: probe (logistic regression on the frozen encoder), random",
            "resume": "fixed",
        },
    )


@dataclass
class ClassifierArguments(HeadArguments):
    """Choose the pretrained model, what the head of a classifier of texts reads, and where it starts."""

    pooling: Literal["auto", "mean", "first"] = field(
        default="auto",
        metadata={
            "help": "what the head reads: mean of all tokens, first token; auto: as the encoder was trained",
            "resume": "fixed",
        },
    )


@dataclass
class FileArguments:
    """Say how input files are read, in training and in predict."""

    encoding: str | None = field(
        default=None, metadata={"help": "encoding of text files, such as cp1252, gb18030, utf-16; default: UTF-8"}
    )
    csv_delimiter: str | None = field(
        default=None, metadata={"help": "character between cells, or tab; default: a comma in .csv, a tab in .tsv"}
    )
    csv_quoting: Literal["auto", "csv", "none"] = field(
        default="auto",
        metadata={
            "help": 'csv: "a ""b""" is the cell a "b"; none: quotation marks are text; auto: csv for .csv; for .tsv '
            "as the file shows"
        },
    )
    csv_header: bool = field(default=True, metadata={"help": "line 1 of .csv and .tsv holds the column names"})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "with --csv_header false: names of the columns, such as text,label"}
    )
    sheet: str | None = field(
        default=None, metadata={"help": "sheet of .xlsx, .xls and .ods files; default: the first"}
    )
    skip_bad_rows: int = field(
        default=0, metadata={"help": "drop up to N rows with problems, and print them; 0: reject the file"}
    )
    max_chars: int = field(
        default=1_000_000, metadata={"help": "maximum characters of a row; longer rows are rejected"}
    )

    def __post_init__(self) -> None:
        if self.encoding is not None:
            try:
                b"a".decode(self.encoding, errors="ignore")  # no codec is looked up for empty bytes
            except (LookupError, UnicodeError):
                raise InputError(
                    f"--encoding {self.encoding}: no encoding of text; give utf-8, utf-16, cp1252, gb18030, ..."
                ) from None
        if self.csv_delimiter is not None:
            delimiter = {"\\t": "\t", "tab": "\t"}.get(self.csv_delimiter, self.csv_delimiter)
            if len(delimiter) != 1 or delimiter in '\r\n"':
                raise InputError(f"--csv_delimiter {self.csv_delimiter!r}: must be one character, such as ; or tab")
            self.csv_delimiter = delimiter
        if self.column_names is not None:
            self.column_names = [name.strip() for names in self.column_names for name in names.split(",")]
            if self.csv_header:
                raise InputError("--column_names: names the columns of files without a header; add --csv_header false")
            named = [name for name in self.column_names if name]
            if len(set(named)) < len(named):
                raise InputError(f"--column_names {','.join(self.column_names)}: a name is repeated; rename one column")
        elif not self.csv_header:
            raise InputError("--csv_header false: name the columns by --column_names, such as text,label")
        if self.skip_bad_rows < 0:
            raise InputError(f"--skip_bad_rows {self.skip_bad_rows}: must be at least 0")
        if self.max_chars < 1:
            raise InputError(f"--max_chars {self.max_chars}: must be at least 1")


@dataclass
class DataArguments(FileArguments):
    """Choose the rows. Recipes subclass this to name their columns.

    Attributes:
        sample: folder with `train.*`, `validation.*` and `test.*`, read when the user names no data; None without a
            sample.
    """

    _argument_group_name = "data"
    sample: ClassVar[Path | None] = None

    train_file: str | None = _file("training rows: .jsonl .json .csv .tsv .xlsx .parquet, or a format of the recipe")
    validation_file: str | None = _file("validation rows; default: split off from the training rows")
    test_file: str | None = _file("test rows, evaluated once at the end")
    dataset_name: str | None = field(
        default=None, metadata={"help": "hub data set, or folder saved by datasets, instead of files"}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of the hub data set"})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "percent of the training rows to split off if there are no validation rows"}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "use only N random training rows; every --seed has the same rows"}
    )
    train_rows: str | None = field(
        default=None,
        metadata={"help": "file with the numbers of the training rows to use, one a line, counted from 1"},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "use only N random validation rows; every --seed has the same rows"}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "use only N random test rows; every --seed has the same rows"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_source():
            if self.validation_file or self.test_file:
                raise InputError("--validation_file and --test_file: no training rows; add --train_file")
            for split, file in self.sample_files().items():
                setattr(self, f"{split}_file", file)
        files = {f"{split}_file": getattr(self, f"{split}_file") for split in SPLITS}
        for name, path in files.items():
            if path is not None:
                self.check_path(name, path)
        if self.dataset_name and any(files.values()):
            raise InputError("--dataset_name and files exclude each other; give one of them")
        if self.train_rows is not None:
            check_file_exists("train_rows", self.train_rows)
        if not 0 < self.validation_split_percentage < 100:
            raise InputError(
                f"--validation_split_percentage {self.validation_split_percentage}: must be between 1 and 99"
            )
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")

    def has_source(self) -> bool:
        """Return whether the user named training data."""
        return bool(self.train_file or self.dataset_name)

    def sample_files(self) -> dict[str, str]:
        """Return split -> file of the sample."""
        if self.sample is None:
            return {}
        return {split: str(file) for split in SPLITS for file in self.sample.glob(f"{split}.*")}

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless `path`, the value of argument `name`, is a file."""
        check_file_exists(name, path)

    def columns(self) -> dict[str, str]:
        """Return the recipe's name of each column -> its name in the user's data; predict reads the saved names."""
        ending = "_column_name"
        named = {f.name.removesuffix(ending): getattr(self, f.name) for f in fields(self) if f.name.endswith(ending)}
        return {ours: theirs for ours, theirs in named.items() if theirs}

    def predict_arguments(self) -> list[str]:
        """Return arguments that predict needs for a model of this run."""
        return []

    def files(self) -> dict[str, str]:
        """Return argument -> file for the files of the run."""
        named = {f"{split}_file": getattr(self, f"{split}_file") for split in SPLITS}
        return {name: path for name, path in named.items() if path}


@dataclass
class GroupedDataArguments(DataArguments):
    """Choose rows that may have domains, and rows of an earlier task beside them."""

    domain_column: str | None = field(
        default=None,
        metadata={"help": "column with the domain of a row; adds the score of each domain, their mean and the worst"},
    )
    replay_file: str | None = field(
        default=None, metadata={"help": "rows of an earlier task or domain, for --keep replay or ewc"}
    )
    leave_out: str | None = field(
        default=None,
        metadata={"help": "domain to leave out of the training and validation rows; its test rows are scored"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leave_out is not None and self.domain_column is None:
            raise InputError(f"--leave_out {self.leave_out}: the rows have no domains; add --domain_column")
        if self.replay_file is not None:
            self.check_path("replay_file", self.replay_file)

    def files(self) -> dict[str, str]:
        """Return argument -> file for the files of the run."""
        return super().files() | ({"replay_file": self.replay_file} if self.replay_file else {})


@dataclass
class LabeledDataArguments(GroupedDataArguments):
    """Choose the rows of a task in which each row has a gold value: a label, tags, answers, a target or a summary."""

    drop_unlabeled: bool | None = field(
        default=None,
        metadata={"help": "true: drop and count rows without a gold value; default: such rows are an error"},
    )


@dataclass
class SpeedArguments:
    """Switch the faster code of `common.speed` on or off."""

    speed: Literal["auto", "off"] = field(
        default="auto", metadata={"help": "auto: faster code with the same results; off: plain transformers"}
    )


@dataclass
class RegularisationArguments:
    """Choose regularisation besides weight decay, off by default; see `common.training.regularisation`.

    Attributes:
        ewc_strength: weight of the penalty of `--keep ewc` if `keep_strength` is None.
    """

    ewc_strength: ClassVar[float] = 10_000.0

    dropout: float | None = field(
        default=None, metadata={"help": "rate of every dropout, attention included; default: as in the checkpoint"}
    )
    r_drop: float = field(
        default=0.0,
        metadata={"help": "weight of R-Drop: penalises the difference between two dropout passes"},
    )
    adversarial: Literal["fgm", "freelb"] | None = field(
        default=None,
        metadata={
            "help": "train on embeddings shifted to raise the loss: fgm in 2 passes, freelb in --adversarial_steps"
        },
    )
    adversarial_epsilon: float | None = field(
        default=None,
        metadata={"help": "maximum L2 norm of the shift of a row; default: fgm 0.1, freelb 1"},
    )
    adversarial_steps: int | None = field(default=None, metadata={"help": "passes of freelb; default: 3"})
    adversarial_step_size: float | None = field(
        default=None, metadata={"help": "L2 norm of the shift that freelb adds in each pass; default: 0.1"}
    )
    mixout: float = field(
        default=0.0, metadata={"help": "share of weights replaced by their pretrained values in each step"}
    )
    l2_sp: float = field(
        default=0.0, metadata={"help": "weight decay toward the pretrained weights instead of toward 0"}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "evaluate and save a moving average of the weights with this decay, such as 0.99",
            "resume": "fixed",
        },
    )
    swa_start: float | None = field(
        default=None,
        metadata={
            "help": "evaluate and save the mean of the weights from this step on; below 1: share of all steps",
            "resume": "fixed",
        },
    )

    keep: Literal["none", "ewc", "lwf", "replay"] = field(
        default="none",
        metadata={
            "help": "how to keep the task of the model in --after: ewc (penalise changes of weights that it needs), "
            "lwf (also learn the outputs of that model), replay (also train on rows of --replay_file)",
            "resume": "fixed",
        },
    )
    keep_strength: float | None = field(
        default=None,
        metadata={"help": "weight of the penalty of --keep; default: ewc 10000 (language models 100), lwf 1"},
    )
    keep_temperature: float | None = field(
        default=None, metadata={"help": "temperature that divides the logits under --keep lwf; default: 2"}
    )
    replay_rows: float | None = field(
        default=None,
        metadata={
            "help": "earlier rows in each epoch of --keep replay; below 1: share of these rows; default: all, up to "
            "the number of new rows",
            "resume": "fixed",
        },
    )
    save_fisher: bool = field(
        default=False,
        metadata={"help": "save the Fisher information of the training rows, which --keep ewc of a later run needs"},
    )

    def check_keeping(self) -> None:
        """Set the defaults that depend on `--keep`.

        Raises:
            InputError: a value is out of range, or belongs to another `--keep`.
        """
        used = {"keep_strength": ("ewc", "lwf"), "keep_temperature": ("lwf",), "replay_rows": ("replay",)}
        for name, methods in used.items():
            value = getattr(self, name)
            if value is not None and self.keep not in methods:
                raise InputError(f"--{name}: needs --keep {' or '.join(methods)}; add it, or leave --{name} out")
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"--{name} {value}: must be above 0, and finite")
        if self.keep in used["keep_strength"] and self.keep_strength is None:
            self.keep_strength = self.ewc_strength if self.keep == "ewc" else 1.0
        if self.keep == "lwf" and self.keep_temperature is None:
            self.keep_temperature = 2.0
        for name in ("r_drop", "adversarial") if self.keep == "lwf" else ():
            if getattr(self, name):
                raise InputError(f"--{name}: cannot be combined with --keep lwf; leave one of them out")

    def check_regularisation(self) -> None:
        """Set the defaults that depend on `--adversarial`.

        Raises:
            InputError: a value is out of range, or two arguments contradict each other.
        """
        for name, value in (("dropout", self.dropout), ("mixout", self.mixout), ("ema_decay", self.ema_decay)):
            if value is not None and not 0 <= value < 1:
                raise InputError(f"--{name} {value}: must be at least 0 and below 1")
        for name in ("r_drop", "l2_sp"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 0")
        if self.swa_start is not None and not self.swa_start >= 0:
            raise InputError(
                f"--swa_start {self.swa_start}: must be at least 0; give a step, or below 1 a share of all steps"
            )
        if self.ema_decay is not None and self.swa_start is not None:
            raise InputError("--ema_decay and --swa_start exclude each other; give one of them")
        if self.r_drop and self.adversarial:
            raise InputError("--r_drop and --adversarial exclude each other; give one of them")
        if self.r_drop and self.dropout == 0:
            raise InputError("--r_drop: without dropout the two passes are the same; set --dropout above 0")
        freelb = {"adversarial_steps": 3, "adversarial_step_size": 0.1}
        for name, value in ({"adversarial_epsilon": 0.1 if self.adversarial == "fgm" else 1.0} | freelb).items():
            if getattr(self, name) is None:
                if self.adversarial == "freelb" or (self.adversarial and name not in freelb):
                    setattr(self, name, value)
            elif self.adversarial is None or (self.adversarial == "fgm" and name in freelb):
                raise InputError(f"--{name}: needs --adversarial {'freelb' if name in freelb else 'fgm or freelb'}")
            elif not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")


#: training argument -> smallest valid value
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "early_stopping_patience": 1, "save_min_seconds": 0, "learning_rate": 0, "weight_decay": 0, "num_train_epochs": 0,
    "warmup_steps": 0, "max_grad_norm": 0, "adam_epsilon": 0,
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
        for name in ("adam_beta1", "adam_beta2"):
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


Resume = Literal["fixed", "splits_step", "incidental"]


def resume_rules(groups: Iterable[type[Any]]) -> dict[str, Resume]:
    """Return argument -> rule for a changed value when a run resumes; see the top of this module.

    A field that a subclass redeclares, for example with another default, keeps the rule of its parent.

    Raises:
        ValueError: a field has an unknown value of `resume`.
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


def score_of_rows(metric: str | None) -> str:
    """Return the score that `--metric_for_best_model` names, without the mean or the worst over domains."""
    return (metric or "loss").removeprefix("eval_").removeprefix(MEAN).removeprefix(WORST)


def check_together(args: TrainingArguments, data_args: DataArguments, groups: Iterable[Any]) -> None:
    """Raise `InputError` for an argument that needs another one of another group.

    Args:
        args: the arguments of the training.
        data_args: the arguments of the data.
        groups: the other dataclasses of arguments, that of the model among them.
    """
    grouped = data_args if isinstance(data_args, GroupedDataArguments) else None
    _check_domains(args, grouped)
    after = next((part.after for part in groups if isinstance(part, ModelArguments)), None)
    if args.keep != "none" and after is None:
        raise InputError(f"--keep {args.keep}: needs the model that learned before; name it by --after")
    rows = grouped and grouped.replay_file
    if rows and args.keep not in ("ewc", "replay"):
        raise InputError("--replay_file: needs --keep replay, or --keep ewc; add one of them")
    if args.keep == "replay" and grouped and not rows:
        raise InputError("--keep replay: needs old rows; name their file by --replay_file")
    if args.keep == "ewc" and not rows and not Path(after or "", FISHER).is_file():
        remedy = ", or name its rows by --replay_file" if grouped else ""
        raise InputError(f"--keep ewc: {after} has no {FISHER}; train it with --save_fisher true{remedy}")


def _check_domains(args: TrainingArguments, grouped: GroupedDataArguments | None) -> None:
    if grouped and grouped.domain_column is not None:
        return
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    asked = f"--metric_for_best_model {metric}" if metric.startswith((MEAN, WORST)) else None
    if grouped and args.domain_temperature is not None:
        asked = f"--domain_temperature {args.domain_temperature:g}"
    if asked:
        remedy = "name their column by --domain_column" if grouped else "leave it out"
        raise InputError(f"{asked}: the rows have no domains; {remedy}")


def check_best_metric(args: TrainingArguments, metrics: Iterable[str]) -> None:
    """Raise `InputError` unless `--metric_for_best_model` names the loss, one of `metrics`, or one over domains.

    `mean_domain_SCORE` and `worst_domain_SCORE` are the mean and the worst of a score over the domains.
    """
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", *metrics]
    if (name if name == "loss" else score_of_rows(name)) not in known or score_of_rows(name) == "loss" != name:
        nearest = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(known)}"
        raise InputError(f"--metric_for_best_model {name}: no such score{hint}")
