"""How a process that trains holds its memory."""

import ctypes
import gc
import os
import sys

MIB = 2**20
#: parameters of mallopt(3)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def settle() -> None:
    """To be called once, when all is imported and nothing is computed. `tests/benchmarks/NOTES.md` has the gains.

    Variables of the environment that set the same (mallopt(3), https://uxlfoundation.github.io/oneDNN) come first.
    """
    # a million objects of imported libraries stay to the end: collections need not look at them again
    gc.freeze()
    # on a CPU oneDNN keeps what it has compiled for each shape of a product, up to 1,024 of them, which batches of many
    # lengths fill with hundreds of MiB; 128 are as fast
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
    # glibc gives a block of 32 MiB or more, such as the gradient of the embeddings, back as soon as it is free, and the
    # kernel then gives it again page by page, filled with zeros, in each step; here the process keeps it, but for
    # blocks so large that the holes they leave would take more than their pages cost
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            libc.mallopt(MMAP_THRESHOLD, 48 * MIB)
        if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
            libc.mallopt(TRIM_THRESHOLD, 1024 * MIB)
