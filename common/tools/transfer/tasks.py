"""Read the rows and scores of the recipes in a plan, through the module `transfer` of each recipe."""

import hashlib
import importlib
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from common.args import DataArguments, ModelArguments, TrainingArguments
from common.cli import given_values, parse, training_module
from common.errors import InputError
from common.models import ScratchArguments, Seq2SeqModelArguments, resolve_model
from common.models.load import check_head, load_config
from common.run.fingerprint import model_hash, path_hash
from common.run.transferable import RowStatistics, TaskRows


@dataclass(frozen=True)
class Task:
    """A recipe with arguments that it has accepted, and its rows.

    Attributes:
        recipe: name of the recipe, as in `make`.
        words: its arguments.
        parsed: one instance of each dataclass of its arguments.
        rows: its training rows.
        identity: hash of recipe, arguments and the content of files; equal tasks in two plans have equal ones.
    """

    recipe: str
    words: tuple[str, ...]
    parsed: tuple[Any, ...]
    rows: TaskRows
    identity: str

    @property
    def args(self) -> TrainingArguments:
        """Return the arguments of the training."""
        return self.args_with(())

    def args_with(self, more: tuple[str, ...]) -> TrainingArguments:
        """Return the arguments of the training with further words. Raises `InputError` if the recipe rejects them."""
        parsed = parse(_arguments(self.recipe), [*self.words, *more]) if more else self.parsed
        return next(part for part in parsed if isinstance(part, TrainingArguments))

    @property
    def model(self) -> ModelArguments:
        """Return the arguments of the model."""
        return next(part for part in self.parsed if isinstance(part, ModelArguments))

    @property
    def new(self) -> bool:
        """Return whether the arguments ask for a new model with random weights."""
        if any(isinstance(part, ScratchArguments) and part.from_scratch for part in self.parsed):
            return True
        return self.model.model_name_or_path is None or getattr(self.model, "from_scratch", None) is not None

    @property
    def score(self) -> str:
        """Return the name of the score that picks the best checkpoint."""
        return (self.args.metric_for_best_model or "loss").removeprefix("eval_")

    @cached_property
    def longest(self) -> int:
        """Return the most tokens of an input."""
        lengths = [
            getattr(part, name, None) for part in self.parsed for name in ("max_seq_length", "max_source_length")
        ]
        return next((length for length in lengths if length), 256)


class Tasks:
    """Load tasks, each once."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, tuple[str, ...]], Task] = {}

    def load(self, recipe: str, words: tuple[str, ...]) -> Task:
        """Return a task. Raises `InputError` if the recipe rejects its arguments or its rows."""
        if (recipe, words) not in self._loaded:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # each run has its messages in its log
                self._loaded[recipe, words] = _read(recipe, words)
        return self._loaded[recipe, words]


def _arguments(recipe: str) -> tuple[type, ...]:
    return importlib.import_module(training_module(recipe)).ARGUMENTS


def _read(recipe: str, words: tuple[str, ...]) -> Task:
    arguments = _arguments(recipe)
    parsed = parse(arguments, list(words))
    data_args = next(part for part in parsed if isinstance(part, DataArguments))
    rows = transfer_module(recipe).training_rows(parse(arguments, list(words)))  # reading may change its arguments
    given = {name: _content(value) for name, value in given_values(arguments, list(words)).items()}
    files = {name: path_hash(path) for name, path in data_args.files().items()}
    about = json.dumps([recipe, given | files], sort_keys=True)
    return Task(recipe, words, parsed, rows, hashlib.sha256(about.encode()).hexdigest())


def _content(value: str | list[str]) -> Any:
    """Return the value of an argument, with the hash of its content in place of the path of a file or a model."""
    if isinstance(value, list):
        return [_content(one) for one in value]
    path = Path(value).expanduser()
    if not value or not path.exists():
        return value
    return model_hash(str(path)) or path_hash(path)


def transfer_module(recipe: str) -> ModuleType:
    """Return the module of a recipe that this command reads.

    Raises:
        InputError: the recipe has none.
    """
    folder = recipe.partition("-")[0]
    if not Path("recipes", folder, "transfer.py").is_file():
        raise InputError(
            f"{recipe}: has no recipes/{folder}/transfer.py, which tells its rows and scores; write it as "
            "common/run/transferable.py says"
        )
    return importlib.import_module(f"recipes.{folder}.transfer")


def statistics_of(recipe: str) -> Callable[[list[dict[str, Any]], str], RowStatistics]:
    """Return the function of a recipe that reads the statistics of test rows.

    Raises:
        InputError: the recipe has none.
    """
    function = getattr(transfer_module(recipe), "row_statistics", None)
    if function is None:
        raise InputError(f"{recipe}: has no score of single test rows, so it can be a source and no target")
    return function


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `predictions_test.jsonl`."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [json.loads(line) for line in lines]


def check_feeds(source: Task, target: Task, model: str | None) -> None:
    """Check that the model of a source can be trained on a target.

    Args:
        source: the task that is trained first.
        target: the task that is trained next.
        model: the checkpoint that the source starts from; None for that of its recipe.

    Raises:
        InputError: the target cannot load the model; the message says why.
    """
    given, wanted = source.rows.head, target.rows.head
    if (given is AutoModelForSeq2SeqLM) != (wanted is AutoModelForSeq2SeqLM):
        warm = isinstance(target.model, Seq2SeqModelArguments) and target.model.warm_start
        if given is AutoModelForSeq2SeqLM:
            raise InputError(f"{source.recipe} trains an encoder-decoder, and {target.recipe} needs an encoder")
        if not warm:
            raise InputError(
                f"{source.recipe} trains an encoder, and {target.recipe} needs an encoder-decoder; add "
                "--warm_start both to its arguments"
            )
        return
    name = model or source.model.model_name_or_path
    if source.new or wanted is AutoModelForSeq2SeqLM or (given is AutoModelForCausalLM and wanted is not given):
        if given is AutoModelForCausalLM and wanted is not given and source.new:
            raise InputError(f"{source.recipe} trains a new decoder, and {target.recipe} needs an encoder")
        if source.new or wanted is AutoModelForSeq2SeqLM:
            return
    check_head(wanted, load_config(resolve_model(name)), name)
