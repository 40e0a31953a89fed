"""The one digest of the house: what a run, its data, its scores and its checkpoints are recognized by.

SHA-256 throughout. Tensors are hashed with their names, shapes and types, JSON values in one canonical
spelling, so equal digests mean equal content on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest_tensors(tensors: Mapping[str, Tensor | np.ndarray]) -> str:
    """Hexadecimal SHA-256 over names, shapes, dtypes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        for part in tensor_bytes(name, torch.as_tensor(tensors[name])):
            sha.update(part)
    return sha.hexdigest()


def digest_rows(name: str, matrix: Tensor) -> list[str]:
    """``digest_tensors({name: row})`` of every row of a matrix, with little beside the hashing."""
    if not matrix.numel():
        return [digest_tensors({name: row}) for row in matrix]
    start, found = hashlib.sha256(_header(name, matrix.shape[1:], matrix.dtype)), []
    for row in matrix.contiguous().view(torch.uint8).numpy():
        sha = start.copy()
        sha.update(row)
        found.append(sha.hexdigest())
    return found


def tensor_bytes(name: str, tensor: Tensor) -> tuple[bytes, Any]:
    """What is hashed of a tensor: its name, shape and type, and its bytes (without a copy, where it is contiguous)."""
    header = _header(name, tensor.shape, tensor.dtype)
    return header, tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""


def _header(name: str, shape: Sequence[int], dtype: torch.dtype) -> bytes:
    return f"{name} {tuple(shape)} {dtype};".encode()


def digest_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON-able value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
