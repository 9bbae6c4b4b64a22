"""Parse the command line over a YAML file over defaults, and exit with a message instead of a traceback."""

import argparse
import copy
import difflib
import errno
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import datasets
import transformers
import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from common.errors import InputError, Problems, RunStopped, one_line, printable
from common.hardware import configure_allocator


def command_line(main: Callable[[], object]) -> NoReturn:
    """Run a program's `main` and exit: 0 when it returns, 2 on `InputError`, `error.code` on `RunStopped`.

    With several processes, each prints why it stopped. Their launcher then prints a second report and sets the final
    exit code.
    """
    configure_allocator()
    logging.disable_progress_bar()  # transformers shows one for each file; training has another
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        main()
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine: a file may be missing on one machine only
            for problem in str(error).split("\n"):
                print(f"error: {printable(problem)}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"stopped: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("stopped: interrupted by SIGINT outside training; run the command again", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # such as make ner | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at exit
        print("stopped: the program that reads the output has ended; write the output to a file", file=sys.stderr)
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = printable(str(error.filename or "the output folder"))
        remedy = "free disk space, then run the command again, or resume training by --resume_from_checkpoint true"
        print(f"stopped: {where}: {error.strerror}; {remedy}", file=sys.stderr)
        sys.exit(RunStopped.NOT_SAVED)
    if "LOCAL_RANK" in os.environ:  # communication threads that still run can abort the interpreter at exit
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    sys.exit(0)


#: arguments of transformers that `--help` shows; `--help_all` shows all
COMMON_TRAINING_ARGUMENTS = frozenset({
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "weight_decay", "warmup_steps", "lr_scheduler_type",
    "max_grad_norm", "label_smoothing_factor", "seed", "activation_checkpointing", "eval_strategy", "save_strategy",
    "save_total_limit", "metric_for_best_model", "report_to", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
    "train_sampling_strategy", "ddp_timeout", "auto_find_batch_size",
})  # fmt: skip


#: name of an argument in other training scripts -> names here; the message shows the first that the program has
ALIASES: dict[str, tuple[str, ...]] = {
    "model": ("model_name_or_path",), "model_name": ("model_name_or_path", "model"),
    "model_path": ("model_name_or_path", "model"), "model_id": ("model_name_or_path", "model"),
    "model_name_or_path": ("model",), "pretrained_model_name_or_path": ("model_name_or_path", "model"),
    "checkpoint": ("resume_from_checkpoint", "model"), "resume": ("resume_from_checkpoint",),
    "lr": ("learning_rate",), "epochs": ("num_train_epochs",), "num_epochs": ("num_train_epochs",),
    "n_epochs": ("num_train_epochs",), "steps": ("max_steps",), "max_train_steps": ("max_steps",),
    "num_train_steps": ("max_steps",), "wd": ("weight_decay",), "warmup": ("warmup_steps",),
    "warmup_ratio": ("warmup_steps",), "num_warmup_steps": ("warmup_steps",), "scheduler": ("lr_scheduler_type",),
    "batch_size": ("per_device_train_batch_size", "batch_tokens"), "bs": ("per_device_train_batch_size",),
    "train_batch_size": ("per_device_train_batch_size",), "eval_batch_size": ("per_device_eval_batch_size",),
    "per_device_eval_batch_size": ("batch_tokens",), "accumulation_steps": ("gradient_accumulation_steps",),
    "grad_accum": ("gradient_accumulation_steps",), "grad_clip": ("max_grad_norm",), "clip_grad": ("max_grad_norm",),
    "label_smoothing": ("label_smoothing_factor",), "patience": ("early_stopping_patience",),
    "optimizer": ("optim",), "evaluation_strategy": ("eval_strategy",), "metric": ("metric_for_best_model",),
    "output": ("output_dir",), "out": ("output_dir", "output"), "out_dir": ("output_dir", "output"),
    "output_dir": ("output",), "output_file": ("output",), "save_dir": ("output_dir",), "input_file": ("input",),
    "overwrite_output_dir": ("overwrite",), "data": ("train_file", "input"), "data_path": ("train_file", "input"),
    "data_dir": ("train_file", "input"), "file": ("train_file", "input"), "train_data": ("train_file",),
    "train": ("train_file",), "train_path": ("train_file",), "dataset": ("dataset_name", "input"),
    "dataset_path": ("dataset_name",), "val_file": ("validation_file",), "valid_file": ("validation_file",),
    "dev_file": ("validation_file",), "eval_file": ("validation_file",), "validation": ("validation_file",),
    "predict_file": ("test_file",), "test": ("test_file",), "max_samples": ("max_train_samples",),
    "device": ("use_cpu",), "no_cuda": ("use_cpu",), "cpu": ("use_cpu",), "dtype": ("precision",),
    "mixed_precision": ("precision",), "fp32": ("precision",), "bf16": ("precision",), "fp16": ("precision",),
    "workers": ("dataloader_num_workers",),
    "num_workers": ("dataloader_num_workers",), "lora": ("tuning",), "use_lora": ("tuning",), "peft": ("tuning",),
    "beams": ("num_beams",),
}  # fmt: skip


class _Parser(HfArgumentParser):
    """Turn dataclasses into arguments. Unlike its parent, accept no abbreviations and raise `InputError`."""

    def __init__(self, dataclass_types: tuple[Any, ...], description: str | None, show_all: bool):
        super().__init__(
            dataclass_types,
            description=description,
            usage="%(prog)s [--config FILE.yaml] [--name value ...]",
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        self.add_argument("--config", metavar="FILE", help="YAML file of arguments; the command line overrides it")
        self.add_argument("--help_all", action="store_true", help="show all arguments, including all of transformers")
        if not show_all:
            others = (t for t in dataclass_types if not issubclass(t, transformers.TrainingArguments))
            stock = {f.name for f in fields(transformers.TrainingArguments)} - {
                f.name for t in others for f in fields(t)
            }
            for action in self._actions:
                if action.dest in stock and action.dest not in COMMON_TRAINING_ARGUMENTS:
                    action.help = argparse.SUPPRESS
        for action in self._actions:  # show one spelling of a switch: --a_b, and not --no_a_b
            if action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field) -> None:
        """Add a field without the metadata key `resume` of `common.args`, which argparse does not know.

        A recipe's argument hides one of transformers with the same name, such as `label_names`.
        """
        if f"--{field.name}" in parser._option_string_actions:
            return
        plain = copy.copy(field)
        plain.metadata = MappingProxyType({key: value for key, value in field.metadata.items() if key != "resume"})
        HfArgumentParser._parse_dataclass_field(parser, plain)

    def error(self, message: str) -> NoReturn:
        """Raise `InputError` instead of exiting."""
        raise InputError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))

    def nearest(self, name: str) -> str:
        """Return the end of a message about the unknown argument `name`: the nearest known name."""
        if "trust_remote_code" in name.replace("-", "_"):
            return ": code in a checkpoint or data set is never run; choose a model type built into transformers"
        known = {option.lstrip("-") for action in self._actions for option in action.option_strings}
        aliases = {alias: [name for name in names if name in known] for alias, names in ALIASES.items()}
        asked = name.lstrip("-").split("=")[0].replace("-", "_").lower()
        nearest = list(aliases.get(asked, ()))
        every = sorted(known | {alias for alias, names in aliases.items() if names})
        close = difflib.get_close_matches(asked, every, n=1, cutoff=0.88)
        close = close or difflib.get_close_matches(asked, sorted(known), n=1)
        nearest += close if known.issuperset(close) else aliases[close[0]]
        nearest += sorted(option for option in known if asked in option.split("_"))
        dashes = "--" if name.startswith("-") else ""
        return f"; did you mean {dashes}{nearest[0]}?" if nearest else "; --help_all lists all arguments"

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Parse `argv`; raise `InputError` for unknown arguments or a value without a name."""
        namespace, unknown = self.parse_known_args(argv)
        names = [word for word in unknown if re.match("--?[A-Za-z]", word)]
        if names:
            raise InputError(" ".join(f"unknown argument {name}{self.nearest(name)}" for name in names))
        if unknown:
            raise InputError(f"{unknown[0]}: a value without an argument name; put --NAME before it")
        return namespace


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Print the recipe's docstring unchanged, and each argument once with its default."""

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


def training_module(recipe: str) -> str:
    """Return the module that a `make` target runs: `recipes.a.train` for `a`, `recipes.a.train_b` for `a-b`.

    Raises:
        InputError: the working directory has no such script.
    """
    folder, _, variant = recipe.partition("-")
    script = f"train_{variant}" if variant else "train"
    if not Path("recipes", folder, f"{script}.py").is_file():
        raise InputError(f"{recipe}: no such recipe in this folder; run the command in the folder that holds recipes/")
    return f"recipes.{folder}.{script}"


def parse(dataclass_types: tuple[type, ...], argv: list[str] | None = None, description: str | None = None) -> tuple:
    """Fill `dataclass_types` from the command line over `--config FILE` over their defaults.

    The YAML file maps argument names to values. The parser of the command line checks its names and types too.

    Args:
        dataclass_types: dataclasses whose fields are the arguments.
        argv: words of the command line; `sys.argv[1:]` if None.
        description: text at the top of `--help`.

    Returns:
        One instance of each dataclass.

    Raises:
        InputError: a key is unknown or repeated, or a value has the wrong type. The message names file and line, and
            the nearest valid name.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(dataclass_types, description and _of_copy(description, dataclass_types), "--help_all" in argv)
    if "--help_all" in argv:
        parser.print_help()
        sys.exit(0)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path = config.parse_known_args(argv)[0].config
    values = vars(parser.parse((_read_yaml(path, parser) if path else []) + argv))
    values = {name: _with_home(value) for name, value in values.items()}
    try:  # a name in two dataclasses belongs to the first
        return tuple(t(**{f.name: values.pop(f.name) for f in fields(t) if f.name in values}) for t in dataclass_types)
    except (ValueError, ImportError, OSError) as error:  # from transformers, or from an unreadable folder
        raise InputError(one_line(error)) from None


def _with_home(value: Any) -> Any:
    """Return a path with `~/` replaced, which the shell leaves in `--name=~/path` and YAML; other values unchanged."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _of_copy(description: str, dataclass_types: tuple[type, ...]) -> str:
    """Return the docstring of a recipe with the name of the folder that it is in: the recipe may be a copy."""
    written = re.search(r"\brecipes\.(\w+)\.", description)
    folders = [Path(inspect.getfile(t)).resolve().parent for t in dataclass_types]
    names = [folder.name for folder in folders if folder.parent.name == "recipes"]
    if written is None or not names:
        return description
    before = r"((?:make |recipes[./]|RECIPE=|outputs/))"
    return re.sub(rf"{before}{re.escape(written[1])}\b", rf"\g<1>{names[0]}", description)


def given_values(dataclass_types: tuple[type, ...], argv: list[str] | None) -> dict[str, str | list[str]]:
    """Return the arguments that `argv` and its `--config` set: name -> text, or a list of texts.

    `parse` must accept `argv`; None stands for `sys.argv[1:]`.
    """
    argv = sys.argv[1:] if argv is None else argv
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    path, words = config.parse_known_args(argv)
    parser = _Parser(dataclass_types, None, show_all=False)
    given: dict[str, list[str]] = {}
    for word in (_read_yaml(path.config, parser) if path.config else []) + words:
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            action = parser._option_string_actions[option]
            off = isinstance(action, argparse._StoreFalseAction)  # --no_NAME
            last = given[action.dest] = ["false"] if off else [value] if equals else []
        else:
            last.append(word)
    return {name: values[0] if len(values) == 1 else values or "true" for name, values in given.items()}


def _read_yaml(path: str, parser: _Parser) -> list[str]:
    """Return the arguments in YAML file `path` as command-line words."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as the date 2026-13-45
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{path}{f':{mark.line + 1}' if mark else ''}: {getattr(error, 'problem', error)}") from None
    if values is None:
        return []
    if not isinstance(values, dict) or root is None:
        raise InputError(f"{path}: not a mapping; write lines of `name: value`")
    problems, words, seen = Problems(), [], set()
    known = {option for action in parser._actions for option in action.option_strings}
    for key_node, value_node in root.value:
        key, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if f"--{key}" not in known or key in ("config", "help", "help_all"):
            problems.add(where, f"unknown argument {key}{parser.nearest(key)}")
        elif key in seen:
            problems.add(where, f"{key} is given twice; remove one")
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
    # pass a scalar as written, also in a list: YAML reads `no` as False, 007 as 7 and 2e-5 as text
    if isinstance(node, yaml.SequenceNode):
        pairs = zip(node.value, value, strict=True)
        return [f"--{key}", *(item.value if isinstance(item, yaml.ScalarNode) else str(one) for item, one in pairs)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else node.value}"]
