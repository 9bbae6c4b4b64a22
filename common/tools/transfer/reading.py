"""Read and check a plan: targets, sources, seeds and budget, before anything is trained.

    title: Does a neighbouring task help?     # optional
    seeds: [1, 2, 3]
    budget: 170 minutes                       # most minutes of training of one call; optional
    model: path/or/hub-id                     # checkpoint of all runs; default: that of each recipe
    baseline: pretrained                      # source that gains are over
    equal_cost: true                          # also train the baseline for the minutes of each source
    forgetting: true                          # also score each source task after the target was learned

    sequence:                                 # learn targets one after the other; optional
      order: [TARGET, TARGET, ...]            # with the most rows of each
      methods:                                # NAME: arguments of each training after the first
        naive: --keep none                    # default: these four
        ewc: --keep ewc
        lwf: --keep lwf
        replay: --keep replay

    targets:
      NAME:
        recipe: RECIPE                        # as in `make RECIPE`
        arguments: --train_file a.jsonl ...   # or a mapping of names to values
        rows: [0, 100, 1000, all]             # training rows; 0 only for domain and multilingual
        score: NAME                           # default: the score that picks the best checkpoint

    sources:
      NAME:
        kind: scratch | frozen | pretrained | adapted | intermediate | domain | multilingual
        recipe: RECIPE                        # what is trained first
        arguments: --train_file ...           # its arguments
        rows: 1000                            # its training rows; default: all
        texts: target                         # adapted: train on the texts of the target's training rows
        of: targets                           # each target (or each in `only`) is a source for the others
        stages: [{recipe: ..., arguments: ..., rows: ...}, ...]   # several trainings, one after the other
        model: path/or/hub-id                 # its checkpoint; default: that of the plan
        then: --learning_rate 1e-5            # further arguments of the runs on the target
        only: [TARGET, ...]                   # targets of this source; default: all

Arguments may have environment variables: `--train_file $DATA/train.jsonl`.
A method of a sequence with `--keep replay` replays the training files of the targets before, and all targets together
are trained as the upper bound, if they have one recipe, one set of labels, files of type .jsonl and all rows.
A source with `rows` 0 at a target is scored on it without training. `frozen` has `then: --tuning head` by default.
"""

import difflib
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from common.data import yaml_text
from common.errors import InputError, Problems, nearest_file, one_line
from common.tools.runner import OWN
from common.tools.transfer.plan import (
    ALONE,
    JOINT,
    KINDS,
    SAME_TASK,
    TRAINED_FIRST,
    Plan,
    Rows,
    Sequence,
    Source,
    Stage,
    Target,
)

DEFAULT_THEN = {"frozen": ("--tuning", "head")}
#: arguments that the command sets, and the key of a plan that decides them
SET = dict.fromkeys(OWN, "leave it out") | {
    "--seed": "give seeds",
    "--model_name_or_path": "give model",
    "--max_train_samples": "give rows",
}
KEYS = {
    "plan": (
        *("title", "seeds", "budget", "model", "baseline", "equal_cost", "forgetting"),
        *("sequence", "targets", "sources"),
    ),
    "sequence": ("order", "methods"),
    "target": ("recipe", "arguments", "rows", "score"),
    "source": ("kind", "recipe", "arguments", "rows", "texts", "of", "stages", "model", "then", "only"),
    "stage": ("recipe", "arguments", "rows", "texts"),
}
#: methods of a sequence, if the plan names none: name -> arguments
METHODS = {"naive": "--keep none", "ewc": "--keep ewc", "lwf": "--keep lwf", "replay": "--keep replay"}


class _Reader:
    """Read the parts of a plan, and collect the problems of all of them."""

    def __init__(self, path: Path):
        self.path, self.problems = path, Problems()

    def add(self, where: str, message: str) -> None:
        """Record a problem at a place in the plan."""
        self.problems.add(f"{self.path}: {where}" if where else str(self.path), message)

    def mapping(self, where: str, value: Any, kind: str) -> dict[str, Any]:
        """Return a mapping with known keys only."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.add(where, f"is {value!r}; write keys and values: {', '.join(KEYS[kind])}")
            return {}
        for key in value:
            if key not in KEYS[kind]:
                nearest = difflib.get_close_matches(str(key), KEYS[kind], n=1, cutoff=0.5)
                hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(KEYS[kind])}"
                self.add(where, f"unknown key {key}; {hint}")
        return value

    def named(self, where: str, value: Any) -> dict[str, Any]:
        """Return a mapping of names."""
        if isinstance(value, dict) and value:
            return {str(name): about for name, about in value.items()}
        self.add(where, f"write a name for each of the {where}, and its keys below it")
        return {}

    def words(self, where: str, value: Any) -> tuple[str, ...]:
        """Return arguments, written as on the command line or as a mapping, as words."""
        if isinstance(value, dict):
            words = [word for name, v in value.items() for word in (f"--{name}", *_listed(v))]
        elif isinstance(value, list):
            self.add(where, "arguments are a list; write them as text, --name value, or as a mapping, name: value")
            return ()
        else:
            try:
                words = shlex.split(str(value or ""))
            except ValueError as error:
                self.add(where, f"arguments: {error}; close the quotation marks")
                return ()
        words = [self._expanded(where, word) for word in words]
        for word in words:
            name = word.partition("=")[0]
            if name in SET:
                self.add(where, f"{name}: is set by the plan; {SET[name]} instead")
            if name.endswith("_file") and name.startswith("--"):
                self._file(where, name, words[words.index(word) + 1 :] if name == word else [word.partition("=")[2]])
        return tuple(words)

    def _expanded(self, where: str, word: str) -> str:
        """Return a word with the values of environment variables, such as `$DATA/train.jsonl`."""
        expanded = os.path.expandvars(word)
        if missing := re.search(r"\$\{?(\w+)", expanded):
            self.add(
                where, f"{word}: {missing[1]} is not set; run: {missing[1]}=/your/folder make transfer PLAN={self.path}"
            )
        return expanded

    def _file(self, where: str, name: str, values: list[str]) -> None:
        for value in values:
            if value.startswith("--"):
                return
            if not Path(value).expanduser().exists() and not any(c in value for c in "*?["):
                self.add(where, f"{name} {value}: no such file{nearest_file(value)}")

    def rows(self, where: str, value: Any, least: int) -> Rows:
        """Return a number of rows; None for `all`."""
        if value in (None, "all"):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.add(where, f"rows is {value!r}; give a number of at least {least}, or all")
            return None
        return value

    def recipe(self, where: str, value: Any) -> str:
        """Return the name of a recipe that exists."""
        known = sorted(_recipes())
        if value in known:
            return str(value)
        nearest = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(known)}"
        self.add(where, f"recipe {value}: no such recipe; {hint}" if value else f"recipe is missing; {hint}")
        return ""

    def flag(self, key: str, value: Any) -> bool:
        """Return a yes or no."""
        if not isinstance(value, bool):
            self.add(key, f"is {value!r}; write true or false")
        return bool(value)

    def stage(self, where: str, value: Any, kind: str = "stage") -> Stage:
        """Return a training before that on the target."""
        about = self.mapping(where, value, kind)
        texts = about.get("texts")
        if texts not in (None, "target"):
            self.add(where, f"texts is {texts!r}; write texts: target, or name the file by --train_file in arguments")
        words = self.words(where, about.get("arguments"))
        if texts and "--train_file" in words:
            self.add(where, "texts: target and --train_file exclude each other; leave one of them out")
        recipe = self.recipe(where, about.get("recipe"))
        return Stage(recipe, words, self.rows(where, about.get("rows"), 1), texts == "target")


def _recipes() -> Iterable[str]:
    """Return the recipes in the working directory, by the names of their targets of make."""
    for path in Path("recipes").glob("*/train*.py"):
        yield path.parent.name + path.stem.removeprefix("train").replace("_", "-", 1)


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(one) for one in values if one is not None]


#: where a plan has arguments; * stands for each name, and for each item of a list
ARGUMENTS = (
    ("targets", "*", "arguments"),
    ("sources", "*", "arguments"),
    ("sources", "*", "then"),
    ("sources", "*", "stages", "*", "arguments"),
    ("sequence", "methods", "*"),
)


def _load(text: str) -> Any:
    """Load YAML, but the values of arguments as they are written: YAML reads `no` as False and 007 as 7."""
    root = yaml_text.compose(text)
    if root is not None:
        _mark(root, ())
    return yaml_text.construct(root)


def _mark(node: yaml.Node, place: tuple[str, ...]) -> None:
    """Mark the values of the arguments in the node at a place of the plan as text."""
    if any(len(place) == len(some) and all(map(fnmatch, place, some)) for some in ARGUMENTS):
        _as_written(node)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _mark(value, place if key.value == "<<" else (*place, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _mark(value, (*place, "*"))


def _as_written(arguments: yaml.Node) -> None:
    """Mark the values of a mapping of arguments, also those in lists, as text."""
    for key, value in arguments.value if isinstance(arguments, yaml.MappingNode) else []:
        if key.value == "<<":
            _as_written(value)
        for item in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(item, yaml.ScalarNode) and item.tag != "tag:yaml.org,2002:null":
                item.tag = "tag:yaml.org,2002:str"


def read_plan(path: str | Path) -> Plan:
    """Read a plan from a YAML file.

    Raises:
        InputError: the file is no plan; up to ten problems, each with its place.
    """
    path = Path(path)
    try:
        content = _load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--plan {path}: no such file{nearest_file(str(path))}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--plan {path}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"--plan {path}: not a plan; write the keys targets and sources")
    read = _Reader(path)
    about = read.mapping("", content, "plan")
    targets = [_target(read, name, value) for name, value in read.named("targets", about.get("targets")).items()]
    named = read.named("sources", about.get("sources"))
    sources = [source for name, value in named.items() for source in _sources(read, name, value, targets)]
    plan = Plan(
        path=path,
        title=str(about.get("title") or path.stem),
        seeds=_seeds(read, about.get("seeds", [1, 2, 3])),
        targets=tuple(targets),
        sources=tuple(sorted(sources, key=lambda source: list(KINDS).index(source.kind))),
        baseline=str(about.get("baseline", "pretrained")),
        budget=_minutes(read, about.get("budget")),
        model=None if about.get("model") is None else str(about["model"]),
        equal_cost=read.flag("equal_cost", about.get("equal_cost", True)),
        forgetting=read.flag("forgetting", about.get("forgetting", True)),
        sequence=_sequence(read, about["sequence"], targets) if "sequence" in about else None,
    )
    _check(read, plan)
    read.problems.check()
    return plan


def _target(read: _Reader, name: str, value: Any) -> Target:
    where = f"targets: {name}"
    about = read.mapping(where, value, "target")
    listed = about.get("rows", ["all"])
    rows = [read.rows(where, number, 0) for number in (listed if isinstance(listed, list) else [listed])]
    if len(set(rows)) < len(rows):
        read.add(where, f"rows {listed}: a number is repeated; name each once")
    ordered = sorted(rows, key=lambda number: float("inf") if number is None else number)
    score = about.get("score")
    words = read.words(where, about.get("arguments"))
    return Target(name, read.recipe(where, about.get("recipe")), words, tuple(ordered), score and str(score))


def _sources(read: _Reader, name: str, value: Any, targets: list[Target]) -> list[Source]:
    """Return a source; under `of: targets` one for each target."""
    where = f"sources: {name}"
    about = read.mapping(where, value, "source")
    kind = about.get("kind", name if name in KINDS else None)
    if not isinstance(kind, str) or kind not in KINDS:
        nearest = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(KINDS)}"
        read.add(where, f"kind {kind}: no such kind; {hint}" if kind else f"kind is missing; {hint}")
        return []
    then = read.words(where, about["then"]) if "then" in about else DEFAULT_THEN.get(kind, ())
    only = tuple(_listed(about.get("only")))
    for other in only:
        if other not in [target.name for target in targets]:
            nearest = difflib.get_close_matches(other, [target.name for target in targets], n=1)
            read.add(where, f"only {other}: no such target" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    model = None if about.get("model") is None else str(about["model"])
    source = Source(name, kind, model=model, then=then, only=only)
    if "of" in about:
        if about["of"] != "targets" or kind not in TRAINED_FIRST:
            read.add(
                where, f"of is {about['of']!r}; write of: targets, with a kind that trains: {', '.join(TRAINED_FIRST)}"
            )
        if {"recipe", "stages", "texts"} & about.keys():
            read.add(where, "of: targets takes recipe and arguments of each target; leave recipe, stages and texts out")
        rows, extra = read.rows(where, about.get("rows"), 1), read.words(where, about.get("arguments"))
        return [
            replace(
                source, name=t.name, task=t.name, stages=(Stage(t.recipe, (*t.words, *extra), rows, score=t.score),)
            )
            for t in targets
            if not only or t.name in only
        ]
    if kind not in TRAINED_FIRST:
        given = sorted({"recipe", "arguments", "rows", "texts", "stages"} & about.keys())
        if given:
            read.add(where, f"{given[0]}: kind {kind} trains nothing before the target; its arguments there are `then`")
        return [source]
    if "stages" in about:
        listed = about["stages"]
        if not isinstance(listed, list) or not listed or {"recipe", "arguments", "rows", "texts"} & about.keys():
            read.add(where, "stages: give a list, and recipe, arguments, rows and texts of each stage in it")
            return [source]
        stages = [read.stage(f"{where}: stage {number}", stage) for number, stage in enumerate(listed, 1)]
    else:
        stages = [read.stage(where, about, "source")]
    return [replace(source, stages=tuple(stages))]


def _sequence(read: _Reader, value: Any, targets: list[Target]) -> Sequence:
    """Return the targets that are learned one after the other."""
    about, known = read.mapping("sequence", value, "sequence"), [target.name for target in targets]
    order = tuple(_listed(about.get("order")))
    for name in order:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            read.add("sequence", f"order {name}: no such target" + (f"; did you mean {nearest[0]}?" if nearest else ""))
        elif order.count(name) > 1:
            read.add("sequence", f"order {name}: is repeated; name each target once")
    if len(order) < 2:
        read.add("sequence", "order: give at least two targets, such as [first, second]")
    methods = about.get("methods") or METHODS
    if not isinstance(methods, dict):
        read.add("sequence", f"methods is {methods!r}; write a name for each, and its arguments: ewc: --keep ewc")
        methods = {}
    words = {str(name): read.words("sequence", given) for name, given in methods.items()}
    for name, of_method in words.items():
        if name in (JOINT, ALONE):
            read.add("sequence", f"methods {name}: is the name of a bound; rename the method")
        for argument in ("--after", "--replay_file", "--save_fisher"):
            if argument in of_method:
                read.add("sequence", f"methods {name}: {argument}: is set by the sequence; leave it out")
    return Sequence(order, words)


def _seeds(read: _Reader, value: Any) -> tuple[int, ...]:
    seeds = value if isinstance(value, list) else [value]
    if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
        read.add("seeds", f"is {value!r}; give whole numbers, such as [1, 2, 3]")
        return (1,)
    if len(set(seeds)) < len(seeds):
        read.add("seeds", f"{seeds}: a seed is repeated, and its runs would be equal; name each once")
    return tuple(seeds)


def _minutes(read: _Reader, value: Any) -> float | None:
    """Return minutes of a number, `90 minutes` or `3 hours`."""
    if value is None:
        return None
    number, _, unit = str(value).partition(" ")
    factors = {"": 1, "minute": 1, "minutes": 1, "hour": 60, "hours": 60}
    try:
        minutes = float(number) * factors[unit.strip()]
    except (ValueError, KeyError):
        minutes = 0
    if not minutes > 0:
        read.add("budget", f"is {value!r}; give minutes, such as: 90 minutes, 3 hours")
        return None
    return minutes


def _check(read: _Reader, plan: Plan) -> None:
    """Record the problems of the plan as a whole."""
    names = [source.name for source in plan.sources]
    for name in {name for name in names if names.count(name) > 1}:
        read.add(f"sources: {name}", "two sources have this name; rename one (of: targets takes the names of targets)")
    if names and plan.baseline not in names:
        hint = "add it to the sources, or name another" if plan.baseline == "pretrained" else "name one of the sources"
        read.add("baseline", f"{plan.baseline}: no such source; {hint}")
    elif names and names == [plan.baseline] and plan.sequence is None:
        read.add("sources", "only the baseline is here, and nothing to compare with it; add a source")
    else:
        baseline = next((source for source in plan.sources if source.name == plan.baseline), None)
        if baseline and baseline.only:
            read.add("baseline", f"{plan.baseline}: has no runs for other targets than its `only`; leave `only` out")
    for target in plan.targets:
        if 0 in target.rows and not any(source.serves(target, 0) for source in plan.sources):
            read.add(
                f"targets: {target.name}", f"rows 0: no source of kind {' or '.join(SAME_TASK)} that could be scored "
                "without training; remove 0"
            )  # fmt: skip
