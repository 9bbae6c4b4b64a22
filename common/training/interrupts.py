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

import torch
import torch.distributed
import transformers
from transformers.trainer_utils import TrainOutput

from common.errors import RunStopped, one_line

HOW_TO_GO_ON = "go on with it by the same command and --resume_from_checkpoint true"
#: a launcher passes on the signal that its children got as well; only one that comes later is a second wish
REPEATED_AFTER_SECONDS = 3.0
#: what the kernel says of processes that do not run any more
STATES = {"Z": "dead", "X": "dead", "T": "stopped"}


class StopSignals:
    """Within its `with` block SIGTERM and SIGINT only leave a note, which the training loop heeds after its step.

    A second signal, `REPEATED_AFTER_SECONDS` or more after the first, ends the process at once. A thread listens, since
    Python runs no handler while an exchange with other processes waits in C. The main thread itself is closed to both
    signals, and so are the data loader's workers, which inherit that (`ignore_group_signals`).
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
            return self
        self._ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        self._mouth = mouth
        threading.Thread(target=self._listen, daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, lambda *_: None)
        self._wakeup_before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._mouth.close()  # the listener's socket ends with it

    def _listen(self) -> None:
        while heard := self._ear.recv(1):
            number = heard[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            if not self.number:
                self.number, self._since = number, time.monotonic()
                name = signal.Signals(number).name
                _say(f"{name}: stops after this step and a checkpoint; a second one stops at once\n")
            elif time.monotonic() - self._since >= REPEATED_AFTER_SECONDS:
                os._exit(128 + number)
        self._ear.close()

    def agreed(self, device: torch.device) -> int:
        """The signal that this or any other process of the run got; 0 for none. All processes must call it."""
        if not torch.distributed.is_initialized():
            return self.number
        number = torch.tensor(self.number, device=device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)


def _say(message: str) -> None:
    """Write to standard error, and where a pipe behind it or standard output is gone, as after Ctrl-C, to nowhere."""
    time.sleep(0.1)  # until the other end of the pipe has died of the same signal
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
    """End a run in which another process died or hangs by a sentence that names its rank, where that can be known.

    Under gloo a dead one is noticed at once, since its connections close. A hanging one is noticed when an exchange has
    waited for `--ddp_timeout` seconds.
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
            f"{who} no longer answers, so the run cannot go on; {HOW_TO_GO_ON} ({one_line(error)[:160]})",
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


# In the trainer


class OrderlyStop(transformers.Trainer):
    """Saves a checkpoint after the step in which a signal came, and raises `RunStopped`."""

    _signals: StopSignals
    #: the signal that the processes agreed on; 0 for none
    stop_asked = 0
    _seen_step, _save_at_end = -1, False

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        """Train as the parent does; raises `RunStopped` where the run ends early."""
        try:
            with StopSignals() as self._signals, reraise_lost_ranks():
                result = super().train(resume_from_checkpoint, **kwargs)
                if self._signals.number:
                    raise RunStopped(
                        f"{signal.Signals(self._signals.number).name} after the last step; {HOW_TO_GO_ON}",
                        code=128 + self._signals.number,
                    )
                return result
        except RunStopped as error:
            raise error.with_traceback(None) from None  # its frames would keep the data loader's workers alive

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Called after each step and again at the end of an epoch, or of the training.

        Where the two coincide a checkpoint waits for the second call: saved before the evaluation that ends an epoch,
        it would lose that evaluation when it is resumed.
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
                f" is whole; {HOW_TO_GO_ON}",
                code=128 + asked,
            )
