"""Compressed messages: what of a row crosses a link, and in how many bytes.

    top_k      the share of largest magnitude, with their places
    random_k   a random share, whose places follow from the seed that both ends know
    sign       signs, times the mean magnitude (Bernstein et al. 2018; as in Koloskova et al. 2020, arXiv 1907.09356)
    quantize   b bits a number: dithered levels of the norm (QSGD, Alistarh et al. 2017), divided by 1 + min(P / s^2,
               sqrt(P) / s) with s = 2^(b - 1) - 1 levels, so that nothing is blown up (Koloskova et al. 2019)

What is random is a function of the seed, the worker and the round.

Legend: R rows, P floats of a row, k of them sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from utils.devices import send
from utils.random import derive_seed
from workers.worker_vision import Fleet

KINDS = ("none", "top_k", "random_k", "sign", "quantize")
PLACE_BYTES = 4  # an index of a float in a row


@dataclass(frozen=True)
class Compressor:
    """Q of :mod:`training.protocols.choco`. ``share``: of the floats that top_k and random_k send; ``bits``: of
    quantize."""

    kind: str
    share: float = 0.01
    bits: int = 4
    seed: int = 0

    def sent(self, P: int) -> int:
        """k: the floats that top_k and random_k send, one at least."""
        return max(1, round(self.share * P))

    @property
    def levels(self) -> int:
        """s: b bits hold a sign and 0 .. s."""
        return 2 ** (self.bits - 1) - 1

    def message_bytes(self, P: int, width: int) -> int:
        """Bytes of a message about P floats of ``width`` bytes."""
        return {
            "none": P * width,
            "top_k": self.sent(P) * (width + PLACE_BYTES),
            "random_k": self.sent(P) * width,
            "sign": -(-P // 8) + width,
            "quantize": -(-P * self.bits // 8) + width,
        }[self.kind]

    def __call__(self, fleet: Fleet, change_RP: Tensor, r: int) -> Tensor:
        """What arrives of the rows [R, P] in round r. Floats are taken in the order of files, so that nothing depends
        on how they lie in memory."""
        workers = list(fleet.owned) * fleet.replicas
        plain = fleet.layout.canonical(change_RP)
        rows = fleet.engine.map(lambda row_P, k: self.row(row_P, k, r), list(plain), workers)
        return fleet.layout.from_canonical(torch.stack(rows))

    def row(self, row_P: Tensor, worker: int, r: int) -> Tensor:
        """What arrives of one row [P]."""
        P = len(row_P)
        if self.kind == "top_k":
            return _only(row_P, _largest(row_P.abs(), self.sent(P)))
        if self.kind == "random_k":
            places_k = self._random(worker, r).choice(P, self.sent(P), replace=False, shuffle=False)
            return _only(row_P, send(torch.from_numpy(places_k), row_P.device))
        if self.kind == "sign":
            return torch.ones_like(row_P).copysign_(row_P) * row_P.abs().mean()
        if self.kind == "quantize":
            norm, s = row_P.norm(), self.levels
            if not bool(norm > 0):
                return torch.zeros_like(row_P)
            bits_P = np.frombuffer(self._random(worker, r).bytes(2 * P), np.uint16)
            dither_P = send(torch.from_numpy((bits_P + np.float32(0.5)) / 65536), row_P.device)
            level_P = row_P.abs().mul_(s / norm).add_(dither_P).floor_()
            shrink = 1 + min(P / s**2, P**0.5 / s)
            return level_P.copysign_(row_P).mul_(norm / (s * shrink))
        return row_P

    def _random(self, worker: int, r: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=_key(self.seed, r), counter=[0, 0, 0, worker]))


@lru_cache(maxsize=4)
def _key(seed: int, r: int) -> int:
    return derive_seed(seed, "compression", r)


def _largest(magnitude_P: Tensor, k: int) -> Tensor:
    """The places of the k largest. On a CPU most floats are passed over after one look at every 16th: a third of the
    time."""
    P = len(magnitude_P)
    if magnitude_P.device.type == "cpu" and P > 4096 and k < P // 8:
        seen = magnitude_P[::16]
        bound = seen.topk(min(len(seen), 3 * k // 32 + 16), sorted=False).values.min()
        places = (magnitude_P >= bound).nonzero()[:, 0]
        if len(places) >= k:
            return places[magnitude_P[places].topk(k, sorted=False).indices]
    return magnitude_P.topk(k, sorted=False).indices


def _only(row_P: Tensor, places_k: Tensor) -> Tensor:
    """The row with zeros but in these places."""
    return torch.zeros_like(row_P).scatter_(0, places_k, row_P[places_k])
