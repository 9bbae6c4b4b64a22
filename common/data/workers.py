"""Protect the worker processes of data loaders from signals to the process group."""

import os
import signal
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader


def ignore_group_signals(start: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a worker of a data loader: obey SIGTERM from its parent process only, and ignore SIGINT.

    A signal to the whole process group (from a scheduler, or Ctrl-C) would otherwise end the worker before the last
    step has its rows.

    Args:
        start: the loader's previous `worker_init_fn`.
        worker: number of the worker.
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
    """Make the workers of `loader` start with `ignore_group_signals`. Return `loader`.

    Workers that live for several epochs get their seed from a generator of their own. From the global one, an
    uninterrupted run would draw it once, and a resumed run again, which would change the dropout masks that follow.
    """
    inner = inner_loader(loader)
    if inner.persistent_workers and inner.generator is None:
        inner.generator = torch.Generator().manual_seed(torch.initial_seed())
    if getattr(inner.worker_init_fn, "func", None) is not ignore_group_signals:  # a reused loader has it already
        inner.worker_init_fn = partial(ignore_group_signals, inner.worker_init_fn)
    return loader


def inner_loader(loader: DataLoader) -> DataLoader:
    """Return the loader inside a wrapper of accelerate: an attribute set on the wrapper has no effect."""
    return getattr(loader, "base_dataloader", loader)
