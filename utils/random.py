"""Counter-based random numbers: every draw is a pure function of integer keys.

A run is a pure function of (config, seed, step), so nothing here has hidden state: the batch of
worker k at step t, its crops and flips, or which workers a server samples are computed from
(seed, purpose, k, t, position) by hashing, alike on every device and in every process.

The hash is splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), applied once a key.
Legend: N workers, L longest shard.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's ``>>`` on int64 copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _finalize(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def hash64(*keys: int | str | Tensor) -> Tensor:
    """64 hashed bits for each element of the broadcast keys, as int64.

    A string names the purpose ('batch', 'crop', ...), so that streams of different use never meet.
    """
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        if isinstance(key, str):
            key = zlib.crc32(key.encode())
        if not isinstance(key, Tensor):
            key = torch.tensor(key, dtype=torch.int64)
        if key.device != state.device and key.dim() > 0 and state.dim() > 0:
            state = state.to(key.device)  # a single number goes wherever it is needed
        state = _finalize((state ^ key.to(torch.int64)) * 3 + _GOLDEN)
    return state


def uniform(*keys: int | str | Tensor) -> Tensor:
    """Uniform float32 in [0, 1) with 24 random bits, one for each element of the broadcast keys."""
    return _shift(hash64(*keys), 40).to(torch.float32) * (1.0 / (1 << 24))


def integers(high: int, *keys: int | str | Tensor) -> Tensor:
    """Uniform int64 in [0, high); the bias for high < 2**24 is below 2**-38."""
    return _shift(hash64(*keys), 2) % high


def normals(count: int, *keys: int | str | Tensor) -> Tensor:
    """Standard normal float64 [..., count] for keys that broadcast to [..., 1], by Box and Muller (1958): pairs from 53
    random bits each, so that tails reach 8.5 deviations."""
    device = next((key.device for key in keys if isinstance(key, Tensor)), None)
    bits = _shift(hash64(*keys, torch.arange(count + count % 2, device=device)), 11)
    radius, angle = ((bits + 1).to(torch.float64) * 2.0**-53).chunk(2, -1)  # in (0, 1]
    radius, angle = (-2 * radius.log()).sqrt(), 2 * torch.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[..., :count]


def permutations(lengths_N: Tensor, *keys: int | str | Tensor) -> Tensor:
    """One permutation a row: int64 [N, L], L = max length; row k starts with a permutation of
    0..lengths_N[k]-1 and its rest is padding. ``keys`` broadcast against [N, 1]."""
    longest = int(lengths_N.max())
    position_L = torch.arange(longest, device=lengths_N.device)
    rank_NL = _shift(hash64(*keys, position_L), 1)  # 63 bits, nonnegative
    rank_NL = rank_NL.expand(len(lengths_N), longest)
    pad_NL = position_L >= lengths_N[:, None]
    return rank_NL.masked_fill(pad_NL, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed for a library that wants one (NumPy, torch.Generator)."""
    return int(hash64(*keys)) & ((1 << 63) - 1)


def numpy_rng(*keys: int | str) -> np.random.Generator:
    """A fresh NumPy generator that depends on the keys alone."""
    return np.random.default_rng(derive_seed(*keys))
