"""Learn the targets of a plan one after the other, and measure what is forgotten.

R[k][j] is the score on task j of the model that has learned the tasks 1 to k of T.

- Average accuracy: the mean of R[T][j] over all tasks (Lopez-Paz and Ranzato 2017, https://arxiv.org/abs/1706.08840).
- Backward transfer: the mean of R[T][j] - R[j][j] over the tasks before the last (the same).
- Forgetting: the mean of max R[k][j] - R[T][j] over the tasks before the last, with the maximum over k from j to T - 1
  (Chaudhry et al. 2018, https://arxiv.org/abs/1801.10112).

A task with the recipe and the labels of task k is scored with the head of model k, as a user would use it; another task
with its own head on the encoder of model k.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.args import DataArguments
from common.data.source import ending_of
from common.tools.runner import keep
from common.tools.transfer.chains import SCORE_ONLY, Chains, Graft, Run, kept_by, of_rows
from common.tools.transfer.plan import ALONE, JOINT, Target
from common.tools.transfer.statistics import Arm, Effect, difference
from common.tools.transfer.tasks import Task, Tasks


def add_sequence(chains: Chains, tasks: Tasks, folder: Path, gpus: int | None = None) -> None:
    """Add the runs of the plan's sequence.

    Args:
        chains: the runs of the plan.
        tasks: loads the rows.
        folder: gets the joined training files.
        gpus: see `common.tools.runner.launcher`.

    Raises:
        InputError: a recipe rejects the arguments of a method.
    """
    plan = chains.plan
    if plan.sequence is None:
        return
    targets = [plan.target(name) for name in plan.sequence.order]
    learned = [chains.tasks[target.name] for target in targets]
    for method, words in plan.sequence.methods.items():
        replayed = kept_by(words) == "replay"
        reason = (why_not_joined(learned[:-1], same_labels=False) or _drawn(targets[:-1])) if replayed else None
        if reason:
            chains.notes.append(f"{method} is left out of the sequence: {reason}")
            continue
        for seed in plan.seeds:
            _add_method(chains, targets, learned, method, words, seed, folder, gpus)
    reason = why_not_joined(learned, same_labels=True) or _drawn(targets)
    if reason:
        chains.notes.append(f"{JOINT} is left out of the sequence: {reason}")
        return
    together = (*targets[0].words, "--train_file", joined(learned, "train_file", folder))
    if all("validation_file" in files_of(task) for task in learned):
        together += ("--validation_file", joined(learned, "validation_file", folder))
    task = tasks.load(targets[0].recipe, together + (("--model_name_or_path", plan.model) if plan.model else ()))
    for seed in plan.seeds:
        whole = Run(task, (), seed, None, gpus, f"{JOINT}, seed {seed}", task.identity)
        for j, other in enumerate(learned):
            label = f"{targets[j].name} after {JOINT}, seed {seed}"
            _record(chains, JOINT, 0, j, Run(other, SCORE_ONLY, seed, whole, gpus, label, other.identity))


def _drawn(targets: Sequence[Target]) -> str | None:
    """Return why the training rows of targets cannot be joined, if only some of them are trained; else None."""
    names = [target.name for target in targets if target.rows[-1] is not None]
    return f"rows: {', '.join(names)}: a part is trained, and only whole files are joined; give all" if names else None


def _add_method(
    chains: Chains,
    targets: list[Target],
    learned: list[Task],
    method: str,
    words: tuple[str, ...],
    seed: int,
    folder: Path,
    gpus: int | None,
) -> None:
    """Add the trainings of a method with one seed, and the scores of all earlier tasks after each of them."""
    own: list[Run] = []
    for k, (target, task) in enumerate(zip(targets, learned, strict=True)):
        more = of_rows(target.rows[-1])
        if k:
            more += words
        if k and kept_by(words) == "replay":
            more += ("--replay_file", joined(learned[:k], "train_file", folder))
        if kept_by(words) == "ewc" and k < len(targets) - 1:
            more += ("--save_fisher", "true")
        label = f"{method}: {target.name} after {k} others, seed {seed}" if k else f"{target.name}, seed {seed}"
        if k:  # a mistake in the last training must be told before the first
            task.args_with(more)
        own.append(Run(task, more, seed, own[-1] if k else None, gpus, label, task.identity))
        for j, before in enumerate(own):
            if j == k:
                _record(chains, method, k, j, before)
                continue
            same = learned[j].recipe == task.recipe and learned[j].rows.label_names == task.rows.label_names
            start = own[k] if same else Graft(before, own[k])
            label = f"{method}: {targets[j].name} after {target.name}, seed {seed}"
            _record(chains, method, k, j, replace(before, words=SCORE_ONLY, start=start, label=label))


def _record(chains: Chains, method: str, k: int, j: int, run: Run) -> None:
    place = (method, k, j)
    chains.sequence[place] = (*chains.sequence.get(place, ()), run)


def files_of(task: Task) -> dict[str, str]:
    """Return argument -> file of a task."""
    return next(part for part in task.parsed if isinstance(part, DataArguments)).files()


def why_not_joined(learned: Sequence[Task], same_labels: bool) -> str | None:
    """Return why the training rows of tasks cannot be joined in one file; None if they can."""
    first = learned[0]
    columns = [next(part for part in task.parsed if isinstance(part, DataArguments)).columns() for task in learned]
    if any(task.recipe != first.recipe for task in learned):
        return "the tasks have several recipes"
    if same_labels and any(task.rows.label_names != first.rows.label_names for task in learned):
        return "the tasks have different labels"
    if any(other != columns[0] for other in columns):
        return "the tasks name their columns differently"
    if any(ending_of(Path(files_of(task).get("train_file", ""))) != ".jsonl" for task in learned):
        return "the training rows are no .jsonl files"
    return None


def joined(learned: Sequence[Task], argument: str, folder: Path) -> str:
    """Write the rows of the tasks into one file, named by its content, and return its path."""
    texts = [Path(files_of(task)[argument]).read_text(encoding="utf-8") for task in learned]
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    rows = [{k: v for k, v in json.loads(line).items() if k != "id"} for line in lines]  # ids repeat between files
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file = folder / "texts" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        keep(file, text)
    return str(file)


# What it shows


@dataclass
class Learned:
    """What a method of a sequence has learned, in points.

    Attributes:
        scores: the mean of R[k][j] over the seeds, by task k and task j; of a bound by 0 and j.
        average: average accuracy after the last task.
        forgetting: see the top of this module; None for a bound.
        backward: backward transfer; None for a bound.
    """

    scores: dict[tuple[int, int], float]
    average: Effect
    forgetting: Effect | None = None
    backward: Effect | None = None


def combined(arms: Sequence[Arm], weights: Sequence[float]) -> Arm:
    """Return the weighted sum of arms with the same seeds; their test rows are resampled as in each arm."""
    scores, draws = (
        sum(weight * getattr(arm, name) for weight, arm in zip(weights, arms, strict=True))
        for name in ("scores", "draws")
    )
    return Arm(np.asarray(scores), np.asarray(draws), min(arm.rows for arm in arms))


def best_of(arms: Sequence[Arm]) -> Arm:
    """Return for each seed the arm with the highest score."""
    scores = np.stack([arm.scores for arm in arms])
    best, seeds = scores.argmax(0), np.arange(scores.shape[1])
    return Arm(scores[best, seeds], np.stack([arm.draws for arm in arms])[best, seeds], arms[0].rows)


def learned_by(chains: Chains, arm_of: Callable[[Sequence[Run], str], Arm | None]) -> dict[str, Learned]:
    """Return what each method and each bound has learned; those whose runs have not all ended are left out.

    Args:
        chains: the runs of the plan.
        arm_of: `arm_of(runs, target)` returns the runs, scored on a target, in points of which more is better.
    """
    plan, found = chains.plan, {}
    if plan.sequence is None:
        return {}
    order = plan.sequence.order
    last = len(order) - 1
    for method in plan.sequence.methods:
        places = [(k, j) for k in range(last + 1) for j in range(k + 1)]
        arms = {place: arm_of(chains.sequence.get((method, *place), ()), order[place[1]]) for place in places}
        whole = {place: arm for place, arm in arms.items() if arm is not None}
        if len(whole) == len(places):
            found[method] = _learned(whole, last)
    joint = [arm_of(chains.sequence.get((JOINT, 0, j), ()), name) for j, name in enumerate(order)]
    alone = [arm_of(chains.cells.get((n, plan.baseline, plan.target(n).rows[-1]), ()), n) for n in order]
    for name, of_bound in ((JOINT, joint), (ALONE, alone)):
        all_ended = [arm for arm in of_bound if arm is not None]
        if len(all_ended) == len(order):
            scores = {(0, j): arm.mean for j, arm in enumerate(all_ended)}
            found[name] = Learned(scores, difference(combined(all_ended, [1 / len(order)] * len(order))))
    return found


def _learned(arms: dict[tuple[int, int], Arm], last: int) -> Learned:
    ended = [arms[last, j] for j in range(last + 1)]
    share = [1 / last] * last
    highest = [best_of([arms[k, j] for k in range(j, last)]) for j in range(last)]
    first = [arms[j, j] for j in range(last)]
    lost = [-one for one in share]
    return Learned(
        {place: arm.mean for place, arm in arms.items()},
        difference(combined(ended, [1 / (last + 1)] * (last + 1))),
        difference(combined([*highest, *ended[:-1]], [*share, *lost])),
        difference(combined([*ended[:-1], *first], [*share, *lost])),
    )
