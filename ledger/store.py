"""Content-addressed files: what is put in is found by its digest, and checked when it is taken out.

The digest is the house's (``utils.digest``), and an object is what it is the digest of, so its name here is the CIDv1
by which IPFS knows the same bytes (raw, SHA-256; of objects above 256 KiB, which IPFS cuts into chunks, it is
the CID of the whole and not the address on that network).
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.digest import digest_tensors, tensor_bytes
from utils.errors import UsageError
from utils.files import read_bytes, replaced

HEADER = re.compile(rb"(\w+) \(([\d, ]*)\) torch\.(float32|float64|int64|uint8|bfloat16|float16);")


def cid(digest: str) -> str:
    """A hexadecimal SHA-256 as a CIDv1 of raw bytes. (The package multiformats, which a test compares, takes 3 ms.)"""
    multihash = b"\x12\x20" + bytes.fromhex(digest)  # SHA-256, 32 bytes
    raw = b"\x01\x55" + multihash  # version 1, raw bytes
    return "b" + base64.b32encode(raw).decode().lower().rstrip("=")


class Store:
    """A folder of objects, in 1,024 folders by the last letters of their names."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where the object is, or would be."""
        name = cid(digest)
        return self.folder / name[-2:] / name

    def put(self, data: bytes) -> str:
        """Keep an object; its digest."""
        digest = hashlib.sha256(data).hexdigest()
        self._put(digest, data)
        return digest

    def get(self, digest: str) -> bytes:
        """An object. Raises :class:`UsageError` where it is missing or not what its name says."""
        path = self.path(digest)
        data = read_bytes(path, "object", limit=math.inf)
        if hashlib.sha256(data).hexdigest() != digest:
            raise UsageError(f"{path} is damaged: its content is not what its name says.")
        return data

    def has(self, digest: str) -> bool:
        """Whether it is here."""
        return self.path(digest).exists()

    def put_tensor(self, name: str, tensor: Tensor, digest: str | None = None) -> str:
        """A tensor on the CPU. ``digest``: that of ``digest_tensors({name: tensor})``, where it is known."""
        digest = digest or digest_tensors({name: tensor})
        self._put(digest, *tensor_bytes(name, tensor))
        return digest

    def _put(self, digest: str, *parts: Any) -> None:
        """Keep what has this digest."""
        path = self.path(digest)
        if path.exists():
            return
        with replaced(path) as temporary, open(temporary, "wb") as file:
            for part in parts:
                file.write(part)

    def get_tensor(self, digest: str) -> Tensor:
        """The tensor of an object. Raises :class:`UsageError` where it is none."""
        return tensor_of(self.get(digest), str(self.path(digest)))


def tensor_of(data: bytes, where: str = "object") -> Tensor:
    """The tensor whose digest is that of these bytes. Raises :class:`UsageError` where they are none."""
    match = HEADER.match(data)
    if match is None:
        raise UsageError(f"{where} is no tensor.")
    shape = [int(size) for size in match[2].decode().split(",") if size.strip()]
    dtype = getattr(torch, match[3].decode())
    values = np.frombuffer(data, np.uint8, offset=match.end())
    if len(values) != math.prod(shape) * dtype.itemsize:
        raise UsageError(f"{where} is a damaged tensor.")
    tensor = torch.from_numpy(values.copy()).view(dtype).reshape(shape)
    name = match[1].decode()
    assert digest_tensors({name: tensor}) == hashlib.sha256(data).hexdigest()
    return tensor
