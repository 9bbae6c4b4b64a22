"""Train each task alone, for as many updates and for as many minutes as beside the others, and compare the scores."""

import json
import math
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import given_values, parse
from common.errors import InputError, tell, warn
from common.run import Run, print_table, write_json_lines
from common.run.fingerprint import differences, fingerprint
from common.run.joint import JointTask
from common.tools import runner
from common.tools.transfer.statistics import Arm, Effect, difference, row_draws
from common.tools.transfer.tasks import read_predictions, statistics_of

from .reading import LIMITS, Entry, module_of, passed_on, words_for
from .report import Scores
from .steps import Trainer

#: kinds of single runs
UPDATES, MINUTES = "same updates", "same minutes"
#: arguments that a single run gets from its budget, in place of those of this run
BUDGET = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "eval_strategy",
    "eval_steps", "save_strategy", "save_steps", "logging_steps",
)  # fmt: skip
#: a single run for as many minutes is another run only if it takes this factor of the steps
LEAST_FACTOR = 1.05


def check(trainer: Trainer) -> None:
    """Raise `InputError` if single runs cannot be compared with this run."""
    if trainer.args.world_size > 1:
        raise InputError("--compare_single: trains each task in one process; run the command without GPUS=")
    if trainer.args.keep in ("ewc", "lwf") or trainer.args.save_fisher:
        name = "save_fisher" if trainer.args.save_fisher else f"keep {trainer.args.keep}"
        raise InputError(f"--compare_single: cannot be combined with --{name}; leave one of them out")


def budget_of(trainer: Trainer, index: int) -> tuple[int, int]:
    """Return the steps of the run that had rows of a task, and the mean number of its rows in them, rounded."""
    batches, steps = trainer.train_batches, trainer.state.global_step
    counts = np.concatenate([batches.counts(epoch) for epoch in range(-(-steps // batches.epoch_steps))])[:steps, index]
    updates = int((counts > 0).sum())
    return updates, max(1, round(counts.sum() / max(1, updates)))


class Singles:
    """The single runs of a run of several tasks, in a folder beside that of the run.

    A finished run is taken again if arguments, code, files and machine are still the same. A stopped one is trained
    from its beginning, so that its seconds are known.
    """

    def __init__(self, run: Run, trainer: Trainer, entries: list[Entry], tasks: dict[str, JointTask], argv):
        self.folder = run.folder.with_name(f"{run.folder.name}-single")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trainer, self.tasks = trainer, tasks
        self.entries = {entry.name: entry for entry in entries}
        given = given_values(run_arguments(), argv)
        kept = {name: given[name] for name in ("learning_rate", "early_stopping_patience") if name in given}
        passed = passed_on(run_arguments(), argv) | kept
        self.given = {name: value for name, value in passed.items() if name not in BUDGET}
        evaluations = sum("eval_mean" in entry for entry in trainer.state.log_history) - 1  # one is after training
        self.evaluations = max(1, evaluations)

    def words(self, name: str, steps: int, rows: int) -> list[str]:
        """Return the arguments of a single run."""
        every = str(max(1, math.ceil(steps / self.evaluations)))
        entry = self.entries[name]
        limits = LIMITS if entry.texts_of else ()  # they drew the rows whose texts these are
        given = {key: value for key, value in self.given.items() if key not in limits}
        words = words_for(entry, given) + self._texts(name)
        words += ["--max_steps", str(steps), "--per_device_train_batch_size", str(rows), "--logging_steps", every]
        words += ["--eval_strategy", "steps", "--eval_steps", every, "--save_strategy", "steps", "--save_steps", every]
        return [*words, "--metric_for_best_model", self.tasks[name].score, "--seed", str(self.trainer.args.seed)]

    def _texts(self, name: str) -> list[str]:
        """Write the texts of a task on the texts of others; return the arguments that name the files."""
        if not self.entries[name].texts_of:
            return []
        words = []
        for split, rows in self.tasks[name].data.items():
            file = self.folder / f"{name}-{split}.jsonl"
            write_json_lines(file, rows)
            words += [f"--{split}_file", str(file)]
        return words

    def result(self, name: str, kind: str, words: list[str], now: dict[str, Any]) -> dict[str, Any] | None:
        """Return the measurements of a finished run with these arguments; None if it has to be trained."""
        file = self.output(name, kind).with_suffix(".json")
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = ["steps or arguments"] if found["words"] != words else differences(found["made_with"], now)
        if changed or "error" in found:
            tell(f"{file}: trained again: {', '.join(changed) or found['error']}")
            return None
        return found

    def output(self, name: str, kind: str) -> Path:
        """Return the output folder of a run."""
        return self.folder / f"{name}-{kind.rpartition(' ')[2]}"

    def train(self, budgets: Iterable[tuple[str, str, int, int]]) -> dict[tuple[str, str], dict[str, Any]]:
        """Train runs, each of a task, a kind, a number of steps and of rows in a step; return their measurements."""
        results: dict[tuple[str, str], dict[str, Any]] = {}
        jobs, made = [], {}
        for name, kind, steps, rows in budgets:
            recipe, words = self.entries[name].recipe, self.words(name, steps, rows)
            output = self.output(name, kind)
            parsed = parse(module_of(recipe, "train").ARGUMENTS, [*words, "--output_dir", str(output)])
            now = fingerprint(parsed)
            known = self.result(name, kind, words, now)
            if known is not None:
                results[name, kind] = known
                continue
            made[name, kind] = {"words": words, "made_with": now}
            shutil.rmtree(output, ignore_errors=True)
            begin = partial(runner.start, recipe, words, output, None, 1)
            tell(f"{name} alone, {kind}: {steps} steps of {rows} rows, into {output}")
            jobs.append(((name, kind), begin))
        for key, child in runner.in_turn(iter(jobs), 1):
            results[key] = made[key] | child.outcome()
            runner.keep(child.folder.with_suffix(".json"), json.dumps(results[key], indent=1))
            if "error" in results[key]:
                warn(f"{key[0]} alone, {key[1]}: {results[key]['error']}; {child.log} has the rest")
            else:
                runner.remove_weights(child.folder)
        return results


def run_arguments() -> tuple[type, ...]:
    """Return the dataclasses of the arguments of this recipe."""
    return module_of(Path(__file__).resolve().parent.name, "train").ARGUMENTS


def compare(
    run: Run, trainer: Trainer, entries: list[Entry], tasks: dict[str, JointTask], found: Scores, argv: list[str] | None
) -> dict[str, float]:
    """Train each task alone, print and record the scores beside those of this run, and return them.

    Args:
        run: the finished run.
        trainer: its trainer.
        entries: the tasks in the file.
        tasks: the tasks.
        found: the scores of this run.
        argv: its words; those of the command line if None.
    """
    singles = Singles(run, trainer, entries, tasks, argv)
    seconds = run.record["phases"]["train"]["seconds"] + trainer.earlier_seconds
    budgets = {name: budget_of(trainer, index) for index, name in enumerate(tasks)}
    results = singles.train((name, UPDATES, *budget) for name, budget in budgets.items())
    longer = []
    for name in tasks:
        result = results[name, UPDATES]
        own = result.get("train_seconds")
        factor = seconds / own if own else 1.0
        if "error" in result or factor < LEAST_FACTOR:
            results[name, MINUTES] = result
        else:
            longer.append((name, MINUTES, round(budgets[name][0] * factor), budgets[name][1]))
    results |= singles.train(longer)
    rows, record, metrics = [], {}, {}
    for name, task in tasks.items():
        split = "test" if "test" in found[name] else "eval"
        ours = found[name][split][task.score]
        record[name] = {"score": task.score, "together": ours}
        for kind in (UPDATES, MINUTES):
            result = results[name, kind]
            if "error" in result:
                rows.append([name, kind, ours, "failed", "", ""])
                continue
            theirs = runner.score_of(result, task.score)[1]
            trained = UPDATES if result is results[name, UPDATES] else kind
            folder = singles.output(name, trained)
            effect = effect_of(singles.entries[name].recipe, task.score, run.folder / name, folder)
            interval = f"{effect.low:+.4f} to {effect.high:+.4f}" if effect else "unknown"
            rows.append([name, kind, ours, theirs, f"{ours - theirs:+.4f}", interval])
            record[name][kind] = {"alone": theirs, "gain": ours - theirs, "verdict": verdict(ours - theirs, effect)}
            record[name][kind] |= {"low": effect.low, "high": effect.high} if effect else {}
            metrics[f"alone_{kind.rpartition(' ')[2]}_{name}_{task.score}"] = theirs
    tell("\ntogether against alone; 95 % intervals by a bootstrap over the test rows, one seed")
    print_table(["task", "alone with", "together", "alone", "gain", "interval"], rows)
    for name, of_task in record.items():
        for kind in (UPDATES, MINUTES):
            if kind in of_task:
                tell(f"{name}, {kind}: {of_task[kind]['verdict']}")
    run.finish(scores=run.record["scores"] | metrics, single=record)
    return metrics


def effect_of(recipe: str, score: str, ours: Path, theirs: Path) -> Effect | None:
    """Return the difference of two runs on the same test rows; None for a score that is no function of rows."""
    files = [folder / "predictions_test.jsonl" for folder in (ours, theirs)]
    if not all(file.is_file() for file in files):
        return None
    try:
        both = [statistics_of(recipe)(read_predictions(file), score) for file in files]
    except InputError:
        return None
    if len({len(one.values) for one in both}) > 1:
        return None
    arms = [Arm(np.array([one.of_all()]), row_draws(one)[None], len(one.values)) for one in both]
    return difference(*arms)


def verdict(gain: float, effect: Effect | None) -> str:
    """Say in words what training beside the other tasks has done."""
    if effect is None:
        return f"{'higher' if gain > 0 else 'lower' if gain < 0 else 'equal'} together, without an interval"
    if effect.low > 0:
        return f"the other tasks help: {gain:+.4f}"
    if effect.high < 0:
        return f"the other tasks hurt: {gain:+.4f}"
    return f"no sure difference: {gain:+.4f}"
