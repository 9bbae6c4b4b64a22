"""Search for the best values of a recipe's arguments, with Optuna.

    make sweep RECIPE=ner TRIALS=20
    make sweep RECIPE=ner ARGS="--train_file my.jsonl --validation_file dev.jsonl"
    python -m common.tools.sweep ner --space my_space.yaml --folder /shared/sweep --trials 50
    python -m recipes.ner.train --config outputs/sweep/ner/best.yaml

The search space is `recipes/RECIPE/sweep.yaml`. An argument has bounds (`low`, `high`; `log: true` for a logarithmic
scale; integers if both bounds are) or `choices`, and `first`, the value of the first trial. All other arguments go to
every trial.

A trial trains the recipe and stops after the training. The score that picks the best checkpoint, on the validation
rows, decides; the test rows stay unseen. After each evaluation a trial is pruned if its score is worse than the median
of earlier trials at the same evaluation (Golovin et al. 2017, section 3.2.2). The tree-structured Parzen estimator
proposes values (Bergstra et al. 2011, https://papers.nips.cc/paper/4443).

The folder `outputs/sweep/RECIPE` holds all trials in `journal.log`, and the best arguments so far in `best.yaml`, which
`--config` takes. The same command resumes a stopped sweep in the middle of its trial; a warning says if code, files or
packages changed since the earlier trials, and `--fresh` begins again. Machines that share the folder
work on one sweep. To use one process per GPU: `CUDA_VISIBLE_DEVICES=0 make sweep &`.
"""

import argparse
import importlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import optuna
import transformers
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from transformers import TrainerCallback

from common.args import TrainingArguments
from common.cli import command_line, given_values, parse, training_module
from common.data import yaml_text
from common.data.pool import PoolArguments
from common.errors import InputError, Problems, RunStopped, one_line, tell, warn
from common.run.fingerprint import NAMES, differences, fingerprint
from common.tools.runner import check_no_token
from common.training import checkpoints

#: arguments that a sweep sets
OWN = ("--output_dir", "--overwrite", "--resume_from_checkpoint")
KEYS = {"low", "high", "log", "choices", "first"}
STOPPED = (130, 143)


class Trained(Exception):
    """Signal the end of the training of a trial; the rest of the recipe is skipped."""


class Failed(Exception):
    """Signal a failed trial, such as one with a loss that is not finite; the sweep continues."""


class Report(TrainerCallback):
    """Report the score of each evaluation to the trial, prune the trial, and end the run after the training."""

    def __init__(self, trial: Trial, so_far: dict[int, float]):
        self.trial, self.scores = trial, so_far

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        name = (args.metric_for_best_model or "loss").removeprefix("eval_")
        if f"eval_{name}" not in metrics:  # of one of several tasks, each with a trainer of its own
            return
        number = sum(f"eval_{name}" in entry for entry in state.log_history)  # includes the evaluations before a resume
        if number in self.scores:
            return
        self.scores[number] = metrics[f"eval_{name}"]
        self.trial.report(self.scores[number], number)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def on_train_end(self, args, state, control, **kwargs):
        raise Trained


# The space


def read_space(path: Path, fits: Callable[[str, Any], None]) -> dict[str, dict[str, Any]]:
    """Read a search space from a YAML file. `fits(name, value)` raises `InputError` if the recipe rejects a value."""
    try:
        space = yaml_text.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {one_line(error)}") from None
    if not isinstance(space, dict) or not space:
        raise InputError(f"{path}: write a line for each argument, such as: weight_decay: {{low: 0.0, high: 0.1}}")
    problems = Problems()
    for name, about in space.items():
        try:
            if not isinstance(about, dict) or not about.keys() <= KEYS:
                raise InputError(f"give low and high, or choices, and optionally log and first; not {about}")
            choices = about.get("choices")
            if choices is None:
                bounds = [_number(about.get(key)) for key in ("low", "high")]
                if bounds[0] >= bounds[1] or (about.get("log") and bounds[0] <= 0):
                    raise InputError(f"low must be below high, and above 0 if log is true; not {about}")
                about["low"], about["high"] = bounds
            elif not isinstance(choices, list) or not choices or "low" in about or "high" in about:
                raise InputError(f"choices must be a list, without low and high; not {about}")
            if choices is None and "first" in about:
                about["first"] = _number(about["first"])
            if "first" in about and not (
                about["first"] in choices if choices else about["low"] <= about["first"] <= about["high"]
            ):
                raise InputError(f"first must lie in the space; not {about}")
            for value in choices or bounds:
                fits(str(name), value)
        except InputError as error:
            problems.add(str(path), f"{name}: {error}")
    problems.check()
    return space


def check_one_training(parsed: tuple[Any, ...]) -> None:
    """Raise `InputError` under `--semi`, where the first training, which ends a trial, has no unlabelled rows."""
    semi = next((part.semi for part in parsed if isinstance(part, PoolArguments)), None)
    if semi is not None:
        raise InputError(f"--semi {semi}: a sweep would score the training without the unlabelled rows; leave it out")


def _number(value: Any) -> float | int:
    """Return a number from YAML, which reads 2e-5 as text."""
    if isinstance(value, bool) or value is None:
        raise InputError(f"low and high must be numbers, not {value}")
    try:
        return value if isinstance(value, int) else float(value)
    except ValueError:
        raise InputError(f"low and high must be numbers, not {value}") from None


def suggest(trial: Trial, space: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the values of a trial for all arguments of the space."""
    values = {}
    for name, about in space.items():
        if "choices" in about:
            values[name] = trial.suggest_categorical(name, about["choices"])
        elif isinstance(about["low"], int) and isinstance(about["high"], int):
            values[name] = trial.suggest_int(name, about["low"], about["high"], log=bool(about.get("log")))
        else:
            values[name] = trial.suggest_float(name, about["low"], about["high"], log=bool(about.get("log")))
    return values


# Trials


def run(main: Callable, words: list[str], folder: Path, trial: Trial, so_far: dict[int, float]) -> dict[int, float]:
    """Train or resume in `folder`, report to `trial`, and return the score of each evaluation by its number."""
    report = Report(trial, so_far)
    again = ["--resume_from_checkpoint", "true"] if checkpoints.in_order(folder) else ["--overwrite"]
    folder.mkdir(parents=True, exist_ok=True)
    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS  # may hold objects as well as classes
    callbacks.append(report)
    try:
        with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            main([*words, "--output_dir", str(folder), *again])
    except Trained:
        pass
    finally:
        callbacks.remove(report)
    return report.scores


def go_on_with_stopped(study: optuna.Study) -> None:
    """Queue the stopped and killed trials of this machine again; each resumes from its checkpoint.

    (The heartbeat of Optuna works with databases only.)
    """
    here, all_trials = socket.gethostname(), study.get_trials(deepcopy=False)
    gone_on = {trial.user_attrs.get("goes_on") for trial in all_trials}
    for old in all_trials:
        about = old.user_attrs
        dead = old.state == TrialState.RUNNING and about.get("machine") == here and not _alive(about["process"])
        if not dead and not (about.get("stopped") == here and old.number not in gone_on):
            continue
        if dead:
            study.tell(old.number, state=TrialState.FAIL)
        study.enqueue_trial(old.params, user_attrs={"goes_on": old.number, "folder": about["folder"]})


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # the trial belonged to an earlier process with the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def done(study: optuna.Study) -> list[FrozenTrial]:
    """Return the ended trials, failures included; a stopped trial does not count."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [t for t in ended if t.state != TrialState.FAIL or t.user_attrs.get("failed")]


def forget(storage: JournalStorage, name: str, folder: Path) -> None:
    """Remove a study and the folders of its trials."""
    if name not in optuna.get_all_study_names(storage):
        return
    for trial in optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False):
        if "folder" in trial.user_attrs:
            shutil.rmtree(folder / trial.user_attrs["folder"], ignore_errors=True)
    optuna.delete_study(study_name=name, storage=storage)


def warn_of_changes(study: optuna.Study, now: dict[str, Any]) -> None:
    """Warn of ended trials that would not be made in the same way now; `now` is the fingerprint of a trial."""
    changes = [differences(trial.user_attrs.get("made_with", {}), now) for trial in done(study)]
    names = [name for name in NAMES.values() if any(name in of_trial for of_trial in changes)]
    if names:
        warn(
            f"{sum(map(bool, changes))} of {len(changes)} trials were made with other {', '.join(names)}; the sweep "
            "continues with their results; --fresh begins again"
        )


# Best arguments


def write_config(path: Path, values: dict[str, Any], comment: str) -> None:
    """Write a YAML file for `--config` atomically."""
    lines = [f"# {comment}", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())]
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    new.replace(path)


def read_options(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a sweep, and the words of arguments for all trials."""
    parser = argparse.ArgumentParser(
        prog="python -m common.tools.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe")
    parser.add_argument("--trials", type=int, default=20, help="total number of trials, earlier calls included")
    parser.add_argument("--unpruned", type=int, default=5, help="number of complete trials before pruning starts")
    parser.add_argument("--fresh", action="store_true", help="remove the trials of earlier calls and begin again")
    parser.add_argument("--space", type=Path, help="YAML file of the search space; default: recipes/RECIPE/sweep.yaml")
    parser.add_argument("--folder", type=Path, help="folder of the sweep; default: outputs/sweep/RECIPE")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> optuna.Study:
    """Run a sweep, and return its study."""
    options, words = read_options(argv)
    recipe = importlib.import_module(training_module(options.recipe))
    taken = [word for word in words if word.split("=")[0] in OWN]
    if taken:
        raise InputError(f"{taken[0]}: is set by the sweep; leave it out")
    check_no_token(words)
    parsed = parse(recipe.ARGUMENTS, words)
    check_one_training(parsed)
    args = next(a for a in parsed if isinstance(a, TrainingArguments))
    if args.eval_strategy == "no":
        raise InputError("--eval_strategy no: a sweep needs evaluations; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("WORLD_SIZE: a trial takes one process; start the sweep without a launcher, once for each GPU")
    given = given_values(recipe.ARGUMENTS, words)
    space_file = options.space or Path("recipes", options.recipe.partition("-")[0], "sweep.yaml")

    def fits(name: str, value: Any) -> None:
        if name in given:
            raise InputError(f"is in the space and also given as --{name}; leave one of them out")
        check_one_training(parse(recipe.ARGUMENTS, [*words, f"--{name}={value}"]))

    space = read_space(space_file, fits)
    folder = (options.folder or Path("outputs", "sweep", options.recipe)).resolve()
    folder.mkdir(parents=True, exist_ok=True)

    # Study
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    direction: Literal["maximize", "minimize"] = "maximize" if args.greater_is_better else "minimize"
    if options.fresh:
        forget(storage, options.recipe, folder)
    study = optuna.create_study(study_name=options.recipe, storage=storage, direction=direction, load_if_exists=True)
    about = json.loads(json.dumps({"recipe": options.recipe, "arguments": given, "space": space}))
    if study.user_attrs.get("about", about) != about:
        raise InputError(f"{folder}: holds a sweep with other arguments or another space; give another --folder")
    if study.direction.name.lower() != direction:
        raise InputError(f"{folder}: holds a sweep of another score; give another --folder")
    study.set_user_attr("about", about)
    now = fingerprint(parsed)
    del now["hardware"]  # machines share a sweep
    warn_of_changes(study, now)
    go_on_with_stopped(study)
    first = {name: about["first"] for name, about in space.items() if "first" in about}
    if first and not study.get_trials(deepcopy=False):
        study.enqueue_trial(first)
    study.sampler = optuna.samplers.TPESampler(
        constant_liar=True
    )  # no seed: with one all machines would try the same values
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=options.unpruned)

    def objective(trial: Trial) -> float:
        if "folder" not in trial.user_attrs:
            trial.set_user_attr("folder", f"trial-{trial.number}")
        trial.set_user_attr("made_with", now)
        trial.set_user_attr("process", os.getpid())
        trial.set_user_attr("machine", socket.gethostname())  # set last: its presence implies the other attributes
        output = folder / trial.user_attrs["folder"]
        values, so_far = suggest(trial, space), {}
        before = trial.user_attrs.get("goes_on")
        if before is not None and checkpoints.in_order(output):
            so_far = dict(study.trials[before].intermediate_values)
            for number, score in so_far.items():
                trial.report(score, number)
        try:
            arguments = [*words, *(f"--{name}={value}" for name, value in values.items())]
            scores = run(recipe.main, arguments, output, trial, so_far)
        except (RunStopped, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) or error.code in STOPPED:
                trial.set_user_attr("stopped", socket.gethostname())
                raise
            trial.set_user_attr("failed", str(error))
            raise Failed from None
        finally:
            if "stopped" not in trial.user_attrs:
                for path in [*output.glob("*.safetensors"), *checkpoints.in_order(output)]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        numbers = [score for score in scores.values() if not math.isnan(score)]
        if not numbers:
            trial.set_user_attr("failed", "no evaluation has a score that is a number")
            raise Failed
        return (max if args.greater_is_better else min)(numbers)

    def report(study: optuna.Study, trial: FrozenTrial) -> None:
        count = len(done(study))
        values = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
        outcome = {
            TrialState.COMPLETE: lambda: f"{trial.value:.4f}",
            TrialState.PRUNED: lambda: f"pruned after evaluation {trial.last_step}",
            TrialState.FAIL: lambda: trial.user_attrs["failed"],
        }[trial.state]()
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = f" (best {study.best_value:.4f}, trial {study.best_trial.number})" if complete else ""
        tell(f"{count} of {options.trials}: trial {trial.number}: {values}: {outcome}{best}")
        if complete:
            comment = f"trial {study.best_trial.number} of {count}: {args.metric_for_best_model} {study.best_value:.4f}"
            write_config(folder / "best.yaml", given | study.best_params, comment)
        if count >= options.trials:
            study.stop()

    if len(done(study)) < options.trials:
        try:
            # gc: a Trainer and its model are in a reference cycle
            study.optimize(objective, catch=(Failed,), callbacks=[report], gc_after_trial=True)
        except RunStopped as error:
            if error.code in STOPPED:
                raise RunStopped(f"{error}; run the same command again to resume the sweep", error.code) from None
            raise
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        raise InputError(f"{folder}: no trial is complete; read {folder}/trial-*.log")
    tell(f"best: {study.best_value:.4f}, trial {study.best_trial.number}: {folder}/best.yaml")
    return study


if __name__ == "__main__":
    command_line(main)
