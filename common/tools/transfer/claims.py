"""Claim runs, so that several machines that share a folder work on one plan and train nothing twice.

A claim is a file that one process alone can create. It names the host and the process, and a thread changes its time
every few seconds. A claim whose time stands still, or whose process on this host is gone, is stale and is taken over.
"""

import errno
import fcntl
import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: seconds between two signs of life, and without one until a claim is stale
BEAT, STALE = 10.0, 90.0


class Claim:
    """A claim of this process on a run, kept alive by a thread until `release`."""

    def __init__(self, path: Path):
        self.path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            if self.lost():
                return
            with suppress(OSError):
                os.utime(self.path)

    def lost(self) -> bool:
        """Return whether another process has taken the claim over, for example while this machine slept."""
        return not is_ours(self.path)

    def release(self) -> None:
        """Give the claim up."""
        self._ended.set()
        self._thread.join()
        if not self.lost():
            self.path.unlink(missing_ok=True)


def claim(path: Path) -> Claim | None:
    """Return a claim on the run of this file; None if another live process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _create(path):
        return Claim(path)
    with _alone(path.parent):  # a claim is judged and taken over by one process at a time
        if not is_stale(path):
            return None
        path.unlink(missing_ok=True)
        return Claim(path) if _create(path) else None


def is_ours(path: Path) -> bool:
    """Return whether this process has a claim."""
    return _content(path) == _ours()


def is_stale(path: Path) -> bool:
    """Return whether the owner of a claim is gone."""
    about = _content(path)
    if about is None:
        return path.exists() and _age(path) > STALE  # the owner was killed before it wrote its name
    if about["host"] == socket.gethostname() and not _alive(about["process"], about["started"]):
        return True
    return _age(path) > STALE


def _create(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(_ours(), file)
    return True


def _ours() -> dict[str, object]:
    return {"host": socket.gethostname(), "process": os.getpid(), "started": _start_time(os.getpid())}


def _content(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _age(path: Path) -> float:
    """Return the seconds since the last sign of life, by the clock of the file system, which all machines share."""
    probe = path.with_name(f".clock-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for a lock on the folder that one process at a time has, on whatever machine."""
    with open(folder / ".claims", "a", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _start_time(process: int) -> str | None:
    """Return when a process started, which tells it from a later one with its number; None where Linux is not."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return None


def _alive(process: int, started: str | None) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return _start_time(process) == started


def end_orphan(folder: Path) -> None:
    """Stop a run in `folder` that outlived the command which started it; it saves a checkpoint.

    The lock file of the run names process and host. Only a process of this host that holds the lock is stopped.
    """
    with suppress(OSError, ValueError):
        lock = folder / ".lock"
        words = lock.read_text(encoding="utf-8").split()  # process NUMBER on HOST
        process, host = int(words[1]), words[3]
        if host != socket.gethostname() or process != _holder(lock):
            return
        os.kill(process, signal.SIGTERM)
        for _ in range(600):
            os.kill(process, 0)
            time.sleep(0.1)
        os.kill(process, signal.SIGKILL)


def _holder(lock: Path) -> int | None:
    """Return the process of this host that holds a POSIX lock on a file; None if none does."""
    form = "hhqqi4x"  # struct flock of Linux: type, whence, start, length, process
    with open(lock, "rb") as file:
        asked = struct.pack(form, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, process = struct.unpack(form, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else process
