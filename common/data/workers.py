"""Worker processes of data loaders."""

import os
import signal
import threading
from collections.abc import Callable


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
