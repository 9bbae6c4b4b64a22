"""Problems in what the user gave: collected, told in full sentences, exit code 2, no traceback."""

import difflib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from transformers.utils import logging

T = TypeVar("T")
SHOWN = 10


class InputError(Exception):
    """Something the user gave is wrong. Each of `problems` says where it is and what to do."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))


class RunStopped(Exception):
    """A run that had begun ended early, in a way that the user is told in a sentence. `code` is the exit status."""

    NOT_FINITE = 3
    LOST_RANK = 4
    NOT_SAVED = 5
    OUT_OF_MEMORY = 6

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Problems:
    """Collects problems, so that the user sees up to ten at once instead of one a run."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, where: str, message: str) -> None:
        """Note a problem; `where` is a file, or file:line."""
        self.count += 1
        if self.count <= SHOWN:
            self.shown.append(f"{printable(where)}: {printable(message)}")

    def check(self) -> None:
        """Raise `InputError` if there was any problem."""
        if self.count > SHOWN:
            raise InputError(*self.shown, f"... and {self.count - SHOWN} more such problems")
        if self.count:
            raise InputError(*self.shown)


def is_main_process() -> bool:
    """True in the only process, or in rank 0 of several (torchrun and accelerate set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str, longest: int = 2000) -> str:
    """`text` as it can be shown: control, formatting and unassigned characters escaped, cut after `longest`.

    Labels, column names and file names come from data, and could else move the cursor, reverse the line (bidirectional
    controls, https://trojansource.codes) or end it. Newlines of the message itself are the caller's to add.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: longest + 1])
    return shown if len(text) <= longest else f"{shown[:longest]}… ({len(text):,} characters)"


def brief(value: object) -> str:
    """The value as Python writes it, for a message; cut after 60 characters."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def one_line(error: object) -> str:
    """What an error says, without the line breaks and blanks in a row with which libraries lay it out."""
    return " ".join(str(error).split())


def tell(message: str) -> None:
    """Print lines for the user, once however many processes there are."""
    if is_main_process():
        for line in message.split("\n"):
            print(printable(line), flush=True)


def warn(message: str) -> None:
    """Print a warning to standard error, once however many processes there are."""
    if is_main_process():
        print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the table of new and unused weights that every load of an encoder under a new head prints."""
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
    """The end of an error message about the missing file `path`."""
    folder = Path(path).parent
    names = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    found = difflib.get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {folder / found[0]}?" if found else ""


def in_main_process(function: Callable[[], T]) -> T:
    """What `function` returns in the main process, for every process of the run; so too the `InputError` it raises."""
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except InputError as error:
            outcome[1] = str(error)
    found, problems = broadcast_object_list(outcome)
    if problems is not None:
        raise InputError(problems)
    return found
