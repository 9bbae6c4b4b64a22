"""The machine of a run, as far as its figures depend on it."""

import os
import platform
from typing import Any

import torch


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
