"""What differs between a CPU and an accelerator, besides where tensors lie.

On a CPU the cost is in bytes that leave a cache: work goes piece by piece, spread over threads. On an accelerator it is
in launches and in waiting for it: few large operations, whose arguments are sent ahead. One function decides; a test
lets the CPU follow the accelerator's way and compares.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
