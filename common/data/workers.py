"""Worker processes of data loaders."""

import os
import signal
import threading
from collections.abc import Callable
from functools import partial

from torch.utils.data import DataLoader


def ignore_group_signals(start: Callable[[int], None] | None, worker: int) -> None:
    """Begin a data loader's worker: of the signals that ask it to end, it heeds only those of its own main process.

    One to the whole process group (a scheduler's, Ctrl-C) would else take away the rows of the step that is to end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    if start is not None:
        start(worker)


def spare_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of `loader` begin with `ignore_group_signals`. Returns `loader`."""
    if getattr(loader.worker_init_fn, "func", None) is not ignore_group_signals:  # a kept loader has it already
        loader.worker_init_fn = partial(ignore_group_signals, loader.worker_init_fn)
    return loader
