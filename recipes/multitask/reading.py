"""Read the file of `--tasks`: the recipe of each task, its arguments, and its weight."""

import dataclasses
import difflib
import importlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict
from torch.nn import ModuleDict

from common.args import ModelArguments, TrainingArguments
from common.cli import given_values, parse
from common.errors import InputError, Problems, one_line, tell
from common.run.joint import JointTask
from common.tuning import TuningArguments

from .arguments import OF_A_TASK, SharingArguments
from .earlier import KEEPING, check_keep, start_of

#: module of a recipe that can take part
MODULE = "multitask"
RECIPES = Path(__file__).resolve().parents[1]
#: keys of a task that are not arguments of its recipe
OWN = ("recipe", "share", "score", "texts_of")
#: arguments that draw rows; the rows of a task on the texts of others are drawn by those
LIMITS = ("max_train_samples", "max_eval_samples", "max_predict_samples")
#: names that scores or files of the whole run have
RESERVED = ("mean", "worst", "loss", "heads", "before", "alone", "base", "adapter")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
#: arguments of this run that its tasks do not take
NOT_PASSED_ON = frozenset({
    "output_dir", "overwrite", "resume_from_checkpoint", "report_to", "push_to_hub", "eval_strategy", "save_strategy",
    "metric_for_best_model", "greater_is_better", "early_stopping_patience", "ema_decay", "swa_start", "mixout",
    "l2_sp", "run_name", "learning_rate", "load_best_model_at_end", "max_steps", "num_train_epochs",
})  # fmt: skip


@dataclass
class Entry:
    """A task in the file.

    Attributes:
        name: its name.
        where: file and line.
        recipe: folder of its recipe.
        words: its arguments, as for the command line of the recipe.
        share: its part of the rows under `--sampling fixed`.
        score: the score that counts in the mean; None for that of the recipe.
        texts_of: tasks on whose texts it is trained.
    """

    name: str
    where: str
    recipe: str
    words: list[str]
    share: float = 1.0
    score: str | None = None
    texts_of: tuple[str, ...] = ()

    def has(self, argument: str) -> bool:
        """Return whether the file sets an argument of the recipe."""
        return any(word.partition("=")[0] == f"--{argument}" for word in self.words)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Name file, line and task in an `InputError` inside the block."""
        try:
            yield
        except InputError as error:
            raise InputError(*(f"{self.where}: task {self.name}: {line}" for line in str(error).split("\n"))) from None


def known_recipes() -> list[str]:
    """Return the recipes that can take part."""
    return sorted(path.parent.name for path in RECIPES.glob(f"*/{MODULE}.py"))


def module_of(recipe: str, name: str) -> Any:
    """Return a module of a recipe, by the name of its folder."""
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.{recipe}.{name}")


def read_entries(path: str) -> list[Entry]:
    """Return the tasks in a file.

    Raises:
        InputError: up to ten problems, each with file and line.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--tasks {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{path}:{mark.line + 1}" if mark else path
        raise InputError(f"{at}: not YAML: {getattr(error, 'problem', None) or one_line(error)}; correct it") from None
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{path}: names no tasks; write a block for each: `NAME:`, and below it `recipe: FOLDER`")
    problems, entries, modules = Problems(), {}, ModuleDict()
    for key, value in root.value:
        name, where = str(key.value), f"{path}:{key.start_mark.line + 1}"
        if name in entries:
            problems.add(where, f"task {name} is also in line {entries[name].where.rpartition(':')[2]}; rename one")
        elif not NAME.fullmatch(name) or name in RESERVED or name.startswith("checkpoint") or hasattr(modules, name):
            problems.add(where, f"{name!r} cannot name a task; choose another name, of letters, digits, _ and -")
        else:
            entries[name] = _entry(name, where, value, path, problems)
    for entry in entries.values():
        for other in entry.texts_of:
            if other not in entries or other == entry.name:
                problems.add(entry.where, f"task {entry.name}: texts_of: {other} is no other task; name one of them")
    if len(entries) < 2:
        problems.add(path, f"names {len(entries)} task; name two or more, or train it by its own recipe")
    problems.check()
    shares = [entry.share for entry in entries.values()]
    if not sum(shares) > 0:
        raise InputError(f"{path}: the shares of the tasks sum to 0; give a positive `share` to those to train")
    if nothing := next((entry for entry in entries.values() if not entry.share), None):
        raise InputError(
            f"{nothing.where}: task {nothing.name}: share 0 trains it never; remove it, or raise the share"
        )
    return list(entries.values())


def _entry(name: str, where: str, node: yaml.Node, path: str, problems: Problems) -> Entry:
    entry = Entry(name, where, "", [])
    if not isinstance(node, yaml.MappingNode):
        problems.add(where, f"task {name}: has no settings; write `recipe: FOLDER` below it")
        return entry
    settings: dict[str, tuple[str, yaml.Node]] = {}
    for key, value in node.value:
        if key.value in settings:
            problems.add(f"{path}:{key.start_mark.line + 1}", f"task {name}: {key.value} is given twice; remove one")
        elif not value.tag.endswith(":null"):
            settings[str(key.value)] = (f"{path}:{key.start_mark.line + 1}", value)
    entry.recipe = str(settings.pop("recipe", (where, yaml.ScalarNode("", "")))[1].value)
    if entry.recipe not in known_recipes():
        asked = f"no such recipe here: {entry.recipe}" if entry.recipe else "names no recipe"
        close = difflib.get_close_matches(entry.recipe, known_recipes(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"give `recipe:` one of {', '.join(known_recipes())}"
        problems.add(where, f"task {name}: {asked}; {hint}")
        return entry
    known = arguments_of(entry.recipe)
    for key, (place, value) in settings.items():
        values = [str(one.value) for one in value.value] if isinstance(value, yaml.SequenceNode) else [str(value.value)]
        if key == "share":
            entry.share = _number(values[0])
            if not (math.isfinite(entry.share) and entry.share >= 0):
                problems.add(place, f"task {name}: share: {values[0]} is no number of at least 0; correct it")
        elif key == "score":
            entry.score = values[0]
        elif key == "texts_of":
            entry.texts_of = tuple(values)
        elif key in known:
            entry.words += [f"--{key}", *values] if isinstance(value, yaml.SequenceNode) else [f"--{key}={values[0]}"]
        else:
            problems.add(place, f"task {name}: {key}: {_unknown(key, known, entry.recipe)}")
    for key in ("train_file", "replay_file", *LIMITS):
        if entry.texts_of and entry.has(key):
            problems.add(where, f"task {name}: texts_of and {key} exclude each other; give one of them")
    return entry


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def arguments_of(recipe: str) -> set[str]:
    """Return the arguments of a recipe that a task may set: those of its rows, its head and its loss."""
    names = {field.name for group in module_of(recipe, "train").ARGUMENTS for field in dataclasses.fields(group)}
    whole = {
        f.name for group in (ModelArguments, TuningArguments, TrainingArguments) for f in dataclasses.fields(group)
    }
    return names - whole - refused_by(recipe)


def refused_by(recipe: str) -> set[str]:
    """Return the arguments of a recipe that do not work beside other tasks."""
    return set(module_of(recipe, MODULE).Task.refused)


def _unknown(key: str, known: set[str], recipe: str) -> str:
    if key in refused_by(recipe):
        return "does not work beside other tasks; remove it"
    groups = (ModelArguments, TrainingArguments, SharingArguments)
    if any(key == field.name for group in groups for field in dataclasses.fields(group)):
        return f"is set for the whole run; give --{key} on the command line"
    close = difflib.get_close_matches(key, [*known, *OWN], n=1)
    return f"recipe {recipe} has no such argument for a task; {f'did you mean {close[0]}?' if close else 'remove it'}"


def passed_on(arguments: tuple[type, ...], argv: list[str] | None) -> dict[str, str | list[str]]:
    """Return the arguments of this run that its tasks take too, as texts.

    Args:
        arguments: the dataclasses of the arguments of this run.
        argv: its words; those of the command line if None.
    """
    given = given_values(arguments, argv)
    own = {field.name for field in dataclasses.fields(SharingArguments)} | {"tasks"}
    return {name: value for name, value in given.items() if name not in own | NOT_PASSED_ON}


def words_of(given: dict[str, str | list[str]]) -> list[str]:
    """Return given arguments as the words of a command line."""
    words: list[str] = []
    for name, value in given.items():
        words += [f"--{name}={value}"] if isinstance(value, str) else [f"--{name}", *value]
    return words


def words_for(entry: Entry, given: dict[str, str | list[str]]) -> list[str]:
    """Return the words of a task: those of this run that its recipe knows, and then its own."""
    known = {field.name for group in module_of(entry.recipe, "train").ARGUMENTS for field in dataclasses.fields(group)}
    left_out = {*OF_A_TASK, *KEEPING} | (set() if entry.has("domain_column") else {"domain_temperature"})
    values = {name: value for name, value in given.items() if name in known - left_out}
    return [*words_of(values), *start_of(entry.name, entry.recipe, entry.has("replay_file"), given), *entry.words]


def read_tasks(
    path: str, arguments: tuple[type, ...], argv: list[str] | None, args: TrainingArguments
) -> tuple[list[Entry], dict[str, JointTask]]:
    """Return the entries of the file, and the task of each with its rows loaded.

    Args:
        path: the file.
        arguments: the dataclasses of the arguments of this run.
        argv: its words.
        args: the arguments of its training.

    Raises:
        InputError: see `read_entries`; or a recipe rejects arguments or rows of its task.
    """
    entries, given = read_entries(path), passed_on(arguments, argv)
    after = given.get("after")
    replaying = [entry.name for entry in entries if entry.has("replay_file")]
    if args.domain_temperature is not None and not any(entry.has("domain_column") for entry in entries):
        raise InputError(
            "--domain_temperature: no task has domains; write domain_column below one in the file of --tasks"
        )
    check_keep(args, after and str(after), {entry.name: entry.recipe for entry in entries}, replaying)
    tasks: dict[str, JointTask] = {}
    fixed = ["--output_dir", str(args.output_dir), "--eval_strategy", "no", "--save_strategy", "no"]
    for entry in entries:
        tell(f"task {entry.name} ({entry.recipe})")
        with entry.blamed():
            words = [*words_for(entry, given), *fixed]
            parsed = parse(module_of(entry.recipe, "train").ARGUMENTS, words)
            tasks[entry.name] = task = module_of(entry.recipe, MODULE).Task(entry.name, parsed)
            if not entry.texts_of:
                task.load()
                task.check_labels()
            task.score = entry.score or task.score
    unread = {entry.name for entry in entries if entry.texts_of}
    for entry in entries:
        if entry.texts_of:
            with entry.blamed():
                if nested := unread & set(entry.texts_of):
                    raise InputError(f"texts_of: {sorted(nested)[0]} has the texts of other tasks itself; name those")
                tasks[entry.name].load_texts(texts_of([tasks[other] for other in entry.texts_of]))
    return entries, tasks


def texts_of(tasks: list[JointTask]) -> DatasetDict:
    """Return the texts of some tasks by split, each text once; a text of a test row is in no other split."""
    splits = [split for split in ("test", "validation", "train") if all(split in task.data for task in tasks)]
    found: dict[str, Dataset] = {}
    seen: set[str] = set()
    if "test" not in splits:  # some tasks have no test rows
        seen |= {text for task in tasks if "test" in task.data for text in task.texts("test")}
    for split in splits:
        texts = [text for task in tasks for text in task.texts(split)]
        kept = list(dict.fromkeys(text for text in texts if text not in seen))
        if texts and not kept:
            raise InputError(f"texts_of: each {split} text is also a text of another split; give other rows")
        seen |= set(kept)
        found[split] = Dataset.from_dict({"text": kept, "id": [str(number) for number in range(1, len(kept) + 1)]})
    return DatasetDict({split: found[split] for split in reversed(splits)})
