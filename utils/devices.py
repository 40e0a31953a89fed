"""What differs between a CPU and an accelerator, besides where tensors lie.

On a CPU the cost is in bytes that leave a cache: work goes piece by piece, spread over threads. On an accelerator it is
in launches and in waiting for it: few large operations, whose arguments are sent ahead. One function decides; a test
lets the CPU follow the accelerator's way and compares.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch
from torch import Tensor

FREED = 1 << 30  # bytes of freed memory that a process holds on to
LARGE = 1 << 25  # bytes from which a tensor gets a mapping of its own; glibc takes no more
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@cache
def keep_freed_memory() -> bool:
    """Let the process keep the memory of freed tensors for the next ones. By default glibc hands it back to the system
    after every step and gets it again, page by page and zeroed, which took a tenth of a round of 256 small MLPs. Does
    nothing, and says False, under another allocator or where MALLOC_TRIM_THRESHOLD_ is set."""
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, FREED)) and bool(mallopt(M_MMAP_THRESHOLD, LARGE))


def is_accelerator(device: torch.device) -> bool:
    """Whether work is cut for an accelerator."""
    return device.type != "cpu"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``, without waiting for it: from pinned memory, a GPU takes it when it gets
    there."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fetch(tensor: Tensor) -> Tensor:
    """A copy of a tensor of a GPU on the CPU, which holds its values once an event recorded now has passed."""
    there = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
    return there.copy_(tensor, non_blocking=True)
