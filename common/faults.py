"""What can stop a run from outside, turned into an orderly end: signals, lost processes, memory, numbers."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed

from common.errors import RunStopped

HOW_TO_GO_ON = "go on with it by the same command and --resume_from_checkpoint true"
#: a launcher passes on the signal that its children got as well; only one that comes later is a second wish
REPEATED_AFTER_SECONDS = 3.0
#: what the kernel says of processes that do not run any more
STATES = {"Z": "dead", "X": "dead", "T": "stopped"}


class StopSignals:
    """Within its `with` block SIGTERM and SIGINT only leave a note, which the training loop heeds after its step.

    A second signal, `REPEATED_AFTER_SECONDS` or more after the first, ends the process at once, as without this.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            # not print: the signal may have come in the middle of one
            os.write(2, f"{name}: stops after this step and a checkpoint; a second one stops at once\n".encode())
        elif time.monotonic() - self._since >= REPEATED_AFTER_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, device: torch.device) -> int:
        """The signal that this or any other process of the run got; 0 for none. All processes must call it."""
        if not torch.distributed.is_initialized():
            return self.number
        number = torch.tensor(self.number, device=device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)


@contextmanager
def named_lost_ranks() -> Iterator[None]:
    """End a run in which another process died or hangs by a sentence that names its rank, where that can be known.

    A dead one is noticed at once, since its connections close. A hanging one is noticed when an exchange has waited for
    `--ddp_timeout` seconds.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    places: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(places, (socket.gethostname(), os.getpid()))
    try:
        yield
    except RuntimeError as error:  # torch has DistBackendError for NCCL only
        if not any(sign in str(error) for sign in ("onnection", "imed out", "imeout", "NCCL", "gloo", "peer")):
            raise
        time.sleep(0.5)  # until a process that is just being killed is dead
        found = [f"rank {i} ({_state(*place)})" for i, place in enumerate(places) if _state(*place)]
        elsewhere = sorted({host for host, _ in places if host != socket.gethostname()})
        who = ", ".join(found) or "a rank" + (f", perhaps on {', '.join(elsewhere)}," if elsewhere else "")
        raise RunStopped(
            f"{who} no longer answers, so the run cannot go on; {HOW_TO_GO_ON} ({' '.join(str(error).split())[:160]})",
            code=RunStopped.LOST_RANK,
        ) from None


def _state(host: str, process: int) -> str | None:
    """What is wrong with a process on this machine; None where it lives, or is on another one."""
    if host != socket.gethostname() or process == os.getpid():
        return None
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return f"process {process}, dead"
    return f"process {process}, {STATES[state]}" if state in STATES else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the accelerator or for the CPU's allocator."""
    signs = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )
