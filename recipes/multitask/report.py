"""Print and draw how each task is trained, print its scores, and save its model."""

from pathlib import Path

import numpy as np

from common import training
from common.args import MEAN
from common.errors import InputError, is_main_process, tell, warn
from common.run import Run, print_table
from common.run.joint import JointTask
from common.run.report import fenced, print_domains, rows_named, write_model_card
from common.run.run import NOT_MERGED
from common.tuning.tune import is_beside

from .steps import Trainer, summary

Scores = dict[str, dict[str, dict[str, float]]]
#: panels of the picture: title and prefix of the values in the log
PANELS = {
    "loss (nats a label)": "loss",
    "norm of the gradient": "grad_norm",
    "weight in the loss": "weight",
    "rows seen": "rows",
}


def print_plan(trainer: Trainer) -> None:
    """Print the rows of each task, and how many of them a step and the run take; warn of rows that are left out."""
    batches = trainer.make_batches(trainer.train_dataset)
    rows = []
    passes = []
    taken = sum(batches.counts(epoch).sum(0) for epoch in range(-(-batches.total // batches.epoch_steps)))
    taken = taken * batches.total / (batches.epoch_steps * -(-batches.total // batches.epoch_steps))
    for i, name in enumerate(trainer.trainers):
        passes.append(float(taken[i] / batches.sizes[i]))
        rows.append([name, f"{batches.sizes[i]:,}", f"{taken[i] / batches.total:.1f}", f"{passes[i]:.1f}"])
    how = trainer.sharing
    tell(f"\n{how.batches} batches, --sampling {how.sampling}, --weighting {how.weighting}")
    print_table(["task", "training rows", "rows a step", "passes"], rows)
    never = [name for name, number in zip(trainer.trainers, passes, strict=True) if number < 1]
    if never:
        warn(
            f"{', '.join(never)}: the run takes less than one pass over the rows; raise --num_train_epochs, or choose "
            "another --sampling"
        )


def check_scores(trainer: Trainer, before: Scores) -> None:
    """Raise `InputError` if a task does not have the score in the file of tasks, or if less of it is better."""
    for name, score in trainer.scores.items():
        less = ("loss", *trainer.trainers[name].args.lower_is_better)
        known = ", ".join(sorted(one for one in before[name]["eval"] if one not in less))
        if score in less:
            raise InputError(f"task {name}: score: {score}: less of it is better; choose one of {known}")
        if score not in before[name]["eval"]:
            raise InputError(f"task {name}: score: {score}: the task has no such score; choose one of {known}")


def values_of(trainer: Trainer, prefix: str, name: str) -> list[tuple[float, float]]:
    """Return step and value of each entry of the log."""
    key = f"{prefix}_{name}"
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry and "loss" in entry]


def print_training(trainer: Trainer) -> None:
    """Print rows, tokens, losses, norms of gradients and weights of each task over the run."""
    rows = []
    for name, (seen, tokens) in trainer.seen.items():
        losses, norms, weights = (
            [value for _, value in values_of(trainer, prefix, name)] for prefix in ("loss", "grad_norm", "weight")
        )
        cells = ["", "", "", "", ""]  # a run may be shorter than --logging_steps
        if losses:
            numbers = losses[0], losses[-1], float(np.mean(norms)), weights[0], weights[-1]
            cells = [f"{number:.3f}" for number in numbers]
        rows.append([name, f"{seen:,}", f"{tokens:,}", *cells])
    tell("\ntraining by task")
    print_table(["task", "rows seen", "tokens", "loss, first", "last", "gradient", "weight, first", "last"], rows)


def draw(path: Path, trainer: Trainer) -> None:
    """Draw loss, norm of the gradient, weight and rows of each task by step."""
    if not is_main_process():
        return
    from matplotlib.figure import Figure  # a slow import, not needed elsewhere

    figure = Figure(figsize=(10.0, 7.0), layout="constrained")
    for number, (title, prefix) in enumerate(PANELS.items(), 1):
        axes = figure.add_subplot(2, 2, number)
        axes.set(xlabel="step", ylabel=title)
        for name in trainer.trainers:
            if points := values_of(trainer, prefix, name):
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        if number == 1 and axes.lines:
            figure.legend(loc="outside upper center", ncols=len(trainer.trainers))
    figure.savefig(path, dpi=120)


def test(folder: Path, trainers: dict[str, training.Trainer], tasks: dict[str, JointTask]) -> Scores:
    """Return the scores of each task, and write the predictions for its test rows into a folder of its name."""
    for name in tasks if is_main_process() else ():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {name: task.test(trainers[name], folder / name) for name, task in tasks.items()}


def test_scores(found: Scores, before: Scores, scores: dict[str, str]) -> dict[str, float]:
    """Return the test scores of each task as `TASK_SCORE`, those before training as `before_...`, mean and worst."""
    metrics: dict[str, float] = {}
    main = {}
    for name, splits in found.items():
        if "test" in splits:
            metrics |= {f"{name}_{score}": value for score, value in splits["test"].items()}
            main[name] = splits["test"][scores[name]]
            metrics[f"before_{name}_{scores[name]}"] = before[name]["test"][scores[name]]
    if main:
        metrics |= {name.removeprefix("_"): value for name, value in summary(main, "").items()}
    return metrics


def print_scores(found: Scores, before: Scores, scores: dict[str, str]) -> None:
    """Print the score of each task, after training and before it."""
    rows = []
    for name, score in scores.items():
        split = "test" if "test" in found[name] else "eval"
        rows.append([name, score, rows_named(split), before[name][split][score], found[name][split][score]])
    tell("\nscores; before training, a head is a linear probe where its recipe has one, else random")
    print_table(["task", "score", "rows", "before", "after"], rows)
    for name, value in summary({row[0]: row[4] for row in rows}, "").items():
        tell(f"{name.removeprefix('_')} over the tasks: {value:.4f}")
    for name, splits in found.items():
        split = "test" if "test" in splits else "eval"
        if any(score.startswith(MEAN) for score in splits[split]):
            tell(f"\ntask {name}")
            print_domains({f"{split}_{score}": value for score, value in splits[split].items()}, split)


def write_cards(run: Run, trainer: Trainer, tasks: dict[str, JointTask], found: Scores) -> None:
    """Write the model card of each task into its folder."""
    for name, task in tasks.items():
        folder, split = run.folder / name, "test" if "test" in found[name] else "eval"
        usage = f"```python\n{fenced(task.usage.format(folder=folder))}\n```"
        write_model_card(
            folder,
            task=task.pipeline,
            base_model=run.record["arguments"]["model_name_or_path"],
            scores={score: found[name][split][score] for score in task.headline if score in found[name][split]},
            split=split,
            record=run.record,
            usage=NOT_MERGED.format(tuning="--sharing adapter") if is_beside(trainer.trainers[name].model) else usage,
        )


def finish(run: Run, tasks: dict[str, JointTask]) -> None:
    """Let each task write its further files, and name all files in the record of the run."""
    for task in tasks.values():
        task.finish()
    run.save()
