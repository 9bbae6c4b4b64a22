"""Lock the output folder of a run, and keep its record `run.json`."""

import dataclasses
import fcntl
import hashlib
import importlib
import json
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
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
from common.errors import InputError, in_main_process, is_main_process, tell, warn
from common.hardware import hardware
from common.run.contents import RECORD, copy_aside, files_in, give_back, move_run, remove_run
from common.run.fingerprint import (
    COMMON,
    code_hash,
    files_below,
    model_hash,
    path_hash,
    plain,
    precision,
    recipe_folder,
    versions,
)
from common.run.report import fenced, print_domains, write_json_lines, write_model_card
from common.training import checkpoints
from common.training.trainer import Trainer
from common.tuning.methods import METHODS

NOT_MERGED = """`{tuning}` cannot be merged into the weights: `base/` has the model, `adapter/` the trained parameters.
The `predict` of the recipe and `common.inference.predictor.load_saved` load this folder with both."""


class Run:
    """A run that holds its output folder until the process ends, and keeps its record in `run.json`.

    Creating a run only looks at the folder; `start` clears it. A finished run that is replaced moves to
    `<output_dir>.previous`, or is removed under `--overwrite`. So do the files of a finished run that is resumed,
    without its checkpoints. A file of the user that the run overwrites comes back under another name
    (`common.run.contents`). On several processes only the main one touches the folder, and all resume from the
    checkpoint that it chose.

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
            InputError: the folder cannot be written; another live process holds it; it holds files that no run wrote;
                it holds a stopped run, and neither `--overwrite` nor `--resume_from_checkpoint` is given; the run
                reads a model, a checkpoint or a data file that it would replace; or it cannot resume as asked.
        """
        if find_spec("matplotlib") is None:  # imported after training, because it is slow
            raise InputError("matplotlib: is not installed, and the run draws pictures with it; run: make setup")
        check_together(args, data_args, more)
        if "train" in rows:  # several tasks have their rows by task
            args.choose_length(len(rows["train"]))
        self.folder = args.folder
        self._previous = self.folder.resolve().with_name(f"{self.folder.resolve().name}.previous")
        self.recipe = recipe_folder(data_args).name
        self._columns = described(data_args.columns(), next(iter(rows.values())))
        self._predict_arguments = data_args.predict_arguments()
        self._domains = domain_counts(rows)
        self._package = type(data_args).__module__.rpartition(".")[0]
        self.rules = resume_rules(map(type, (data_args, *more, args)))
        arguments = {k: v for part in (args, *more, data_args) for k, v in plain(part).items()}
        self.record: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": None,
            "command": _command(),
            "arguments": arguments,
            "data": {
                n: {"file": f, "sha256": path_hash(f), "bytes": sum(p.stat().st_size for p in files_below(f))}
                for n, f in data_args.files().items()
            },
            "rows": {split: _sha256_of_rows(data) for split, data in rows.items()},
            "code": code_hash(data_args),
            "base_model": model_hash(arguments["model_name_or_path"]),
            "versions": versions(),
            "git_commit": _git_commit(),
            "hardware": hardware() | {"processes": args.world_size, "precision": precision(args)},
            "phases": {},
            "files": [],
        }
        self._replaced: dict[str, Any] | None = None  # the record of the run that `start` replaces
        self._resumed: dict[str, Any] | None = None  # the record of the run in the folder that this one resumes
        self._keeps = False  # whether `start` keeps that run aside
        # files in the folder at the start of the run -> time of change; None: stays a file of the user if it changes
        self._initial_files: dict[str, int | None] | None = None
        self._created: tuple[list[Path], list[Path]] = ([], [])  # a lock and folders that this run has made
        Run.opened = self
        self.checkpoint: str | None = in_main_process(lambda: self._open(args))

    def _open(self, args: TrainingArguments) -> str | None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--output_dir {self.folder}: is a file; name a folder")
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        lock = self.folder / ".lock"
        self._created = ([] if lock.exists() else [lock], made)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            if self._read(self.folder) is not None:  # restores a checkpoint whose replacement was interrupted
                checkpoints.clear_staging(self.folder)
            checkpoint = self._checkpoint(args)
            self._check(args, checkpoint)
        except (OSError, InputError) as error:
            self.leave()
            if isinstance(error, InputError):
                raise
            raise InputError(f"--output_dir {self.folder}: cannot be written: {error.strerror}") from None
        if checkpoint:
            checkpoints.tell_of(checkpoint)
        return str(checkpoint) if checkpoint else None

    def leave(self) -> None:
        """Remove the lock and the folders that a run has made, if it is refused before it starts."""
        files, folders = self._created
        self._created = ([], [])
        if self._initial_files is None and is_main_process():
            with suppress(OSError):
                for file in files:
                    file.unlink()
                for folder in folders:
                    folder.rmdir()

    def _checkpoint(self, args: TrainingArguments) -> Path | None:
        if not args.resume_from_checkpoint:
            return None
        if args.resume_from_checkpoint is True:
            return checkpoints.newest_whole(self.folder, args.accept_unverified_checkpoint)
        return checkpoints.given(args.resume_from_checkpoint, args.accept_unverified_checkpoint)

    def _check(self, args: TrainingArguments, checkpoint: Path | None) -> None:
        empty = all(path.name in (".lock", checkpoints.STAGING) for path in self.folder.iterdir())
        where = f"--output_dir {self.folder}"
        before = self._read(self.folder)
        inside = checkpoint is not None and checkpoint.resolve().parent == self.folder.resolve()
        if not empty and before is None and not (inside and args.accept_unverified_checkpoint):
            raise InputError(f"{where}: holds files that no run of a recipe wrote; choose another --output_dir")
        if checkpoint is not None:
            origin = self._read(checkpoint.resolve().parent)
            if origin is None:
                warn(f"{checkpoint}: no record of its run (run.json); data and arguments may differ from that run")
            else:
                self._check_resume(origin, args, checkpoint)
        if inside:
            self._resumed = before
            self.record["files"] = before["files"] if before else []
            if before and before["finished"] is not None and not args.overwrite:
                self._keeps = True
                self._check_previous()
                self._tell_kept("the files of the finished run move")
        elif before is not None:
            self._check_replace(before, args, checkpoint)
            self._replaced = before

    def _check_resume(self, before: dict[str, Any], args: TrainingArguments, checkpoint: Path) -> None:
        """Raise `InputError` if the checkpoint does not fit the data, model or arguments; warn of other changes."""
        where = f"--resume_from_checkpoint {checkpoint}"
        if before["rows"] != self.record["rows"]:
            splits = [name for name, digest in self.record["rows"].items() if before["rows"].get(name) != digest]
            raise InputError(
                f"{where}: its run was on other data ({', '.join(splits) or 'other splits'}) and cannot resume; give "
                f"its data, or train its weights on this data by --model_name_or_path {checkpoint} without "
                "--resume_from_checkpoint"
            )
        if before["base_model"] != self.record["base_model"]:
            raise InputError(
                f"{where}: the files of --model_name_or_path are not those of its run; restore them, or leave "
                "--resume_from_checkpoint out"
            )
        self._check_arguments(before)
        if before["code"] != self.record["code"]:
            warn("resuming with changed code; results may differ from the original run")
        step = checkpoints.saved_step(checkpoint)
        if 0 < args.max_steps < step:
            raise InputError(f"--max_steps {args.max_steps}: {checkpoint} is of step {step}; give at least {step}")
        inside = checkpoint.resolve().parent == self.folder.resolve()
        newer = [p.name for p in checkpoints.in_order(self.folder) if inside and checkpoints.step_of(p) > step]
        if newer and args.resume_from_checkpoint is not True:  # true has already warned about each
            warn(f"{', '.join(newer)}: newer than {checkpoint.name}; remove, or a later resume takes the newest")

    def _check_replace(self, before: dict[str, Any], args: TrainingArguments, checkpoint: Path | None) -> None:
        """Raise `InputError` if the run in the folder must not be replaced; print whether it is kept or removed."""
        where = f"--output_dir {self.folder}"
        if not args.overwrite and before["finished"] is None and checkpoints.in_order(self.folder):
            raise InputError(
                f"{where}: holds a stopped run; resume it with --resume_from_checkpoint true, drop it with "
                "--overwrite, or choose another --output_dir"
            )
        self._keeps = not args.overwrite and before["finished"] is not None
        if self._keeps:
            self._check_previous()
        model = self.record["arguments"]["model_name_or_path"]  # None for a new model
        read = [("model_name_or_path", model), ("resume_from_checkpoint", checkpoint)]
        read += [(argument, file["file"]) for argument, file in self.record["data"].items()]
        for name, path in read:
            for folder in [self.folder.resolve(), *([self._previous] if self._keeps else [])]:
                if path and Path(path).exists() and Path(path).resolve().is_relative_to(folder):
                    raise InputError(
                        f"{where}: --{name} {path} would be replaced by this run; choose another --output_dir"
                    )
        if self._keeps:
            self._tell_kept("the finished run moves")
        else:
            tell(f"{self.folder}: the run there is removed when training begins")

    def _check_previous(self) -> None:
        """Raise `InputError` unless the finished run can move to `<output_dir>.previous`."""
        if self._previous.is_symlink():
            raise InputError(f"{self._previous}: is a link, and the finished run would move here; rename it")
        if self._previous.exists() and any(self._previous.iterdir()):
            kept = self._read(self._previous)
            name = kept and Path(kept["arguments"]["output_dir"]).name
            if kept is None or kept["finished"] is None or name != self.folder.resolve().name:
                raise InputError(
                    f"{self._previous}: the finished run would move here, but this folder is not its previous run; "
                    "rename it, or give --overwrite to remove the finished run"
                )

    def _tell_kept(self, what: str) -> None:
        instead = " in place of the run there" if (self._previous / RECORD).exists() else ""
        tell(f"{self.folder}: {what} to {self._previous.name}{instead} when training begins")

    def start(self) -> None:
        """Clear the folder once everything before training has succeeded. A second call does nothing."""
        if self._initial_files is not None:
            return
        self._initial_files = {}
        if is_main_process():
            before = self._replaced or self._resumed
            if self._keeps and before is not None:
                self._keep_aside(before, with_checkpoints=self._resumed is None)
                self.record["files"] = []
            if self._replaced is not None:
                remove_run(self.folder, self._replaced)  # `save` replaces the record
                self._give_back()
            # beside a finished run all other files are of the user; a stopped run may have files missing in its record
            known = before is None or before["finished"] is not None
            files = files_in(self.folder)
            self._initial_files = {name: None if known else time for name, time in files.items()}
            copy_aside(self.folder, [name for name in files if name not in self.record["files"]])
        self.save()

    def _keep_aside(self, record: dict[str, Any], with_checkpoints: bool) -> None:
        """Move the files of the run in the folder to `<output_dir>.previous`, in place of the run there."""
        kept = self._read(self._previous) if self._previous.exists() else None
        if kept is not None and kept != record:  # equal if the process was killed while it moved this run
            remove_run(self._previous, kept)
        move_run(self.folder, record, self._previous, with_checkpoints)

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

    def _check_arguments(self, before: dict[str, Any]) -> None:
        """Raise `InputError` for changed arguments that a checkpoint cannot resume with; warn about the others."""
        then, now = before["arguments"], json.loads(json.dumps(self.record["arguments"]))
        sizes = [_step_size(record) for record in (before, self.record)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"--resume_from_checkpoint: the run took {sizes[0]} a step and would now take {sizes[1]}; give batch, "
                f"accumulation and processes with the product {sizes[0]}"
            )
        changed = [name for name in now if name in then and now[name] != then[name]]
        for name in changed:
            if self.rules.get(name) == "fixed":
                remedy = "leave it out" if then[name] is None else f"give --{name} {then[name]}"
                raise InputError(f"--{name}: the run has {then[name]} and cannot resume with {now[name]}; {remedy}")
        others = [f"--{name} {then[name]} to {now[name]}" for name in changed if name not in self.rules]
        if others:
            warn(f"resuming with changed arguments; results will differ from the original run: {', '.join(others)}")

    def _lock(self) -> None:
        """Lock the folder against other runs. The lock of a dead process is released by the kernel."""
        lock = self.folder / ".lock"
        self._lock_file = open(lock, "a+")  # noqa: SIM115  (an open file holds the lock)
        try:
            # a POSIX lock, not flock: a worker of the data loader that outlives a killed run would hold flock
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock_file.seek(0)
            raise InputError(
                f"--output_dir {self.folder}: in use by {self._lock_file.read().strip()}; wait, or choose another "
                "--output_dir"
            ) from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock_file.flush()

    def _read(self, folder: Path) -> dict[str, Any] | None:
        """Return the record of the run that wrote a folder; None without a record."""
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.keys() >= self.record.keys() else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record seconds and peak memory of a part of the run."""
        self.start()
        _reset_peak_memory()
        start = time.perf_counter()
        yield
        self.record["phases"][name] = {"seconds": round(time.perf_counter() - start, 2)} | _peak_memory()
        self.save()

    def finish(self, **more: Any) -> None:
        """Mark the run as finished, and add entries to the record."""
        self.record |= {"finished": datetime.now(UTC).isoformat(timespec="seconds")} | more
        if is_main_process():
            self._give_back()
        self.save()

    def _give_back(self) -> None:
        """Give the user's files back that a run has overwritten."""
        for name, beside in give_back(self.folder).items():
            warn(f"{self.folder / name}: written by the run; your file of this name is now {beside}")
            self._initial_files = (self._initial_files or {}) | {name: 0, beside: None}

    def save(self) -> None:
        """Write `run.json`, with the names of the files written until now."""
        if is_main_process():
            before = self._initial_files or {}
            written = {n for n, time in files_in(self.folder).items() if before.get(n, 0) not in (None, time)}
            self.record["files"] = sorted(written | set(self.record["files"]))
            new = self.folder / f"{RECORD}.new"
            with open(new, "w", encoding="utf-8") as file:
                file.write(json.dumps(self.record, indent=2, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.folder / RECORD)


def _step_size(record: dict[str, Any]) -> str:
    """Return the rows of an optimizer step, or its tokens under `--max_tokens_per_batch`, with the unit."""
    arguments, processes = record["arguments"], record["hardware"]["processes"]
    budget = arguments.get("max_tokens_per_batch")
    size = (budget or arguments["per_device_train_batch_size"]) * arguments["gradient_accumulation_steps"] * processes
    return f"{size} {'tokens' if budget else 'rows'}"


def _command() -> list[str]:
    """Return program and arguments as for `python -m`, without the hub token."""
    spec = sys.modules["__main__"].__spec__
    words = re.sub(r"(--hub[_-]token[\0=])[^\0]*", r"\1HIDDEN", "\0".join(sys.argv[1:])).split("\0")
    return [spec.name if spec else sys.argv[0], *filter(None, words)]


def _quoted(value: str) -> str:
    """Quote a word for the shell; in double quotes if it has single ones, which is easier to read."""
    return f'"{value}"' if "'" in value and not set(value) & set('"$`\\!') else shlex.quote(value)


def _sha256_of_rows(data: Dataset) -> str:
    """Return a hash of the rows of a data set, independent of file names."""
    digest = hashlib.sha256()
    for row in data:
        digest.update(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _from_here(path: str | Path) -> str:
    """Return the short name of a file in or below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _git_commit() -> str | None:
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=COMMON, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=COMMON, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")


def _reset_peak_memory() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    except OSError:
        pass
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> dict[str, int]:
    """Return the peak resident memory and GPU memory in MiB; of the whole process if the kernel cannot reset it."""
    try:
        status = Path("/proc/self/status").read_text()
        kib = int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    peaks = {"peak_memory_mib": kib // 1024}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return peaks
