"""Keccak-256, the hash of Ethereum (not SHA3-256: the padding differs), of many short messages at once.

The permutation is that of the Keccak reference (Bertoni et al., 2011): 24 rounds over 5 x 5 lanes of 64 bits. Lane (x,
y) is row x + 5 y of an array over all messages, so a step of a round is one or two NumPy calls, whatever the number of
messages.

Legend: n messages, B bytes of a message, 25 lanes.
"""

from __future__ import annotations

import numpy as np

RATE = 136  # bytes that are absorbed at a time
BLOCK = 2048  # messages that are hashed together: their state fits the cache


def _round_constants() -> list[np.uint64]:
    """From the reference's shift register."""
    register, constants = 1, []
    for _ in range(24):
        constant = 0
        for power in range(7):
            if register & 1:
                constant ^= 1 << (2**power - 1)
            register = (register << 1) ^ (0x171 if register & 0x80 else 0)
        constants.append(np.uint64(constant))
    return constants


def _rotations() -> list[int]:
    """By how much each lane is rotated in step rho."""
    offsets, x, y = [0] * 25, 1, 0
    for t in range(24):
        offsets[x + 5 * y] = (t + 1) * (t + 2) // 2 % 64
        x, y = y, (2 * x + 3 * y) % 5
    return offsets


LANES = [(x, y) for y in range(5) for x in range(5)]
CONSTANTS = _round_constants()
SOURCE = [(x + 3 * y) % 5 + 5 * x for x, y in LANES]  # which lane step pi puts there
LEFT = np.array([[_rotations()[lane]] for lane in SOURCE], dtype=np.uint64)
RIGHT = np.uint64(64) - LEFT  # a shift by 64 gives 0
NEXT = [(x + 1) % 5 + 5 * y for x, y in LANES]
AFTER = [(x + 2) % 5 + 5 * y for x, y in LANES]
ONE, REST = np.uint64(1), np.uint64(63)


def _permuted(state: np.ndarray) -> np.ndarray:
    for constant in CONSTANTS:
        parity = np.bitwise_xor.reduce(state.reshape(5, 5, -1), axis=0)
        turned = parity[[1, 2, 3, 4, 0]]
        change = parity[[4, 0, 1, 2, 3]] ^ (turned << ONE | turned >> REST)
        moved = (state.reshape(5, 5, -1) ^ change).reshape(25, -1)[SOURCE]
        moved = moved << LEFT | moved >> RIGHT
        state = moved ^ (~moved[NEXT] & moved[AFTER])
        state[0] ^= constant
    return state


def keccak256(messages_nB: np.ndarray) -> np.ndarray:
    """The digests, uint8 [n, 32], of n messages of equal length, uint8 [n, B]."""
    n, length = messages_nB.shape
    digests = np.empty((n, 32), dtype=np.uint8)
    for start in range(0, n, BLOCK):
        part = messages_nB[start : start + BLOCK]
        padded = np.zeros((len(part), (length // RATE + 1) * RATE), dtype=np.uint8)
        padded[:, :length] = part
        padded[:, length] = 0x01
        padded[:, -1] |= 0x80
        words = padded.view("<u8").astype(np.uint64).T
        state = np.zeros((25, len(part)), dtype=np.uint64)
        for first in range(0, len(words), RATE // 8):
            state[: RATE // 8] ^= words[first : first + RATE // 8]
            state = _permuted(state)
        digests[start : start + BLOCK] = np.ascontiguousarray(state[:4].T).astype("<u8").view(np.uint8)
    return digests
