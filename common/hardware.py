"""Describe the machine, measure memory, detect out-of-memory errors and configure the memory allocator."""

import ctypes
import gc
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from common.errors import RunStopped, one_line


def cores() -> int:
    """Return the number of cores that this process may use (a scheduler or `taskset` can restrict them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """Return the name of the CPU, the number of usable cores, and the names of the GPUs, if any."""
    machine: dict[str, Any] = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": cores(),
    }
    if torch.cuda.is_available():
        machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return machine


def described(run: dict[str, Any]) -> str:
    """Return the `hardware` of a run.json in words: the GPUs, or else the CPU, and the precision."""
    plural = "s" if run["cores"] > 1 else ""
    return ", ".join([*run.get("gpus", [f"{run['cpu']}, {run['cores']} core{plural}"]), run["precision"]])


def sharding() -> str | None:
    """Return what shards the weights in this launch, FSDP or DEEPSPEED; None if nothing does."""
    names = ("FSDP", "DEEPSPEED")
    return next((n for n in names if os.environ.get(f"ACCELERATE_USE_{n}", "false").lower() == "true"), None)


def accelerator() -> torch.device:
    """Return the GPU or other accelerator of this machine, or the CPU.

    A build of torch for CUDA names its accelerator on a machine without a GPU too; only an available one counts.
    """
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def native_bf16(cpu: bool) -> bool:
    """Return whether the hardware computes bfloat16 products: CPU with AVX512_BF16 or AMX, GPU since Ampere."""
    if cpu or not torch.cuda.is_available():
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.cuda.is_bf16_supported(including_emulation=False)


def reset_peak_memory() -> None:
    """Let `peak_memory` count from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    except OSError:
        pass
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Return the peak resident memory and GPU memory in MiB; of the whole process if the kernel cannot reset it."""
    try:
        status = Path("/proc/self/status").read_text()
        kib = int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    peaks = {"peak_memory_mib": kib // 1024}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return peaks


@contextmanager
def reraise_out_of_memory(what: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into `RunStopped`.

    Args:
        what: returns the end of the sentence `out of memory ...`: the operation and a remedy.

    Raises:
        RunStopped: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(what(), error) from None


def out_of_memory(what: str, error: BaseException) -> RunStopped:
    """Return the `RunStopped` for `out of memory {what}`, with the message of the library."""
    return RunStopped(f"out of memory {what} ({one_line(error)[:200]})", code=RunStopped.OUT_OF_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` reports exhausted memory: of the accelerator, the CPU's allocator or oneDNN.

    oneDNN gives no reason when it cannot create or execute a kernel. An unsupported shape or type fails earlier ("could
    not create a primitive descriptor"). The remaining cause is usually memory
    (https://github.com/uxlfoundation/oneDNN/issues/914).
    """
    signs = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    onednn_messages = ("could not create a primitive", "could not execute a primitive")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and (str(error) in onednn_messages or any(sign in str(error) for sign in signs))
    )


MIB = 2**20
#: parameters of mallopt(3)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def configure_allocator() -> None:
    """Configure garbage collection, the oneDNN cache and glibc's malloc. `tests/benchmarks/LOG.md` has the gains.

    Call this once, after the imports and before any computation. Environment variables for the same settings
    (mallopt(3), https://uxlfoundation.github.io/oneDNN) take precedence.
    """
    # imported libraries hold a million objects until exit: exclude them from garbage collection
    gc.freeze()
    # on a CPU oneDNN caches up to 1,024 compiled kernels, one for each shape of a product. Batches of many lengths fill
    # the cache with hundreds of MiB. 128 kernels are as fast.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
    # glibc returns freed blocks of 32 MiB or more, such as the gradient of the embeddings, to the kernel. Mapping the
    # pages again in each step takes time: the process keeps blocks up to 48 MiB. Larger blocks go back, because keeping
    # them would waste more memory in holes than the page faults cost.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):  # musl lacks it
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            libc.mallopt(MMAP_THRESHOLD, 48 * MIB)
        if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
            libc.mallopt(TRIM_THRESHOLD, 1024 * MIB)
