"""Turn a plan into chains of runs: what each run trains, on which model, and what it is shared by.

A run has a key: a hash of its recipe, its arguments with the content of their files, its seed, and the key of the model
that it starts from. Equal runs of several cells or plans are one run.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from common.errors import InputError, Problems, warn
from common.models import Seq2SeqModelArguments
from common.tools.runner import keep
from common.tools.transfer.plan import SAME_TASK, Plan, Rows, Source, Stage, Target
from common.tools.transfer.tasks import Task, Tasks, check_feeds, statistics_of

#: arguments of a run that only scores a model: a step with learning rate 0 changes no weight
SCORE_ONLY = ("--learning_rate", "0", "--max_steps", "1", "--save_strategy", "no")


@dataclass(frozen=True)
class Random:
    """A checkpoint with the configuration and the tokenizer of `model` and random weights."""

    model: str
    seed: int

    @property
    def key(self) -> str:
        """Return the hash of what the checkpoint depends on."""
        return _hash(["random", self.model, self.seed])


@dataclass(frozen=True)
class Run:
    """A training of a recipe, or a run that only scores a model.

    Attributes:
        task: the recipe with its arguments.
        words: further arguments.
        seed: the seed.
        start: the model that it starts from; None for the checkpoint in its arguments.
        gpus: see `common.tools.runner.launcher`.
        label: what a progress line says of it.
    """

    task: Task = field(compare=False)
    words: tuple[str, ...]
    seed: int
    start: "Run | Random | Graft | None" = None
    gpus: int | None = None
    label: str = field(default="", compare=False)
    identity: str = ""

    @cached_property
    def key(self) -> str:
        """Return the hash of what the result depends on."""
        start = self.start and self.start.key
        return _hash([self.identity, list(self.words), self.seed, start, self.gpus])

    @property
    def only_scores(self) -> bool:
        """Return whether no weight changes."""
        return self.words[-len(SCORE_ONLY) :] == SCORE_ONLY

    def needs(self) -> "tuple[Run, ...]":
        """Return the runs whose models this run reads."""
        if isinstance(self.start, Graft):
            return self.start.head, self.start.body
        return (self.start,) if isinstance(self.start, Run) else ()

    def chain(self) -> "Iterator[Run]":
        """Yield the runs before this one, in order, and this one."""
        for run in self.needs():
            yield from run.chain()
        yield self


@dataclass(frozen=True)
class Graft:
    """A model of the weights of two runs: the head of one, all other weights of the other."""

    head: Run
    body: Run

    @property
    def key(self) -> str:
        """Return the hash of what the model depends on."""
        return _hash(["graft", self.head.key, self.body.key])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


#: factors of longer training are powers of this
STEP = 1.5
#: target, source and number of rows
Place = tuple[str, str, Rows]


@dataclass
class Chains:
    """The runs of a plan.

    Attributes:
        plan: the plan.
        tasks: the task of each target, with all its rows.
        cells: the runs of each cell, one a seed.
        first: for each target and source the runs of its last stage, one a seed.
        first_tasks: for each target and source the task of its last stage.
        first_scores: for each target and source the name of the score of that task.
        forgetting: for each target and source the runs that score the source's task after the target, one a seed.
        longer: for each cell the runs that spend its minutes on the baseline; set by `add_longer`.
        sequence: for each method of the sequence, the number of tasks learned and the number of a task: the runs that
            score the task, one a seed. `JOINT` has 1 as the number of tasks learned.
        notes: what the plan cannot do, in sentences.
    """

    plan: Plan
    tasks: dict[str, Task]
    cells: dict[Place, tuple[Run, ...]] = field(default_factory=dict)
    first: dict[tuple[str, str], tuple[Run, ...]] = field(default_factory=dict)
    first_tasks: dict[tuple[str, str], Task] = field(default_factory=dict)
    first_scores: dict[tuple[str, str], str] = field(default_factory=dict)
    forgetting: dict[tuple[str, str], tuple[Run, ...]] = field(default_factory=dict)
    longer: dict[Place, tuple[Run, ...]] = field(default_factory=dict)
    sequence: dict[tuple[str, int, int], tuple[Run, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def runs(self) -> list[Run]:
        """Return all runs, each once, in an order in which each follows the runs that it needs."""
        groups = [
            *(*self.cells.values(), *self.longer.values(), *self.forgetting.values()),
            *self.sequence.values(),
        ]
        # seed by seed: a stopped plan then has whole columns
        ordered = [run for seed in self.plan.seeds for group in groups for run in group if run.seed == seed]
        return list({run.key: run for last in ordered for run in last.chain()}.values())

    def encoders(self) -> set[str]:
        """Return the names of the checkpoints that the chains begin with."""
        begun = [run for run in self.runs() if not run.needs()]
        named = [
            run.start.model if isinstance(run.start, Random) else run.task.model.model_name_or_path for run in begun
        ]
        return {"a new one" if run.task.new or not name else name for run, name in zip(begun, named, strict=True)}

    def kept(self) -> set[str]:
        """Return the keys of the runs whose models stay: those of sources, which other plans may use."""
        return {stage.key for group in self.first.values() for last in group for stage in last.chain()}


def build(plan: Plan, tasks: Tasks, folder: Path, gpus: int | None = None) -> Chains:
    """Return the chains of a plan.

    Args:
        plan: the plan.
        tasks: loads the rows.
        folder: gets the files of `texts: target`.
        gpus: see `common.tools.runner.launcher`.

    Raises:
        InputError: a recipe rejects its arguments or rows, a target has too few rows, or a source cannot feed it.
    """
    problems, loaded = Problems(), {}
    for target in plan.targets:
        where = f"{plan.path}: targets: {target.name}"
        try:
            loaded[target.name] = task = tasks.load(target.recipe, target.words + _of_model(plan.model))
            statistics_of(target.recipe)([], target.score or task.score)  # refuses a score without statistics
            _check_rows(target, task)
        except InputError as error:
            problems.add(where, str(error))
    chains = Chains(plan, loaded)
    for target in plan.targets:
        for source in plan.sources if target.name in loaded else ():
            where = f"{plan.path}: sources: {source.name}"
            try:
                _add(chains, target, source, tasks, folder, gpus)
            except InputError as error:
                problems.add(where, str(error))
    problems.check()
    for target in plan.targets:
        if not any(place[0] == target.name for place in chains.cells):
            rows = ", ".join(map(shown, target.rows))
            problems.add(f"{plan.path}: targets: {target.name}", f"no source can be scored at {rows}; add other rows")
    problems.check()
    return chains


def _of_model(model: str | None) -> tuple[str, ...]:
    return ("--model_name_or_path", model) if model else ()


def of_rows(rows: Rows) -> tuple[str, ...]:
    """Return the arguments that draw a number of training rows."""
    return () if rows is None else ("--max_train_samples", str(rows))


def _check_rows(target: Target, task: Task) -> None:
    size = len(task.rows.pieces)
    large = [rows for rows in target.rows if rows is not None and rows >= size]
    if large:
        raise InputError(f"rows {large[0]}: there are {size:,} training rows; give all, or less")
    if not task.rows.evaluated[1]:
        raise InputError("there are no test rows with a reference; add --test_file")


def _add(chains: Chains, target: Target, source: Source, tasks: Tasks, folder: Path, gpus: int | None) -> None:
    """Add the cells of a source at a target."""
    model = source.model or chains.plan.model
    plan, task = chains.plan, tasks.load(target.recipe, target.words + _of_model(model))
    served = [rows for rows in target.rows if source.serves(target, rows)]
    if not served:
        return
    stages = [_stage(stage, model if first else None, task, tasks, folder) for first, stage in _numbered(source.stages)]
    for before, after in pairwise([*stages, task]):
        try:
            check_feeds(before, after, model)
        except InputError as error:
            raise InputError(f"cannot feed {target.name}: {error}") from None
    if source.kind == "scratch" and isinstance(task.model, Seq2SeqModelArguments) and task.new:
        raise InputError(f"{target.name} is from scratch already; leave the source out")
    words = {rows: of_rows(rows) + source.then for rows in served}
    if 0 in served:
        if stages[-1].rows.label_names != task.rows.label_names or stages[-1].recipe != target.recipe:
            served.remove(0)
            chains.notes.append(
                f"{source.name} is not scored on {target.name} without training: their labels differ, and the head "
                "would be new"
            )
        else:
            words[0] = SCORE_ONLY
    for rows in served:
        if source.then and rows != 0:
            task.args_with(words[rows])  # a mistake in `then` must be told before the first training
    for seed in plan.seeds:
        start: Run | Random | None = (
            Random(model or task.model.model_name_or_path, seed) if source.kind == "scratch" else None
        )
        for stage in stages:
            label = f"{source.name}: {stage.recipe}, seed {seed}"
            start = Run(stage, (), seed, start, gpus, label, stage.identity)
        if isinstance(start, Run):
            chains.first_tasks[target.name, source.name] = stages[-1]
            chains.first_scores[target.name, source.name] = source.stages[-1].score or stages[-1].score
            chains.first[target.name, source.name] = (*chains.first.get((target.name, source.name), ()), start)
        for rows in served:
            label = f"{target.name}, {shown(rows)}, {source.name}, seed {seed}"
            run = Run(task, words[rows], seed, start, gpus, label, task.identity)
            place = (target.name, source.name, rows)
            chains.cells[place] = (*chains.cells.get(place, ()), run)
    trained = [rows for rows in served if rows != 0]
    if plan.forgetting and stages and trained:
        _add_forgetting(chains, target, source, trained[-1], gpus)


def _numbered(stages: tuple[Stage, ...]) -> Iterator[tuple[bool, Stage]]:
    return ((number == 0, stage) for number, stage in enumerate(stages))


def _stage(stage: Stage, model: str | None, target: Task, tasks: Tasks, folder: Path) -> Task:
    """Return the task of a stage that starts from a checkpoint; None for that of its recipe, or for later stages."""
    words = stage.words
    if stage.target_texts:
        texts = "".join(json.dumps({"text": text}) + "\n" for text in target.rows.texts)
        file = folder / "texts" / f"{_hash(texts)}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            keep(file, texts)
        words = (*words, "--train_file", str(file))
    return tasks.load(stage.recipe, words + of_rows(stage.rows) + _of_model(model))


def _add_forgetting(chains: Chains, target: Target, source: Source, rows: Rows, gpus: int | None) -> None:
    """Add the runs that score the source's task with the model of the target.

    The same task with the same labels is scored with the trained head of the target, as a user would use the model.
    Another task gets the head of the source on the other weights of the target.
    """
    task, score = chains.first_tasks[target.name, source.name], chains.first_scores[target.name, source.name]
    own = chains.tasks[target.name]
    try:
        statistics_of(task.recipe)([], score)
    except InputError:
        return  # such as a language model: it has no score of rows
    if not task.rows.evaluated[1]:
        chains.notes.append(f"forgetting of {source.name} is unknown: it has no test rows; add --test_file")
        return
    same = source.kind in SAME_TASK and task.rows.label_names == own.rows.label_names and task.recipe == own.recipe
    firsts, cells = chains.first[target.name, source.name], chains.cells[target.name, source.name, rows]
    chains.forgetting[target.name, source.name] = tuple(
        replace(
            first,
            words=SCORE_ONLY,
            start=cell if same else Graft(first, cell),
            label=f"{source.name} after {target.name}, {shown(rows)}, seed {first.seed}",
        )
        for first, cell in zip(firsts, cells, strict=True)
    )


def kept_by(words: tuple[str, ...]) -> str | None:
    """Return the value of `--keep` in the arguments of a run; None without it."""
    pairs = zip(words, (*words, "")[1:], strict=True)
    return next((w.partition("=")[2] or value for w, value in pairs if w.partition("=")[0] == "--keep"), None)


def shown(rows: Rows) -> str:
    """Return a number of rows for people."""
    return "all rows" if rows is None else f"{rows:,} rows"


# Equal cost


def time_factors(
    chains: Chains,
    seconds: Callable[[Run], float | None],
    alike: Callable[[Sequence[Run]], bool] = lambda runs: True,
) -> dict[Place, float]:
    """Return for each cell how many times as long the baseline must train to spend the minutes of all its stages.

    Factors are rounded to powers of `STEP`, so that sources of like cost share the runs; cells that cost no more than
    the baseline are left out.

    Args:
        chains: the runs.
        seconds: returns the seconds of a run; None if they are unknown.
        alike: returns whether the seconds of runs can be compared: one kind of machine made them.
    """
    found = {}
    for place, runs in chains.cells.items():
        target, source, rows = place
        baseline = chains.cells.get((target, chains.plan.baseline, rows))
        if baseline is None or rows == 0 or (target, source) not in chains.first or source == chains.plan.baseline:
            continue
        other = False
        for ours, theirs in zip(runs, baseline, strict=True):
            costs = [[seconds(run) for run in last.chain()] for last in (ours, theirs)]
            if any(one is None for of_arm in costs for one in of_arm):
                continue  # resumed runs know only the seconds since then
            if other := not alike([*ours.chain(), *theirs.chain()]):
                continue
            source_cost, (*before, last) = sum(filter(None, costs[0])), [one or 0.0 for one in costs[1]]
            factor = (source_cost - sum(before)) / max(last, 1e-3)
            power = round(math.log(max(factor, 1e-3)) / math.log(STEP))
            if power > 0:
                found[place] = STEP**power
            break
        if other:
            chains.notes.append(
                f"equal cost of {source} at {target}, {shown(rows)}, is unknown: its runs and those of "
                f"{chains.plan.baseline} were made on different machines, or with another --at_once"
            )
    return found


def add_longer(chains: Chains, factors: dict[Place, float]) -> None:
    """Add for each cell the runs of the baseline that train `factors` times as long."""
    for place, factor in factors.items():
        target, _, rows = place
        baseline = chains.cells[target, chains.plan.baseline, rows]
        args = baseline[0].task.args_with(baseline[0].words)
        if args.max_steps > 0:
            words: tuple[str, ...] = ("--max_steps", str(round(args.max_steps * factor)))
        else:
            count = len(baseline[0].task.rows.texts) if rows is None else rows
            words = ("--num_train_epochs", f"{args.passes(count) * factor:g}")
            if args.num_train_epochs is None and args.eval_strategy == "epoch":  # few rows: not in each of many epochs
                share = f"{1 / args.usual_epochs / factor:.4g}"
                words += ("--eval_strategy", "steps", "--eval_steps", share)
                words += ("--save_strategy", "steps", "--save_steps", share) if args.save_strategy == "epoch" else ()
        chains.longer[place] = tuple(
            replace(run, words=run.words + words, label=f"{run.label}, {factor:g} times as long") for run in baseline
        )


def warn_of_notes(chains: Chains) -> None:
    """Warn of what the plan cannot do."""
    for note in chains.notes:
        warn(note)
