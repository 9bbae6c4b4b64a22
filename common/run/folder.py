"""Lock the output folder of a run, check that the run may write there, and keep what was in it."""

import fcntl
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.args import TrainingArguments
from common.errors import InputError, tell, warn
from common.run.contents import RECORD, copy_aside, files_in, give_back, move_run, remove_run
from common.run.record import read_record, step_size, write_record
from common.training import checkpoints


class OutputFolder:
    """The folder that one run writes into, locked until the process ends.

    `open` only looks at the folder; `clear` makes room. A finished run that is replaced moves to
    `<output_dir>.previous`, or is removed under `--overwrite`. So do the files of a finished run that is resumed,
    without its checkpoints. A file of the user that the run overwrites comes back under another name
    (`common.run.contents`).

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, record: dict[str, Any], rules: Mapping[str, str]):
        """Touch nothing yet.

        Args:
            path: the folder.
            record: the record of the run, which `save` writes; its entry `files` is kept here.
            rules: argument -> how resuming treats another value (see `common.args`).
        """
        self.path = path
        self._record = record
        self._rules = rules
        self._previous = path.resolve().with_name(f"{path.resolve().name}.previous")
        self._replaced: dict[str, Any] | None = None  # the record of the run that `clear` replaces
        self._resumed: dict[str, Any] | None = None  # the record of the run in the folder that this one resumes
        self._keeps = False  # whether `clear` keeps that run aside
        # files in the folder at the start of the run -> time of change; None: stays a file of the user if it changes
        self._initial_files: dict[str, int | None] | None = None
        self._created: tuple[list[Path], list[Path]] = ([], [])  # a lock and folders that this run has made

    def open(self, args: TrainingArguments) -> str | None:
        """Lock the folder, and return the checkpoint to resume from, if any.

        Raises:
            InputError: the folder cannot be written; another live process holds it; it holds files that no run wrote;
                it holds a stopped run, and neither `--overwrite` nor `--resume_from_checkpoint` is given; the run
                reads a model, a checkpoint or a data file that it would replace; or it cannot resume as asked.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--output_dir {self.path}: is a file; name a folder")
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        lock = self.path / ".lock"
        self._created = ([] if lock.exists() else [lock], made)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if self._read(self.path) is not None:  # restores a checkpoint whose replacement was interrupted
                checkpoints.clear_staging(self.path)
            checkpoint = self._checkpoint(args)
            self._check(args, checkpoint)
        except (OSError, InputError) as error:
            self.leave()
            if isinstance(error, InputError):
                raise
            raise InputError(f"--output_dir {self.path}: cannot be written: {error.strerror}") from None
        if checkpoint:
            checkpoints.tell_of(checkpoint)
        return str(checkpoint) if checkpoint else None

    def leave(self) -> None:
        """Remove the lock and the folders that a run has made, if it is refused before it starts."""
        files, folders = self._created
        self._created = ([], [])
        if self._initial_files is None:
            with suppress(OSError):
                for file in files:
                    file.unlink()
                for folder in folders:
                    folder.rmdir()

    def clear(self) -> None:
        """Make room in the folder once everything before training has succeeded."""
        before = self._replaced or self._resumed
        if self._keeps and before is not None:
            self._keep_aside(before, with_checkpoints=self._resumed is None)
            self._record["files"] = []
        if self._replaced is not None:
            remove_run(self.path, self._replaced)  # `save` replaces the record
            self.give_back()
        # beside a finished run all other files are of the user; a stopped run may have files missing in its record
        known = before is None or before["finished"] is not None
        files = files_in(self.path)
        self._initial_files = {name: None if known else time for name, time in files.items()}
        copy_aside(self.path, [name for name in files if name not in self._record["files"]])

    def _keep_aside(self, record: dict[str, Any], with_checkpoints: bool) -> None:
        """Move the files of the run in the folder to `<output_dir>.previous`, in place of the run there."""
        kept = self._read(self._previous) if self._previous.exists() else None
        if kept is not None and kept != record:  # equal if the process was killed while it moved this run
            remove_run(self._previous, kept)
        move_run(self.path, record, self._previous, with_checkpoints)

    def give_back(self) -> None:
        """Give the user's files back that the run has overwritten."""
        for name, beside in give_back(self.path).items():
            warn(f"{self.path / name}: written by the run; your file of this name is now {beside}")
            self._initial_files = (self._initial_files or {}) | {name: 0, beside: None}

    def save(self) -> None:
        """Write the record, with the names of the files written until now."""
        before = self._initial_files or {}
        written = {n for n, time in files_in(self.path).items() if before.get(n, 0) not in (None, time)}
        self._record["files"] = sorted(written | set(self._record["files"]))
        write_record(self.path, self._record)

    def _checkpoint(self, args: TrainingArguments) -> Path | None:
        if not args.resume_from_checkpoint:
            return None
        if args.resume_from_checkpoint is True:
            return checkpoints.newest_whole(self.path, args.accept_unverified_checkpoint)
        return checkpoints.given(args.resume_from_checkpoint, args.accept_unverified_checkpoint)

    def _check(self, args: TrainingArguments, checkpoint: Path | None) -> None:
        empty = all(path.name in (".lock", checkpoints.STAGING) for path in self.path.iterdir())
        where = f"--output_dir {self.path}"
        before = self._read(self.path)
        inside = checkpoint is not None and checkpoint.resolve().parent == self.path.resolve()
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
            self._record["files"] = before["files"] if before else []
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
        if before["rows"] != self._record["rows"]:
            splits = [name for name, digest in self._record["rows"].items() if before["rows"].get(name) != digest]
            raise InputError(
                f"{where}: its run was on other data ({', '.join(splits) or 'other splits'}) and cannot resume; give "
                f"its data, or train its weights on this data by --model_name_or_path {checkpoint} without "
                "--resume_from_checkpoint"
            )
        if before["base_model"] != self._record["base_model"]:
            raise InputError(
                f"{where}: the files of --model_name_or_path are not those of its run; restore them, or leave "
                "--resume_from_checkpoint out"
            )
        self._check_arguments(before)
        if before["code"] != self._record["code"]:
            warn("resuming with changed code; results may differ from the original run")
        step = checkpoints.saved_step(checkpoint)
        if 0 < args.max_steps < step:
            raise InputError(f"--max_steps {args.max_steps}: {checkpoint} is of step {step}; give at least {step}")
        inside = checkpoint.resolve().parent == self.path.resolve()
        newer = [p.name for p in checkpoints.in_order(self.path) if inside and checkpoints.step_of(p) > step]
        if newer and args.resume_from_checkpoint is not True:  # true has already warned about each
            warn(f"{', '.join(newer)}: newer than {checkpoint.name}; remove, or a later resume takes the newest")

    def _check_arguments(self, before: dict[str, Any]) -> None:
        """Raise `InputError` for changed arguments that a checkpoint cannot resume with; warn about the others."""
        then, now = before["arguments"], json.loads(json.dumps(self._record["arguments"]))
        sizes = [step_size(record) for record in (before, self._record)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"--resume_from_checkpoint: the run took {sizes[0]} a step and would now take {sizes[1]}; give batch, "
                f"accumulation and processes with the product {sizes[0]}"
            )
        changed = [name for name in now if name in then and now[name] != then[name]]
        for name in changed:
            if self._rules.get(name) == "fixed":
                remedy = "leave it out" if then[name] is None else f"give --{name} {then[name]}"
                raise InputError(f"--{name}: the run has {then[name]} and cannot resume with {now[name]}; {remedy}")
        others = [f"--{name} {then[name]} to {now[name]}" for name in changed if name not in self._rules]
        if others:
            warn(f"resuming with changed arguments; results will differ from the original run: {', '.join(others)}")

    def _check_replace(self, before: dict[str, Any], args: TrainingArguments, checkpoint: Path | None) -> None:
        """Raise `InputError` if the run in the folder must not be replaced; print whether it is kept or removed."""
        where = f"--output_dir {self.path}"
        if not args.overwrite and before["finished"] is None and checkpoints.in_order(self.path):
            raise InputError(
                f"{where}: holds a stopped run; resume it with --resume_from_checkpoint true, drop it with "
                "--overwrite, or choose another --output_dir"
            )
        self._keeps = not args.overwrite and before["finished"] is not None
        if self._keeps:
            self._check_previous()
        model = self._record["arguments"]["model_name_or_path"]  # None for a new model
        read = [("model_name_or_path", model), ("resume_from_checkpoint", checkpoint)]
        read += [(argument, file["file"]) for argument, file in self._record["data"].items()]
        for name, path in read:
            for folder in [self.path.resolve(), *([self._previous] if self._keeps else [])]:
                if path and Path(path).exists() and Path(path).resolve().is_relative_to(folder):
                    raise InputError(
                        f"{where}: --{name} {path} would be replaced by this run; choose another --output_dir"
                    )
        if self._keeps:
            self._tell_kept("the finished run moves")
        else:
            tell(f"{self.path}: the run there is removed when training begins")

    def _check_previous(self) -> None:
        """Raise `InputError` unless the finished run can move to `<output_dir>.previous`."""
        if self._previous.is_symlink():
            raise InputError(f"{self._previous}: is a link, and the finished run would move here; rename it")
        if self._previous.exists() and any(self._previous.iterdir()):
            kept = self._read(self._previous)
            name = kept and Path(kept["arguments"]["output_dir"]).name
            if kept is None or kept["finished"] is None or name != self.path.resolve().name:
                raise InputError(
                    f"{self._previous}: the finished run would move here, but this folder is not its previous run; "
                    "rename it, or give --overwrite to remove the finished run"
                )

    def _tell_kept(self, what: str) -> None:
        instead = " in place of the run there" if (self._previous / RECORD).exists() else ""
        tell(f"{self.path}: {what} to {self._previous.name}{instead} when training begins")

    def _lock(self) -> None:
        """Lock the folder against other runs. The lock of a dead process is released by the kernel."""
        lock = self.path / ".lock"
        self._lock_file = open(lock, "a+")  # noqa: SIM115  (an open file holds the lock)
        try:
            # a POSIX lock, not flock: a worker of the data loader that outlives a killed run would hold flock
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._lock_file.seek(0)
            raise InputError(
                f"--output_dir {self.path}: in use by {self._lock_file.read().strip()}; wait, or choose another "
                "--output_dir"
            ) from None
        self._lock_file.truncate(0)
        self._lock_file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock_file.flush()

    def _read(self, folder: Path) -> dict[str, Any] | None:
        return read_record(folder, self._record)
