"""Intervals of shares. A leaf: pictures need it without PyTorch."""

from __future__ import annotations

import math

NORMAL_95 = 1.959963984540054


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The ends of the 95 % interval of a share, ``right`` of ``count`` (Wilson 1927): inside [0, 1] and of sensible
    width also near its ends. Of test samples it covers the choice of the samples, not that of the seed."""
    share, z2 = right / count, NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)
