"""Describe a plan: targets, sources, seeds and budget. `reading` reads it from a file."""

from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import InputError

#: kind -> what a report says of it; also the order of the columns
KINDS = {
    "scratch": "Starting from random weights",
    "frozen": "Training the head alone",
    "pretrained": "Fine-tuning",
    "adapted": "Continued pretraining on",
    "intermediate": "Intermediate training on",
    "domain": "Training on the domain",
    "multilingual": "Training in the language",
}
#: kinds that train something before the target; the others start from the checkpoint, or from random weights
TRAINED_FIRST = ("adapted", "intermediate", "domain", "multilingual")
#: kinds whose task is that of the target, so that they can be scored without a row of it
SAME_TASK = ("domain", "multilingual")
#: bounds of a sequence: all tasks trained together, and each task alone
JOINT, ALONE = "joint", "alone"
#: number of training rows; None: all
Rows = int | None


@dataclass(frozen=True)
class Stage:
    """A training before that on the target.

    Attributes:
        recipe: name of the recipe, as in `make`.
        words: its arguments.
        rows: its training rows; None for all.
        target_texts: it trains on the texts of the target's training rows.
        score: name of its score; None for the one that picks the best checkpoint.
    """

    recipe: str
    words: tuple[str, ...] = ()
    rows: Rows = None
    target_texts: bool = False
    score: str | None = None


@dataclass(frozen=True)
class Target:
    """A task that the plan is about.

    Attributes:
        name: its name in the plan.
        recipe: name of the recipe, as in `make`.
        words: its arguments.
        rows: numbers of training rows, increasing; None for all.
        score: name of the score; None for the one that picks the best checkpoint.
    """

    name: str
    recipe: str
    words: tuple[str, ...]
    rows: tuple[Rows, ...]
    score: str | None = None


@dataclass(frozen=True)
class Source:
    """Something that training on a target begins with.

    Attributes:
        name: its name in the plan.
        kind: a key of `KINDS`.
        stages: the trainings before that on the target.
        model: its checkpoint; None for that of the plan.
        then: further arguments of the runs on a target.
        only: names of its targets; empty for all.
        task: name of the target that it is the training of; None for other tasks.
    """

    name: str
    kind: str
    stages: tuple[Stage, ...] = ()
    model: str | None = None
    then: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    task: str | None = None

    def serves(self, target: Target, rows: Rows) -> bool:
        """Return whether the plan has a cell for this source at a target with this number of rows."""
        if self.task == target.name or (self.only and target.name not in self.only):
            return False
        return rows != 0 or self.kind in SAME_TASK


@dataclass(frozen=True)
class Sequence:
    """Targets that are learned one after the other.

    Attributes:
        order: names of the targets.
        methods: name of a method -> arguments of each training after the first.
    """

    order: tuple[str, ...]
    methods: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Plan:
    """A checked plan; see the top of this module."""

    path: Path
    title: str
    seeds: tuple[int, ...]
    targets: tuple[Target, ...]
    sources: tuple[Source, ...]
    baseline: str = "pretrained"
    budget: float | None = None
    model: str | None = None
    equal_cost: bool = True
    forgetting: bool = True
    sequence: Sequence | None = None

    def source(self, name: str) -> Source:
        """Return a source by its name."""
        return next(source for source in self.sources if source.name == name)

    def with_seeds(self, seeds: tuple[int, ...]) -> "Plan":
        """Return the plan with other seeds."""
        return replace(self, seeds=seeds)

    def part(self, names: list[str] | None, most_rows: int | None) -> "Plan":
        """Return the plan for some of its targets, without numbers of rows above `most_rows`, which leaves "all" out.

        Raises:
            InputError: a target is unknown, or no number of rows is left.
        """
        known = [target.name for target in self.targets]
        for name in names or ():
            if name not in known:
                raise InputError(f"--targets {name}: the plan has no such target; choose from {', '.join(known)}")
        targets = []
        for target in self.targets:
            if names is None or target.name in names:
                rows = target.rows
                if most_rows is not None:
                    rows = tuple(number for number in rows if number is not None and number <= most_rows)
                if not rows:
                    raise InputError(f"--most_rows {most_rows}: leaves {target.name} without runs; give more")
                targets.append(replace(target, rows=rows))
        kept = {target.name for target in targets}
        sources = tuple(source for source in self.sources if not source.only or kept & set(source.only))
        order = tuple(name for name in self.sequence.order if name in kept) if self.sequence else ()
        sequence = replace(self.sequence, order=order) if self.sequence and len(order) > 1 else None
        return replace(self, targets=tuple(targets), sources=sources, sequence=sequence)

    def target(self, name: str) -> Target:
        """Return a target by its name."""
        return next(target for target in self.targets if target.name == name)
