"""Shared arguments, fast defaults, and one parser: command line over `--config` YAML over the recipe's defaults.

The names are those of the transformers example scripts. Recipes subclass `TrainingArguments` for their own defaults.
"""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import yaml
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations

from common.errors import InputError, Problems, one_line, tell

#: scores of the recipes, beside losses, of which less is better
LOWER_IS_BETTER = {"perplexity", "calibration_error", "hit_max_length"}
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
#: arguments of transformers that `--help` shows; `--help_all` shows every one
COMMON_TRAINING_ARGUMENTS = frozenset({
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "weight_decay", "warmup_steps", "lr_scheduler_type",
    "max_grad_norm", "label_smoothing_factor", "seed", "activation_checkpointing", "eval_strategy", "save_strategy",
    "save_total_limit", "metric_for_best_model", "report_to", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
    "train_sampling_strategy", "ddp_timeout", "auto_find_batch_size",
})  # fmt: skip


def _file(help: str) -> Any:
    """An optional argument that names an existing file."""
    return field(default=None, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which pretrained model to start from."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default=DEFAULT_ENCODER,
        metadata={"help": "local folder, hub id, or the embedded default, which needs no network"},
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
    """Where the rows come from. Recipes subclass this to name their columns."""

    _argument_group_name = "data"

    train_file: str | None = _file("training rows: .jsonl .json .csv .tsv .parquet .conll .txt")
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
        files = {name: getattr(self, name) for name in ("train_file", "validation_file", "test_file")}
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

    def check_path(self, name: str, path: str) -> None:
        """Raise `InputError` unless argument `name` may be `path`: here, unless that is a file."""
        if not Path(path).is_file():
            what = "is a folder, not a file" if Path(path).is_dir() else "no such file"
            raise InputError(f"--{name} {path}: {what}{nearest_file(path)}")

    def files(self) -> dict[str, str]:
        """The files of the run, each under the argument that names it."""
        named = {name: getattr(self, name) for name in ("train_file", "validation_file", "test_file")}
        return {name: path for name, path in named.items() if path}


@dataclass
class RegularisationArguments:
    """What keeps a model from fitting its rows too closely, each off unless given. Code: `common.regularisation`."""

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
        default=None, metadata={"help": "evaluate and save an exponential moving average of the weights; such as 0.99"}
    )
    swa_start: float | None = field(
        default=None,
        metadata={"help": "evaluate and save the mean weights from a step, or below 1 a share, on"},
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
class TrainingArguments(RegularisationArguments, transformers.TrainingArguments):
    """The arguments of transformers with fast, safe defaults, and a few of our own."""

    _argument_group_name = "training"

    precision: Literal["auto", "bf16", "fp16", "fp32"] = field(
        default="auto", metadata={"help": "auto is bf16 where the hardware computes it natively, else fp32"}
    )
    bf16: bool | None = field(default=None)  # None: decided by --precision
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better score"}
    )
    save_min_seconds: float = field(
        default=60, metadata={"help": "with --save_strategy epoch: seconds between two checkpoints, or more"}
    )
    accept_unverified_checkpoint: bool = field(
        default=False, metadata={"help": "resume from a checkpoint that has no manifest, such as the stock Trainer's"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace what another run left in --output_dir"})
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "loggers: tensorboard, wandb, ... (several allowed)"}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "rows a device takes at a time"})
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
    ddp_timeout: int = field(default=600, metadata={"help": "seconds to wait for another process before giving up"})
    restore_callback_states_from_checkpoint: bool = field(default=True)  # or early stopping forgets its patience
    auto_find_batch_size: bool = field(
        default=False, metadata={"help": "out of memory: halve the batch, double the accumulation, begin again"}
    )

    def __post_init__(self) -> None:
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
        if self.greater_is_better is None and best in LOWER_IS_BETTER:
            self.greater_is_better = False  # transformers knows that of losses only
        super().__post_init__()
        if self.n_gpu > 1:  # the stock Trainer would take all of them by torch.nn.DataParallel, which is slow
            tell(f"{self.n_gpu} GPUs are here and one is used; take them all by: make ner GPUS={self.n_gpu}")
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


def check_best_metric(args: TrainingArguments, metrics: Iterable[str]) -> None:
    """Raise `InputError` unless `--metric_for_best_model` names one of `metrics`, or the loss."""
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", *metrics]
    if name not in known:
        nearest = difflib.get_close_matches(name.lower(), known, n=1)
        more = f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(known)}"
        raise InputError(f"--metric_for_best_model {name}: no such score{more}")


def native_bf16(cpu: bool) -> bool:
    """Whether bfloat16 matrix products run in hardware here: CPU with AVX512_BF16 or AMX, GPU since Ampere."""
    if cpu or not torch.cuda.is_available():
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.cuda.is_bf16_supported(including_emulation=False)


class _Parser(HfArgumentParser):
    """Dataclasses to arguments. Unlike its parent it takes no abbreviations, and raises `InputError`."""

    def __init__(self, dataclass_types: tuple[type, ...], description: str | None, show_all: bool):
        super().__init__(
            dataclass_types,
            description=description,
            usage="%(prog)s [--config FILE.yaml] [--name value ...]",
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        self.add_argument("--config", metavar="FILE", help="YAML file of arguments; the command line wins over it")
        self.add_argument("--help_all", action="store_true", help="show every argument, transformers' own included")
        if not show_all:
            stock = {f.name for f in fields(transformers.TrainingArguments)}
            for action in self._actions:
                if action.dest in stock and action.dest not in COMMON_TRAINING_ARGUMENTS:
                    action.help = argparse.SUPPRESS
        for action in self._actions:  # one spelling of each name in the help: `--a_b`, not `--a_b, --a-b`, nor --no_a
            if action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> None:
        raise InputError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))

    def nearest(self, name: str) -> str:
        """The end of an error message about the unknown argument `name`."""
        if "trust_remote_code" in name.replace("-", "_"):
            return ": code that comes with a checkpoint or with data is never run here"
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        found = difflib.get_close_matches(name.lstrip("-").split("=")[0].replace("-", "_"), known, n=1)
        return f"; did you mean {found[0]}?" if found else "; --help_all lists them all"

    def parse(self, argv: list[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(argv)
        for word in unknown:
            if word.startswith("-"):
                raise InputError(f"unknown argument {word}{self.nearest(word)}")
        if unknown:
            raise InputError(f"{unknown[0]}: a value without an argument name in front of it")
        return namespace


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the recipe's docstring as it is, and shows an argument once with its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = (
            "" if action.nargs in (0, "?") else " " + self._format_args(action, (action.dest.split("_")[-1].upper()))
        )
        return action.option_strings[-1 if action.dest == "help" else 0] + values

    def _get_help_string(self, action: argparse.Action) -> str:
        help = (action.help or "").split("\n")[0]
        if action.default in (None, argparse.SUPPRESS) or "%(default)" in help:
            return help
        return f"{help} (default: %(default)s)"


def parse(dataclass_types: tuple[type, ...], argv: list[str] | None = None, description: str | None = None) -> tuple:
    """Fill `dataclass_types` from `argv` (default: the command line) over `--config FILE` over their own defaults.

    The YAML file maps argument names to values; it is read by `yaml.safe_load` and passes through the same parser as
    the command line, so types and names are checked alike. Raises `InputError` that names file and line for an unknown
    or repeated key and for a value of the wrong type, with the nearest valid name.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(dataclass_types, description, show_all="--help_all" in argv)
    if "--help_all" in argv:
        parser.print_help()
        sys.exit(0)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    values = vars(parser.parse((_read_yaml(path, parser) if path else []) + argv))
    try:
        return tuple(t(**{f.name: values[f.name] for f in fields(t) if f.init}) for t in dataclass_types)
    except (ValueError, ImportError, OSError) as error:  # from transformers, or a folder that may not be read
        raise InputError(one_line(error)) from None


def given_values(dataclass_types: tuple[type, ...], argv: list[str]) -> dict[str, str | list[str]]:
    """What `argv` and its `--config` set, by name, as it is written; a list for several values."""
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path, words = config.parse_known_args(argv)
    parser = _Parser(dataclass_types, None, show_all=False)
    found: dict[str, list[str]] = {}
    for word in (_read_yaml(path.config, parser) if path.config else []) + words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            last = found[name] = [value] if equals else []
        else:
            last.append(word)
    return {name: values[0] if len(values) == 1 else values or "true" for name, values in found.items()}


def _read_yaml(path: str, parser: _Parser) -> list[str]:
    """The arguments in YAML file `path` as command-line words."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{path}{f':{mark.line + 1}' if mark else ''}: {getattr(error, 'problem', error)}") from None
    if values is None:
        return []
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold lines of `name: value`")
    problems, words, seen = Problems(), [], set()
    known = {option for action in parser._actions for option in action.option_strings}
    for key_node, value_node in root.value:
        key, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if f"--{key}" not in known or key in ("config", "help", "help_all"):
            problems.add(where, f"unknown argument {key}{parser.nearest(key)}")
        elif key in seen:
            problems.add(where, f"{key} is given twice")
        else:
            seen.add(key)
            new = _words(key, value_node, values[key])
            try:
                parser.parse(new)
            except InputError as error:
                problems.add(where, str(error))
            words += new
    problems.check()
    return words


def _words(key: str, node: yaml.Node, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    # a scalar as it is written: YAML would read `no` as False and 2e-5 as text
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else node.value}"]


def nearest_file(path: str) -> str:
    """The end of an error message about the missing file `path`."""
    folder = Path(path).parent
    names = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    found = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {folder / found[0]}?" if found else ""
