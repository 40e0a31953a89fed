"""Merkle trees as ledger/contracts/proofs.vy reads them: lists of values, of addresses and of amounts.

A tree is binary and positional: leaf i hangs at position i, the sides of a proof follow from i, and its length is the
depth ceil(log2(N)), the same for all leaves; positions from N on hold zeros, which no hash is. So an index has exactly
one leaf. A leaf is keccak256 twice of its ABI encoding (words of 32 bytes, big-endian), a node keccak256 of its two
children: no node passes for a leaf (second preimage).

Legend: N leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ledger.keccak import keccak256

Word = int | str | bytes  # an integer, an address or hash in hexadecimal, raw bytes


def word(value: Word) -> bytes:
    """The 32 bytes of one ABI word; negative integers in two's complement."""
    if isinstance(value, str):
        value = int(value, 16)
    if isinstance(value, int):
        return (value % 2**256).to_bytes(32, "big")
    return value.rjust(32, b"\0")


def hashed(*words: Word) -> bytes:
    """keccak256 of the ABI encoding of ``words``."""
    return _rows([b"".join(map(word, words))], keccak256)[0]


def leaves(rows: Sequence[Sequence[Word]]) -> list[bytes]:
    """The leaf of each row of words; all rows have equally many."""
    return _rows([b"".join(map(word, row)) for row in rows], lambda messages: keccak256(keccak256(messages)))


def _rows(messages, digest) -> list[bytes]:
    joined = np.frombuffer(b"".join(messages), dtype=np.uint8).reshape(len(messages), -1)
    return [bytes(row) for row in digest(joined)]


def value_leaves(run: bytes, values_N: Sequence[int]) -> list[bytes]:
    """Leaves of an evaluator's list: (run, index, value)."""
    return leaves([(run, index, value) for index, value in enumerate(values_N)])


def roster_leaves(accounts_N: Sequence[str]) -> list[bytes]:
    """Leaves of the list of addresses that workers are paid at: (index, address)."""
    return leaves(list(enumerate(accounts_N)))


class Tree:
    """A Merkle tree over at least one leaf.

    levels: from the leaves, filled up with zeros, to the root: uint8 [2**k, 32] each.
    """

    def __init__(self, leaves_N: Sequence[bytes]) -> None:
        depth = (len(leaves_N) - 1).bit_length()
        level = np.zeros((2**depth, 32), dtype=np.uint8)
        level[: len(leaves_N)] = np.frombuffer(b"".join(leaves_N), dtype=np.uint8).reshape(-1, 32)
        self.levels = [level]
        while len(level) > 1:
            level = keccak256(level.reshape(-1, 64))
            self.levels.append(level)

    @property
    def root(self) -> bytes:
        return bytes(self.levels[-1][0])

    def proof(self, index: int) -> list[bytes]:
        """The siblings of leaf ``index`` and of the nodes above it, from the bottom."""
        return [bytes(level[index >> height ^ 1]) for height, level in enumerate(self.levels[:-1])]


def root_of(leaf: bytes, index: int, proof: Sequence[bytes]) -> bytes:
    """The root of the tree in which ``leaf`` hangs at ``index`` beside the siblings of ``proof``."""
    node = leaf
    for height, sibling in enumerate(proof):
        node = hashed(sibling, node) if index >> height & 1 else hashed(node, sibling)
    return node
