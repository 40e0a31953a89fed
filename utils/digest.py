"""The one digest of the house: what a run, its data, its scores and its checkpoints are recognized by.

SHA-256 throughout. Tensors are hashed with their names, shapes and types, JSON values in one canonical
spelling, so equal digests mean equal content on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest_tensors(tensors: Mapping[str, Tensor | np.ndarray]) -> str:
    """Hexadecimal SHA-256 over names, shapes, dtypes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = torch.as_tensor(tensors[name])
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return sha.hexdigest()


def digest_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON-able value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
