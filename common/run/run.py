"""Train into an output folder, keep the record of the run, and publish the model."""

import dataclasses
import importlib
import shlex
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel

from common.args import (
    MEAN,
    WORST,
    DataArguments,
    FileArguments,
    TrainingArguments,
    check_together,
    resume_rules,
    score_of_rows,
)
from common.data.columns import SAVED, described
from common.data.domains import domain_counts
from common.errors import InputError, in_main_process, is_main_process, tell
from common.hardware import peak_memory, reset_peak_memory
from common.run.fingerprint import recipe_folder
from common.run.folder import OutputFolder
from common.run.record import new_record, now
from common.run.report import fenced, print_domains, write_json_lines, write_model_card
from common.training import checkpoints
from common.training.trainer import Trainer
from common.tuning.methods import METHODS

NOT_MERGED = """`{tuning}` cannot be merged into the weights: `base/` has the model, `adapter/` the trained parameters.
The `predict` of the recipe and `common.inference.predictor.load_saved` load this folder with both."""


class Run:
    """A run that holds its output folder until the process ends, and keeps its record in `run.json`.

    Creating a run only looks at the folder (`common.run.folder`); `start` makes room there. On several processes only
    the main one touches the folder, and all resume from the checkpoint that it chose.

    Attributes:
        folder: the output folder.
        recipe: name of the recipe's folder.
        record: the content of `run.json`.
        rules: argument -> how resuming treats another value (see `common.args`).
        checkpoint: the checkpoint folder to resume from; None for a run from the start.
        opened: the last run of this process.
        trained: the run of this process whose model is trained and not saved yet; None without one.
    """

    opened: "ClassVar[Run | None]" = None
    trained: "ClassVar[Run | None]" = None
    _trainer: Trainer

    def __init__(self, args: TrainingArguments, data_args: DataArguments, *more: Any, rows: DatasetDict):
        """Lock and check the folder.

        Args:
            args: the arguments of the training.
            data_args: the arguments of the data; the file of their class is in the folder of the recipe.
            *more: further dataclasses of arguments.
            rows: the data of the run; the record keeps their hash.

        Raises:
            InputError: arguments do not fit together; the folder cannot be used (`OutputFolder.open`); or the run
                cannot resume as asked.
        """
        if find_spec("matplotlib") is None:  # imported after training, because it is slow
            raise InputError("matplotlib: is not installed, and the run draws pictures with it; run: make setup")
        check_together(args, data_args, more)
        if "train" in rows:  # several tasks have their rows by task
            args.choose_length(len(rows["train"]))
        self.folder = args.folder
        self.recipe = recipe_folder(data_args).name
        self._columns = described(data_args.columns(), next(iter(rows.values())))
        self._predict_arguments = data_args.predict_arguments()
        self._domains = domain_counts(rows)
        self._package = type(data_args).__module__.rpartition(".")[0]
        self.rules = resume_rules(map(type, (data_args, *more, args)))
        self.record = new_record(args, data_args, more, rows)
        self._output = OutputFolder(self.folder, self.record, self.rules)
        self._started = False
        Run.opened = self
        self.checkpoint: str | None = in_main_process(lambda: self._output.open(args))

    def leave(self) -> None:
        """Do as `OutputFolder.leave`, unless the run has started."""
        if not self._started and is_main_process():
            self._output.leave()

    def start(self) -> None:
        """Make room in the folder once everything before training has succeeded. A second call does nothing."""
        if self._started:
            return
        self._started = True
        if is_main_process():
            self._output.clear()
        self.save()

    def train(self, trainer: Trainer) -> None:
        """Start the run, train from `checkpoint` on, and save the state and metrics of training.

        Raises:
            InputError: the trained model could not be saved.
        """
        cast(PreTrainedModel, trainer.model).config.update({SAVED: self._columns})  # predict finds the same columns
        args = trainer.args
        if self.checkpoint and args.max_steps <= 0:
            trainer.check_steps(self.checkpoint)
        trainer.check_saving()
        count, unit = (args.max_steps, "step") if args.max_steps > 0 else (args.num_train_epochs, "epoch")
        length = f"{count:g} {unit}{'s' * (count != 1)}"
        precision = self.record["hardware"]["precision"]
        tell(f"training for {length} with {trainer.step_rows} rows a step, in {precision}, into {self.folder}")
        with self.phase("train"):
            result = trainer.train(resume_from_checkpoint=self.checkpoint)
            self._trainer, Run.trained = trainer, self
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()

    def save_scores(
        self, trainer: Trainer, split: str, measured: dict[str, float], scores: dict[str, float]
    ) -> dict[str, float]:
        """Write the scores of a split to `<split>_results.json`.

        Args:
            trainer: the trainer.
            split: prefix of the names of the scores, such as `test`.
            measured: metrics of the trainer, under names with the prefix.
            scores: further scores, under names without it.

        Returns:
            All scores, under names with the prefix.
        """
        prefixed = measured | {f"{split}_{name}": value for name, value in scores.items()}
        trainer.save_metrics(split, prefixed)
        self.save()  # the record of a killed run names its files
        return prefixed

    def publish(
        self,
        trainer: Trainer,
        *,
        task: str,
        scores: Iterable[str],
        split: str,
        metrics: dict[str, float],
        usage: str,
        base_model: str | None = None,
        example: str | Path | None = None,
        **record: Any,
    ) -> None:
        """Save the model with its model card, finish the record, and push both to the hub under `--push_to_hub`.

        Args:
            trainer: the trainer, after training. Its `model` becomes the merged one.
            task: a task of the hub, such as `token-classification`.
            scores: names of the scores on the card: for split `test`, `f1` is `metrics["test_f1"]`, or
                `metrics["after_test_f1"]`. A score that `metrics` lacks is left out.
            split: the split of these scores, as in the names in `metrics`.
            metrics: all scores of the run, for the record.
            usage: lines of Python that load and use the model.
            base_model: the checkpoint on the card; default: `--model_name_or_path`.
            example: the file of rows in the printed command; default: the test rows, or else the validation rows.
            **record: further entries of `run.json`.
        """
        args, tuning = trainer.args, trainer.tuned.tuning
        trainer.model = trainer.merged(str(self.folder), save=args.should_save)
        of_rows = score_of_rows(args.metric_for_best_model)
        scores = (*scores, f"{MEAN}{of_rows}", f"{WORST}{of_rows}")
        names = {name: (f"{split}_{name}", f"after_{split}_{name}") for name in scores}
        print_domains(metrics, split)
        apart = tuning.method in METHODS and METHODS[tuning.method].saved == "apart"
        write_model_card(
            self.folder,
            task=task,
            base_model=base_model or self.record["arguments"]["model_name_or_path"],
            scores={name: metrics[key] for name, keys in names.items() for key in keys if key in metrics},
            split=split,
            record=self.record,
            usage=NOT_MERGED.format(tuning=tuning.tuning) if apart else f"```python\n{fenced(usage)}\n```",
        )
        trainer.save_model(_internal_call=True)  # do not push yet; pushed below once the folder is complete
        if args.save_fisher:
            trainer.save_fisher()
        Run.trained = None
        self.save()
        record |= {"domains": self._domains} if self._domains else {}
        self.finish(scores=metrics, speed=trainer.speed.record(), **record)
        if args.push_to_hub:
            trainer.push_to_hub()
        tell(f"\nmodel, scores and predictions: {self.folder}")
        tell(f"use it: {self._predict_command(example)}")

    def _reading_arguments(self) -> list[str]:
        """Return the arguments that say how the files of the run are read."""
        words: list[str] = []
        for field in dataclasses.fields(FileArguments):
            value = self.record["arguments"].get(field.name, field.default)
            if value != field.default:
                values = value if isinstance(value, list) else [str(value).lower() if value is False else str(value)]
                words += [f"--{field.name}", *values]
        return words

    def _predict_command(self, example: str | Path | None = None) -> str:
        """Return a command that runs the saved model, on a file that exists if the run has read one."""
        files = [self.record["data"].get(f"{split}_file", {}).get("file") for split in ("test", "validation", "train")]
        file = example or next(filter(None, files), None)
        output = f"{self.folder}-predicted.jsonl" if file else "NEW_FILE.jsonl"
        names = {"MODEL": str(self.folder), "INPUT": _from_here(file) if file else "YOUR_FILE", "OUTPUT": output}
        arguments = (self._reading_arguments() if file else []) + self._predict_arguments
        names |= {"ARGS": shlex.join(arguments)} if arguments else {}
        words = [f"{name}={_quoted(value)}" for name, value in names.items()]
        return " ".join(["make predict", f"RECIPE={self.recipe}", *words])

    def predict_unlabeled(self, rows: Dataset | None) -> None:
        """Write `predictions_test.jsonl` for test rows without gold values by the recipe's predict, after `publish`.

        Args:
            rows: the rows, in columns that predict reads; None if the test rows have gold values, or there are none.
        """
        if rows is None or not is_main_process():
            return
        predict = importlib.import_module(f"{self._package}.predict")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "test.jsonl")
            write_json_lines(file, rows)
            output = str(self.folder / "predictions_test.jsonl")
            predict.main(["--model", str(self.folder), "--input", str(file), "--output", output, "--overwrite", "true"])
        self.save()

    def rescue(self) -> str:
        """Save the trained model after a failure; return a message with its folder and the commands to go on with."""
        trainer = self._trainer
        existing = checkpoints.in_order(self.folder)
        again = "run the command again with --resume_from_checkpoint true, which repeats only the rest"
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # saving needs all processes
            return f"{self.folder}: the trained model is in {existing[0].name}; {again}" if existing else ""
        trainer.model = trainer.merged(str(self.folder), save=trainer.args.should_save)
        trainer.save_model(_internal_call=True)
        self.save()
        rest = f"; for the scores {again}" if existing else ""
        return f"{self.folder}: the trained model is saved here; use it: {self._predict_command()}{rest}"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record seconds and peak memory of a part of the run."""
        self.start()
        reset_peak_memory()
        start = time.perf_counter()
        yield
        self.record["phases"][name] = {"seconds": round(time.perf_counter() - start, 2)} | peak_memory()
        self.save()

    def finish(self, **more: Any) -> None:
        """Mark the run as finished, and add entries to the record."""
        self.record |= {"finished": now()} | more
        if is_main_process():
            self._output.give_back()
        self.save()

    def save(self) -> None:
        """Write `run.json`, with the names of the files written until now."""
        if is_main_process():
            self._output.save()


def _quoted(value: str) -> str:
    """Quote a word for the shell; in double quotes if it has single ones, which is easier to read."""
    return f'"{value}"' if "'" in value and not set(value) & set('"$`\\!') else shlex.quote(value)


def _from_here(path: str | Path) -> str:
    """Return the short name of a file in or below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
