"""Virtual time: how long a protocol would take on workers of different speed and links of finite width.

A worker takes ``seconds_per_step / speed_k`` for a local step, with log-normal speeds; a row takes
``latency + bytes / bandwidth`` over a link. All of it is seeded and independent of the machine that
simulates, so protocols can be compared at equal time and equal traffic.

Legend: N workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from utils.random import numpy_rng


@dataclass(frozen=True, eq=False)
class VirtualTime:
    """``step_seconds_N``: seconds of one local step of each worker; ``row_bytes``: a message."""

    step_seconds_N: np.ndarray
    row_bytes: int
    latency: float = 0.0
    bytes_per_second: float = math.inf

    @classmethod
    def draw(
        cls,
        num_workers: int,
        seed: int,
        *,
        row_bytes: int,
        speed_spread: float = 0.0,
        step_ms: float = 10.0,
        latency_ms: float = 0.0,
        bandwidth_mbps: float | None = None,
        speedup: float = 1.0,
        hops: int = 0,
        hop_bytes: int = 0,
    ) -> VirtualTime:
        """Log-normal speeds with standard deviation ``speed_spread`` of their logarithm (0: all equal);
        ``bandwidth_mbps`` in megabit per second (None: infinite). Of a network in stages: how much faster they are side
        by side (``speedup``), and the messages of ``hop_bytes`` that a step waits for (``hops``)."""
        speed_N = np.exp(speed_spread * numpy_rng(seed, "speed").standard_normal(num_workers))
        width = math.inf if bandwidth_mbps is None else bandwidth_mbps * 1e6 / 8
        waits = hops * (latency_ms / 1e3 + hop_bytes / width)
        return cls(step_ms / 1e3 / speed_N / speedup + waits, row_bytes, latency_ms / 1e3, width)

    def transfer(self, messages: int = 1, message_bytes: int | None = None) -> float:
        """Seconds until this number of messages (default: rows), sent one after the other over one link, have
        arrived."""
        size = self.row_bytes if message_bytes is None else message_bytes
        return 0.0 if messages == 0 else self.latency + messages * size / self.bytes_per_second

    def compute_N(self, steps_N: np.ndarray) -> np.ndarray:
        """Seconds each worker takes for its local steps."""
        return self.step_seconds_N * steps_N
