"""Command lines: parse arguments over a YAML file over defaults, and exit with a message instead of a traceback."""

import argparse
import copy
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

import datasets
import transformers
import yaml
from transformers import HfArgumentParser
from transformers.utils import logging

from common.errors import InputError, Problems, RunStopped, one_line, printable
from common.hardware import configure_allocator


def command_line(main: Callable[[], object]) -> NoReturn:
    """Run a program's `main` and exit: 0 when it returns, 2 with the problems when the input is at fault.

    A run that was stopped (`RunStopped`) exits with the status of that. On several processes each says why it ended.

    A launcher of several processes prints a report of its own after that and exits with a code of its own.
    """
    configure_allocator()
    logging.disable_progress_bar()  # of transformers, for reading and writing files; the training has its own
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        main()
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a machine: another one may lack a file that this one has
            for problem in str(error).split("\n"):
                print(f"error: {printable(problem)}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"stopped: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("stopped: by SIGINT; nothing was being trained", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = printable(str(error.filename or "the output folder"))
        print(f"stopped: {where}: {error.strerror}; make room, then begin again or resume", file=sys.stderr)
        sys.exit(RunStopped.NOT_SAVED)
    if "LOCAL_RANK" in os.environ:  # threads that still speak with other processes may abort an interpreter that ends
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    sys.exit(0)


#: arguments of transformers that `--help` shows; `--help_all` shows every one
COMMON_TRAINING_ARGUMENTS = frozenset({
    "output_dir", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "weight_decay", "warmup_steps", "lr_scheduler_type",
    "max_grad_norm", "label_smoothing_factor", "seed", "activation_checkpointing", "eval_strategy", "save_strategy",
    "save_total_limit", "metric_for_best_model", "report_to", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
    "train_sampling_strategy", "ddp_timeout", "auto_find_batch_size",
})  # fmt: skip


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

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field) -> None:
        """Add a field without the keys of its metadata that argparse does not know (`common.args`)."""
        known = copy.copy(field)
        known.metadata = {key: value for key, value in field.metadata.items() if key != "resume"}
        HfArgumentParser._parse_dataclass_field(parser, known)

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


def training_module(recipe: str) -> str:
    """Return the module that a target of `make` runs: `a` is `recipes.a.train`, and `a-b` is `recipes.a.train_b`.

    Raises:
        InputError: there is no such script in the working directory.
    """
    folder, _, more = recipe.partition("-")
    script = f"train_{more}" if more else "train"
    if not Path("recipes", folder, f"{script}.py").is_file():
        raise InputError(f"{recipe}: no such recipe here; run it in the folder that holds recipes/")
    return f"recipes.{folder}.{script}"


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
