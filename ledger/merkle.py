"""Merkle trees with SHA-256: the root of a list, and the short proof that an entry is in it.

As in RFC 6962 (Certificate Transparency) leaves and inner nodes are hashed with different first bytes, so that no node
passes for a leaf, and a level's odd last node goes up as it is, so that no two lists have the same root.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


def leaf(data: bytes) -> bytes:
    """The hash of an entry."""
    return hashlib.sha256(b"\0" + data).digest()


def node(left: bytes, right: bytes) -> bytes:
    """The hash of two nodes below."""
    return hashlib.sha256(b"\1" + left + right).digest()


def levels(entries: Sequence[bytes]) -> list[list[bytes]]:
    """All levels of the tree, leaves first; the last one is the root. No entries: the hash of nothing."""
    level = [leaf(data) for data in entries] or [hashlib.sha256(b"").digest()]
    found = [level]
    while len(level) > 1:
        level = [node(*level[i : i + 2]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
        found.append(level)
    return found


def root(entries: Sequence[bytes]) -> bytes:
    """The root of the tree."""
    return levels(entries)[-1][0]


def proof(tree: list[list[bytes]], index: int) -> list[bytes]:
    """The neighbours on the way from leaf ``index`` to the root."""
    found = []
    for level in tree[:-1]:
        if index ^ 1 < len(level):
            found.append(level[index ^ 1])
        index //= 2
    return found


def is_in(data: bytes, index: int, count: int, steps: Sequence[bytes], top: bytes) -> bool:
    """Whether the entry ``index`` of a list of ``count`` entries with this root is ``data``."""
    if not 0 <= index < count:
        return False
    here, left = leaf(data), list(steps)
    while count > 1:
        if index ^ 1 < count:
            if not left:
                return False
            other = left.pop(0)
            here = node(other, here) if index & 1 else node(here, other)
        index, count = index // 2, -(-count // 2)
    return not left and hmac.compare_digest(here, top)
