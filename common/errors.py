"""Collect problems in user input and report them in full sentences, with exit code 2 and no traceback."""

import difflib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from transformers.utils import logging

T = TypeVar("T")
SHOWN = 10


class InputError(Exception):
    """Report invalid user input. Each of `problems` names the place and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))


class RunStopped(Exception):
    """Report in a sentence why a running program stops early. `code` is the exit status."""

    NOT_FINITE = 3
    LOST_RANK = 4
    NOT_SAVED = 5
    OUT_OF_MEMORY = 6
    AFTER_TRAINING = 7

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class SameProblem(str):
    """A problem that each row of a file may have in the same words; it is shown once, with the number of rows."""


class Problems:
    """Collect problems. One run shows the user up to ten of them.

    Args:
        skip: number of rows with problems that are dropped instead (`--skip_bad_rows`).
    """

    def __init__(self, skip: int = 0) -> None:
        self.shown: list[str] = []
        self.count = 0
        self.same: Counter[str] = Counter()  # line -> later rows with this `SameProblem`
        self.skip, self.rows, self.other = skip, 0, 0  # rows with problems; problems that are not of a row

    def add(self, where: str, message: str) -> None:
        """Record a problem of a file or an argument.

        Args:
            where: a file, or file:line.
            message: the problem and its remedy.
        """
        self.other += 1
        self._show(where, message)

    def reject(self, where: str, messages: Iterable[str]) -> None:
        """Record the problems of a row."""
        self.rows += 1
        for message in messages:
            self._show(where, message)

    def _show(self, where: str, message: str) -> None:
        line = f"{printable(where)}: {printable(message)}"
        if line in self.shown:  # a problem of a header, which each row has
            return
        if isinstance(message, SameProblem):
            earlier = next((one for one in self.shown if one.endswith(f": {printable(message)}")), None)
            if earlier is not None:
                self.same[earlier] += 1
                return
        self.count += 1
        if self.count <= SHOWN:
            self.shown.append(line)

    def check(self) -> None:
        """Raise `InputError` if any problem was recorded; drop up to `skip` rows instead, with a warning of each."""
        shown = [f"{line} ({self.same[line]:,} more such rows)" if self.same[line] else line for line in self.shown]
        more = [f"... and {self.count - SHOWN} more problems"] if self.count > SHOWN else []
        if self.rows <= self.skip and not self.other:
            for line in [*shown, *more]:
                warn(f"dropped: {line}")
            if self.rows:
                tell(f"--skip_bad_rows: {self.rows} rows with a problem are dropped")
            return
        if self.count and self.skip and self.rows > self.skip:
            more.append(f"--skip_bad_rows {self.skip}: {self.rows} rows have a problem; correct them, or raise it")
        if self.count:
            raise InputError(*shown, *more)


def is_main_process() -> bool:
    """Return whether this is the only process, or rank 0 of several (torchrun and accelerate set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str, longest: int = 2000) -> str:
    """Escape the control, formatting and unassigned characters of `text`, and cut it after `longest` characters.

    Labels, column names and file names come from data. Unescaped, they could move the cursor, end the line, or reverse
    it (bidirectional controls, https://trojansource.codes). Newlines are escaped too; the caller splits lines first.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: longest + 1])
    return shown if len(text) <= longest else f"{shown[:longest]}… ({len(text):,} characters)"


def brief(value: object) -> str:
    """Return `repr(value)` for a message, cut after 60 characters."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def one_line(error: object) -> str:
    """Return the message of `error` on one line, with single spaces."""
    return " ".join(str(error).split())


def tell(message: str) -> None:
    """Print `message` to standard output, in the main process only."""
    if is_main_process():
        for line in message.split("\n"):
            print(printable(line), flush=True)


def warn(message: str) -> None:
    """Print a warning to standard error, in the main process only."""
    if is_main_process():
        print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: no progress bars, and no table of new and unused weights on each load."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def nearest_file(path: str) -> str:
    """Return the end of a message about the missing file `path`: the nearest name in its folder, or nothing."""
    folder = Path(path).parent
    names = [f.name for f in folder.iterdir() if f.name != Path(path).name] if folder.is_dir() else []
    nearest = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {folder / nearest[0]}?" if nearest else ""


def check_file_exists(name: str, path: str) -> None:
    """Raise `InputError` unless `path`, the value of argument `name`, is a file."""
    if Path(path).is_dir():
        files = sorted(f.name for f in Path(path).iterdir() if f.is_file() and not f.name.startswith("."))
        inside = f"name a file in it: {', '.join(files[:5])}" if files else "name a file"
        raise InputError(f"--{name} {path}: is a folder, not a file; {inside}")
    if not Path(path).is_file():
        raise InputError(f"--{name} {path}: no such file{nearest_file(path)}")


def in_main_process(function: Callable[[], T]) -> T:
    """Run `function` in the main process. Every process returns its result, or raises its `InputError`."""
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = str(error)
    result, problems = broadcast_object_list(outcome)
    if problems is not None:
        raise InputError(problems)
    return result
