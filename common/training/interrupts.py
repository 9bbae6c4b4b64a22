"""Promise: SIGTERM and SIGINT save a checkpoint and exit with 143 and 130; a lost process ends the run."""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers.trainer_utils import TrainOutput

from common.errors import RunStopped, one_line
from common.training.saving import WholeCheckpoints

HOW_TO_RESUME = "resume with the same command and --resume_from_checkpoint true"
#: a launcher repeats a signal that its processes got already; only a later one is a second request
REPEATED_AFTER_SECONDS = 3.0
#: state codes of the kernel for processes that do not run
STATES = {"Z": "dead", "X": "dead", "T": "stopped"}


class StopSignals:
    """Record SIGTERM and SIGINT within a `with` block; the training loop reads the record after each step.

    A second signal, at least `REPEATED_AFTER_SECONDS` after the first, ends the process at once. A thread listens,
    because Python runs no handler while a collective operation waits in C. The main thread blocks both signals, and the
    workers of the data loader inherit the block (`ignore_group_signals`).
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
            return self
        self._receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._sender = sender
        threading.Thread(target=self._listen, daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, lambda *_: None)
        self._wakeup_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._sender.close()  # closes the socket of the listener too

    def _listen(self) -> None:
        while data := self._receiver.recv(1):
            number = data[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            if not self.number:
                self.number, self._since = number, time.monotonic()
                name = signal.Signals(number).name
                _write_error(f"{name}: stopping after this step and a checkpoint; send it again to stop at once\n")
            elif time.monotonic() - self._since >= REPEATED_AFTER_SECONDS:
                os._exit(128 + number)
        self._receiver.close()

    def agreed(self, device: torch.device) -> int:
        """Return the signal that any process of the run got; 0 for none. All processes must call it."""
        if not torch.distributed.is_initialized():
            return self.number
        number = torch.tensor(self.number, device=device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)


def _write_error(message: str) -> None:
    """Write to standard error. Redirect a stream to /dev/null if its pipe is closed, as after Ctrl-C."""
    time.sleep(0.1)  # the other end of the pipe may be dying of the same signal
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    for stream, event in poll.poll(0):
        if event & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with suppress(OSError):
        os.write(2, message.encode())


@contextmanager
def reraise_lost_ranks() -> Iterator[None]:
    """Raise `RunStopped` with the rank of a process that died or hangs, if the rank is known.

    gloo reports a dead process at once, because its connections close. A hanging process is reported when a collective
    operation has waited for `--ddp_timeout` seconds.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    places: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(places, (socket.gethostname(), os.getpid()))
    try:
        yield
    except RuntimeError as error:  # torch raises DistBackendError for NCCL only
        if not any(sign in str(error) for sign in ("onnection", "imed out", "imeout", "NCCL", "gloo", "peer")):
            raise
        time.sleep(0.5)  # a killed process needs a moment to die
        lost = [f"rank {i} ({_state(*place)})" for i, place in enumerate(places) if _state(*place)]
        other_hosts = sorted({host for host, _ in places if host != socket.gethostname()})
        name = ", ".join(lost) or "a rank" + (f", perhaps on {', '.join(other_hosts)}," if other_hosts else "")
        raise RunStopped(
            f"{name} no longer answers; {HOW_TO_RESUME} ({one_line(error)[:160]})",
            code=RunStopped.LOST_RANK,
        ) from None


def _state(host: str, process: int) -> str | None:
    """Return the fault of a process on this machine; None if it runs, or runs on another machine."""
    if host != socket.gethostname() or process == os.getpid():
        return None
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return f"process {process}, dead"
    return f"process {process}, {STATES[state]}" if state in STATES else None


# In the trainer


class OrderlyStop(WholeCheckpoints):
    """Save a checkpoint after the step in which a signal came, and raise `RunStopped`."""

    _signals: StopSignals
    _seen_step, _save_at_end = -1, False

    def train(self, *args, **kwargs) -> TrainOutput:
        """Train as the parent does; raise `RunStopped` if the run ends early."""
        try:
            with StopSignals() as self._signals, reraise_lost_ranks():
                result = super().train(*args, **kwargs)
                if self._signals.number:
                    raise RunStopped(
                        f"{signal.Signals(self._signals.number).name} after the last step; {HOW_TO_RESUME}",
                        code=128 + self._signals.number,
                    )
                return result
        except RunStopped as error:
            raise error.with_traceback(None) from None  # its frames keep the workers of the data loader alive

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Delay the checkpoint of the last step of an epoch until the evaluation of the epoch is done.

        The parent is called after each step, and again at the end of an epoch or of the training. A checkpoint from
        before the evaluation would lose the evaluation on resume.
        """
        # upstream: called after `on_step_end` and after `on_epoch_end`; saves if `control.should_save`
        ends = self.control.should_training_stop or float(self.state.epoch).is_integer()
        first_call = self.state.global_step != self._seen_step
        self._seen_step = self.state.global_step
        self.stop_asked = asked = self._signals.agreed(self.args.device)
        if ends and first_call:
            self._save_at_end, self.control.should_save = self.control.should_save, False
        elif asked or self._save_at_end:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if ends and first_call:
            return
        self._save_at_end = False
        if asked:
            self.save_now()  # --save_strategy best saves only better models
            raise RunStopped(
                f"{signal.Signals(asked).name} after step {self.state.global_step}; checkpoint-{self.state.global_step}"
                f" is complete; {HOW_TO_RESUME}",
                code=128 + asked,
            )
