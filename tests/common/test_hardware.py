"""Test the memory settings of a training process."""

import os
from pathlib import Path

import pytest
import torch

from common.hardware import accelerator
from tests.conftest import run


def test_a_build_for_gpus_uses_the_cpu_of_a_machine_without_one(monkeypatch):
    """`pip install torch` on Linux takes a build for CUDA, which names "cuda" as its accelerator without a GPU too."""
    named = torch.device("cuda")
    monkeypatch.setattr(
        "torch.accelerator.current_accelerator", lambda check_available=False: None if check_available else named
    )
    assert accelerator() == torch.device("cpu")


MANY_SHAPES = """
import torch
from common.hardware import configure_allocator
from tests.benchmarks.watched import resident_mib
configure_allocator()
layer = torch.nn.Linear(384, 384).bfloat16()
sizes = []
for rows in range(3, 1200, 3):
    layer(torch.randn(rows, 384).bfloat16()).sum().backward()
    sizes.append(resident_mib())
print(sizes[-1] - sizes[20])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux")
@pytest.mark.soak
def test_batches_of_many_lengths_do_not_fill_the_memory():
    """oneDNN's default capacity takes 700 to 800 MiB for these 400 shapes on a CPU with native bfloat16."""
    theirs = {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024",
        "LRU_CACHE_CAPACITY": "1024",
    }  # the user's values take precedence
    all_of_them = int(run("-c", MANY_SHAPES, **theirs).stdout)
    assert int(run("-c", MANY_SHAPES).stdout) < max(100, 0.5 * all_of_them)


LARGE_BLOCKS = """
import resource
import torch
from common.hardware import configure_allocator
configure_allocator()
for _ in range(60):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.zeros(12_000_000)  # 46 MiB
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(os.confstr_names.get("CS_GNU_LIBC_VERSION") is None, reason="the allocator is glibc's")
@pytest.mark.soak
def test_large_blocks_are_not_taken_from_the_kernel_again_and_again():
    """Count page faults; a new block of 46 MiB costs 11,719 of them."""
    assert int(run("-c", LARGE_BLOCKS).stdout) < 1_000
    given = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # takes precedence
    assert int(run("-c", LARGE_BLOCKS, **given).stdout) > 10_000
