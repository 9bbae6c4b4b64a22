"""Train on unlabelled rows in rounds: each is an ordinary run in a folder of its own."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import get_annotations
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import set_seed

from common.args import TrainingArguments
from common.cli import given_values
from common.data.pool import POOL, PoolArguments
from common.errors import InputError, in_main_process, tell, warn
from common.inference.predictor import load_saved
from common.run.contents import RECORD
from common.run.report import print_table, rows_named
from common.run.run import Run
from common.training import checkpoints
from common.training.semi import Unlabeled
from common.training.trainer import Trainer

#: begin of the names of scores without the unlabelled rows
WITHOUT = "without_"
#: arguments of a run that its teacher does not have
OWN = ("output_dir", "overwrite", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "run_name")


@dataclass(frozen=True)
class Teacher:
    """A trained model that labels unlabelled rows.

    Attributes:
        args: the arguments of the data.
        folder: its output folder.
        without: the folder of the run without unlabelled rows; `folder` itself in the first round.
        scores: the scores of the run without unlabelled rows.
    """

    args: PoolArguments
    folder: Path
    without: Path
    scores: dict[str, float]

    def labels(self, rows: DatasetDict, auto_class: type[Any], background: int | None = None) -> Unlabeled:
        """Return the encoded unlabelled rows of `rows` with the model in `folder`, for the trainer.

        Args:
            rows: the encoded splits, `POOL` among them.
            auto_class: class of transformers that loads the model.
            background: see `Unlabeled`.
        """
        return Unlabeled(rows[POOL], self.args, load_saved(auto_class, str(self.folder)), background)

    def compare(self, trainer: Trainer, metrics: dict[str, float], names: Sequence[str]) -> dict[str, float]:
        """Print the scores without and with the unlabelled rows, and warn if these lower the selecting score.

        Args:
            trainer: the trainer, after training.
            metrics: scores with the unlabelled rows, such as `test_f1`.
            names: names of the scores to show, without the split.

        Returns:
            The scores without the unlabelled rows, as `without_test_f1`, and the threshold and weight.
        """
        args, rows = trainer.args, []
        best = (args.metric_for_best_model or "loss").removeprefix("eval_")
        for split in ("eval", "test"):
            shown = [name for name in dict.fromkeys((*names, best)) if f"{split}_{name}" in self.scores]
            for name in shown:
                before, now = self.scores[f"{split}_{name}"], metrics[f"{split}_{name}"]
                rows.append([f"{rows_named(split)} {name.replace('_', ' ')}", before, now])
                if name == best and (now < before if args.greater_is_better else now > before):
                    warn(
                        f"the unlabelled rows make {name} of the {rows_named(split)} rows worse, {now:.4f} instead of "
                        f"{before:.4f}; use the model without them, {self.without}, or leave --semi out"
                    )
        steps = json.loads((self.without / checkpoints.STATE).read_text(encoding="utf-8"))["global_step"]
        tell("\nscores of the same seed without and with the unlabelled rows")
        print_table(["score", "without", "with"], [*rows, ["training steps", steps, trainer.state.global_step]])
        if steps != trainer.state.global_step:
            tell(
                f"longer training may be a part of the difference; equal steps: --max_steps {trainer.state.global_step}"
            )
        chosen = {"semi_threshold": trainer.threshold, "semi_weight": trainer.weight}
        return {f"{WITHOUT}{name}": value for name, value in self.scores.items()} | chosen


def open_run(
    main: Callable[[list[str]], dict[str, float]],
    argv: list[str] | None,
    args: TrainingArguments,
    data_args: PoolArguments,
    *more: Any,
    rows: DatasetDict,
) -> tuple[Run, Teacher | None]:
    """Open the run, and under `--semi` train its teacher first, in `<output_dir>-teacher`.

    The teacher is the run with the same arguments and seed and one round fewer; the last one trains on labelled rows
    only. Under `--resume_from_checkpoint true` a finished teacher is not trained again, and a stopped one resumes.

    Args:
        main: the `main` of the recipe.
        argv: its words; those of the command line if None.
        args: the arguments of the training.
        data_args: the arguments of the data.
        *more: further dataclasses of arguments.
        rows: the data of the run.

    Raises:
        InputError: see `Run`; or a finished teacher had other arguments or data.
    """
    if data_args.semi is None:
        return Run(args, data_args, *more, rows=rows), None
    rounds = data_args.semi_rounds or 1
    earlier = [args.folder.with_name(args.folder.name + "-teacher" * number) for number in range(1, rounds + 1)]
    folder = earlier[0]
    resume = bool(args.resume_from_checkpoint)
    before, begun = in_main_process(lambda: (_record(folder), any(map(_record, earlier)))) if resume else (None, False)
    if args.resume_from_checkpoint is True and begun and not in_main_process(lambda: _stopped(args.folder)):
        args.resume_from_checkpoint = None  # the run stopped in an earlier round
    run = Run(args, data_args, *more, rows=rows)
    if before and before["finished"]:
        _check_same(before, run, folder, rounds)
        scores = before["scores"]
    else:
        what = "without the unlabelled rows" if rounds == 1 else f"with --semi_rounds {rounds - 1}"
        tell(f"first a run {what}, whose model labels them: {folder}")
        words = _words(tuple(map(type, (*more, data_args, args))), argv, rounds - 1)
        words += ["--output_dir", str(folder)]
        words += ["--overwrite", "true"] if args.overwrite else []
        if in_main_process(lambda: _stopped(folder) or any(map(_record, earlier[1:]))) and resume:
            words += ["--resume_from_checkpoint", "true"]
        try:
            scores = main(words)
        except InputError:
            run.leave()
            raise
        Run.opened = run
        gc.collect()  # the model of the teacher, in cycles of its trainer
    set_seed(args.seed)
    inner = {n.removeprefix(WITHOUT): value for n, value in scores.items() if n.startswith(WITHOUT)}
    return run, Teacher(data_args, folder, earlier[-1], inner or scores)


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _stopped(folder: Path) -> bool:
    return bool(checkpoints.in_order(folder))


def _check_same(before: dict[str, Any], run: Run, folder: Path, rounds: int) -> None:
    """Raise `InputError` if the finished teacher in `folder` had other data or arguments than the run gives it."""
    record = json.loads(json.dumps(run.record))
    left_out = {*OWN, "semi_rounds", *(get_annotations(PoolArguments) if rounds == 1 else ())}
    left_out |= {name for name, rule in run.rules.items() if rule in ("incidental", "splits_step")}
    rows = {split: digest for split, digest in record["rows"].items() if split in before["rows"]}
    changed = [f"--{n}" for n, value in record["arguments"].items() if n not in left_out]
    changed = [name for name in changed if before["arguments"].get(name[2:]) != record["arguments"][name[2:]]]
    changed += ["data"] * (before["rows"] != rows) + ["model files"] * (before["base_model"] != record["base_model"])
    if changed:
        raise InputError(
            f"--resume_from_checkpoint: the finished run in {folder} differs in {', '.join(changed)}; give the "
            "same, or leave --resume_from_checkpoint out"
        )


def _words(types: tuple[type, ...], argv: list[str] | None, rounds: int) -> list[str]:
    """Return the words of a run with `rounds` rounds, without the arguments of `OWN`."""
    given = given_values(types, argv)
    left_out = {*OWN, "semi_rounds", *(() if rounds else get_annotations(PoolArguments))}
    values = {name: value for name, value in given.items() if name not in left_out}
    values |= {"semi_rounds": str(rounds)} if rounds else {}
    return [word for n, v in values.items() for word in ([f"--{n}={v}"] if isinstance(v, str) else [f"--{n}", *v])]
