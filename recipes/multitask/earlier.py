"""Go on after an earlier run: the model that each task starts from, and the importance of its weights (`--keep`).

The folder of `--after` has the model of one task, or an encoder with a folder for each task. In the second case, a task
of the same name and recipe starts from its own folder with its head, and any other task from the encoder.

Each of these folders has the importance of its weights, if the earlier run had `--save_fisher true`. That of the shared
weights is the sum over the tasks, as their losses are added up.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from common import training
from common.args import FISHER, TrainingArguments
from common.errors import InputError, tell
from common.models.load import LoadedModel, load_config, resolve_model
from common.training.continual import write_importance

from .arguments import SharingArguments
from .model import SharedModel, shared_parameters

#: arguments of this run that say how it goes on; `start_of` tells them to each task
KEEPING = ("after", "keep", "keep_strength", "keep_temperature", "replay_rows")
#: arguments of `KEEPING` that a task gets with its `--keep`
WITH = {"lwf": ("keep_strength", "keep_temperature"), "replay": ("replay_rows",)}


def earlier_tasks(after: str) -> dict[str, str]:
    """Return the recipe of each task of the run in a folder, by the name of the task; empty for a single model."""
    path = resolve_model(after)
    tasks = getattr(load_config(path), "tasks", None)
    tasks = tasks if isinstance(tasks, dict) else {}
    return {name: recipe for name, recipe in tasks.items() if Path(path, name, "config.json").is_file()}


def start_of(name: str, recipe: str, replays: bool, given: dict[str, str | list[str]]) -> list[str]:
    """Return the words of a task that say where it starts, and how its earlier rows are kept.

    Args:
        name: the task.
        recipe: its recipe.
        replays: whether it has a `replay_file`.
        given: the arguments of the run.
    """
    after, keep = given.get("after"), given.get("keep")
    if after is None:
        return []
    tasks = earlier_tasks(str(after))
    own = tasks.get(name) == recipe
    words = ["--after", str(Path(resolve_model(str(after)), name)) if own else str(after)]
    kept = replays if keep == "replay" else keep == "lwf" and (own or not tasks)
    if not kept:
        return words
    values = [
        word for argument in WITH[str(keep)] if argument in given for word in (f"--{argument}", str(given[argument]))
    ]
    return [*words, "--keep", str(keep), *values]


def check_keep(args: TrainingArguments, after: str | None, recipes: dict[str, str], replaying: list[str]) -> None:
    """Raise `InputError` if `--keep` has nothing to keep.

    Args:
        args: the arguments of the training.
        after: the folder of the earlier run.
        recipes: the recipe of each task.
        replaying: the tasks with a `replay_file`.
    """
    if args.keep == "replay" and not replaying:
        raise InputError("--keep replay: needs old rows; write a replay_file below a task in the file of --tasks")
    if args.keep != "replay" and replaying:
        raise InputError(f"task {replaying[0]}: replay_file: needs --keep replay; add it, or leave replay_file out")
    if after is None:
        return
    tasks = earlier_tasks(after)
    both = [name for name, recipe in recipes.items() if tasks.get(name) == recipe]
    if args.keep == "lwf" and tasks and not both:
        raise InputError(
            f"--keep lwf: no task here has the name and the recipe of one of {after}: {', '.join(tasks)}; name one so, "
            "or give --keep ewc"
        )
    if tasks and (new := [name for name in recipes if name not in both]):
        kept = ", and its rows have no old outputs to keep" if args.keep == "lwf" else ""
        tell(f"{', '.join(new)}: not among the tasks of {after}; starts from its encoder with a new head{kept}")


def check_sharing(args: TrainingArguments, sharing: SharingArguments) -> None:
    """Raise `InputError` if the importance of the weights could not be saved."""
    if args.save_fisher and sharing.sharing == "adapter":
        raise InputError("--save_fisher: --sharing adapter is not merged into the weights; leave it out")


def check_shared(loaded: dict[str, LoadedModel], own_layers: int) -> None:
    """Raise `InputError` if the models of two tasks differ in the weights that they are to share."""
    first: dict[str, Tensor] = {}
    for name, one in loaded.items():
        for weight, value in shared_parameters(one.model, own_layers).items():
            other = first.setdefault(weight, value)
            rows = min(len(value), len(other))  # a task may have added tokens
            if not torch.equal(value[:rows], other[:rows]):
                raise InputError(
                    f"task {name}: {weight} differs from that of {next(iter(loaded))}, as the earlier run had layers "
                    "for each task; give its --sharing"
                )


def importance_of(model: SharedModel, trainers: dict[str, training.Trainer]) -> dict[str, Tensor]:
    """Return the importance of each weight that an earlier run has, by its name in `model`.

    Raises:
        InputError: a folder that a task starts from has none.
    """
    ours = {id(value): name for name, value in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for name, trainer in trainers.items():
        file = Path(resolve_model(trainer.tuned.source or ""), FISHER)
        if not file.is_file():
            raise InputError(f"--keep ewc: task {name}: no {file}; train the earlier run with --save_fisher true")
        saved, part = load_file(file), model.tasks[name]
        for weight, value in part.named_parameters():
            plain = weight.removeprefix(f"{part.base_model_prefix}.")  # of a folder with the encoder alone
            known = saved.get(weight, saved.get(plain))
            if known is not None and weight not in trainer.tuned.new_parameters:
                found.setdefault(ours[id(value)], known)
    return found


def save_importance(
    folder: Path, model: SharedModel, trainers: dict[str, training.Trainer], earlier: dict[str, Tensor]
) -> None:
    """Save the importance of the weights for the training rows of all tasks, and for those before them.

    Args:
        folder: folder of the run.
        model: the trained model.
        trainers: the trainer of each task.
        earlier: the importance for earlier tasks, by the name of the weight in `model`.
    """
    ours = {id(value): name for name, value in model.named_parameters()}
    total = {name: value.clone() for name, value in earlier.items()}
    for name, trainer in trainers.items():
        part = dict(model.tasks[name].named_parameters())
        for weight, value in trainer.importance().items():
            place = ours[id(part[weight])]
            total[place] = total[place].to(value.device) + value if place in total else value
    for name, part in model.tasks.items():
        write_importance(folder / name, {weight: total[ours[id(value)]] for weight, value in part.named_parameters()})
    write_importance(folder, {weight: total[name] for weight, name in model.shared_names().items()})
