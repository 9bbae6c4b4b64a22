"""The machine of a run, as far as its figures depend on it."""

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed

from common.errors import RunStopped, one_line


def cores() -> int:
    """Cores that this process may use, which a scheduler or `taskset` may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def hardware() -> dict[str, Any]:
    """Name of the CPU, cores that this process may use, and names of the GPUs, if any."""
    found: dict[str, Any] = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": cores(),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def described(run: dict[str, Any]) -> str:
    """The `hardware` of a run.json in words: the GPUs, or where there are none the CPU, and the precision."""
    several = "s" if run["cores"] > 1 else ""
    return ", ".join([*run.get("gpus", [f"{run['cpu']}, {run['cores']} core{several}"]), run["precision"]])


def native_bf16(cpu: bool) -> bool:
    """Whether bfloat16 matrix products run in hardware here: CPU with AVX512_BF16 or AMX, GPU since Ampere."""
    if cpu or not torch.cuda.is_available():
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def reraise_out_of_memory(what: Callable[[], str]) -> Iterator[None]:
    """End what runs within it by `RunStopped` where memory runs out; `what` tells what was too much, and a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(what(), error) from None


def out_of_memory(what: str, error: BaseException) -> RunStopped:
    """The end of a run that has no memory for `what`, with the words of the library that asked for it."""
    return RunStopped(f"out of memory {what} ({one_line(error)[:200]})", code=RunStopped.OUT_OF_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: on the accelerator, for the CPU's allocator, or for oneDNN.

    oneDNN does not tell why a kernel could not be made or run. What a shape or type lacks it says earlier ("could not
    create a primitive descriptor"), so that it is memory, as a rule (https://github.com/uxlfoundation/oneDNN/issues/914).
    """
    signs = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    of_onednn = ("could not create a primitive", "could not execute a primitive")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and (str(error) in of_onednn or any(sign in str(error) for sign in signs))
    )


MIB = 2**20
#: parameters of mallopt(3)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def configure_allocator() -> None:
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
