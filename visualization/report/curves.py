"""Curves as SVG in the page: every worker is a line that can be pointed at, and colours follow the page.

Legend: N workers, T logged rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 42
MOST_POINTS = 20_000  # of all workers' lines of a panel: more are thinned out, evenly
MOST_LINES = 512  # workers with a line of their own
DECADES = 1.5  # from which on a panel of figures above zero is logarithmic


@dataclass(frozen=True)
class Line:
    """A curve: what it is called, its points (NaN: none there), and how the page draws it: 'worker', 'mean',
    'consensus', 'training'."""

    name: str
    x_T: np.ndarray
    y_T: np.ndarray
    kind: str = "worker"


@dataclass(frozen=True)
class Panel:
    """Curves over one axis. ``percent``: figures are shares."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    percent: bool = False
    log: bool | None = None
    template: str = "curves"
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def label(self) -> str:
        """The panel in words, for whom cannot see it."""
        named = [line for line in self.lines if line.kind != "worker" and np.isfinite(line.y_T).any()]
        ends = "; ".join(f"{line.name}: {self.text(line.y_T[np.isfinite(line.y_T)][-1])} at the end" for line in named)
        return f"{self.title}. {ends}" if ends else self.title

    def text(self, value: float) -> str:
        """A figure as the panel says it."""
        return (f"{100 * value:.4g}%" if self.percent else f"{value:.4g}").replace("-", "−")

    @property
    def drawn(self) -> dict[str, Any]:
        """What the template draws: paths, ticks, and, for the pointer, the figures of each path."""
        lines, left_out = _thinned(self.lines)
        y_K = np.concatenate([line.y_T for line in lines] or [np.empty(0)]).astype(float)
        x_K = np.concatenate([line.x_T for line in lines] or [np.empty(0)]).astype(float)
        there_K = np.isfinite(y_K) & np.isfinite(x_K)
        if not there_K.any():
            return {"lines": [], "x_ticks": [], "y_ticks": [], "left_out": 0, "kinds": []}
        y_K, x_K = y_K[there_K], x_K[there_K]
        log = self.log if self.log is not None else bool(y_K.min() > 0 and _decades(y_K) > DECADES)
        if log:
            y_K = y_K[y_K > 0] if (y_K > 0).any() else np.ones(1)
        low, high = _ends(y_K, log, self.percent)
        first, last = float(x_K.min()), float(x_K.max())
        last = last if last > first else first + 1

        def at_x(x: float) -> float:
            return round(LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

        def at_y(y: float) -> float:
            share = (math.log(y / low) / math.log(high / low)) if log else (y - low) / (high - low)
            return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

        drawn = []
        for line in lines:
            points = [
                (at_x(x), at_y(y), x, y)
                for x, y in zip(line.x_T.tolist(), line.y_T.tolist(), strict=True)
                if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)
            ]
            if points:
                path = "M" + "L".join(f"{x:g} {y:g}" for x, y, *_ in points)
                at, figures = (" ".join(f"{number:{spec}}" for number in numbers) for numbers, spec in (
                    ([x for *_, x, _ in points], ".15g"), ([value for *_, value in points], ".4g")))  # fmt: skip
                drawn.append({"name": line.name, "kind": line.kind, "path": path, "at": at, "figures": figures})
        ticks = _log_ticks(low, high) if log else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        margin = 1e-9 * (high - low)
        kinds = {line["kind"]: line["name"] for line in drawn if line["kind"] != "worker"}
        workers = sum(line["kind"] == "worker" for line in drawn)
        if workers:
            kinds["worker"] = "each worker" if workers > 1 else "the worker"
        return {
            "lines": drawn,
            "x_ticks": [
                (at_x(x), f"{x:g}") for x in MaxNLocator(6, integer=True).tick_values(first, last) if first <= x <= last
            ],
            "y_ticks": [(at_y(y), self.text(y)) for y in ticks if low - margin <= y <= high + margin],
            "left_out": left_out,
            "kinds": list(kinds.items()),
        }


def _thinned(lines: Sequence[Line]) -> tuple[list[Line], int]:
    """The lines that are drawn, with so many points that a page can carry them; and how many workers have none."""
    workers = [line for line in lines if line.kind == "worker"]
    kept, others = workers[:MOST_LINES], [line for line in lines if line.kind != "worker"]
    most = max(20, MOST_POINTS // max(1, len(kept)))
    thin = [Line(a.name, a.x_T[_spread(a, most)], a.y_T[_spread(a, most)], a.kind) for a in (*kept, *others)]
    return thin, len(workers) - len(kept)


def _spread(line: Line, most: int) -> np.ndarray:
    """Which points of a line to draw: the first, the last, and evenly those between."""
    count = len(line.x_T)
    return np.arange(count) if count <= most else np.unique(np.linspace(0, count - 1, most).round().astype(int))


def _decades(values: np.ndarray) -> float:
    return math.log10(values.max()) - math.log10(values.min())


def _ends(y_K: np.ndarray, log: bool, percent: bool) -> tuple[float, float]:
    """Where the axis begins and ends: a little beyond the figures."""
    low, high = float(y_K.min()), float(y_K.max())
    if log:
        return (low / 1.3, high * 1.3)
    pad = 0.04 * (high - low) or max(abs(high), 1e-6) * 0.05
    low, high = low - pad, high + pad
    return (max(low, -0.01), min(high, 1.01)) if percent else (low, high)


def _log_ticks(low: float, high: float) -> list[float]:
    whole = [t for t in LogLocator(numticks=8).tick_values(low, high) if low <= t <= high]
    fine = [t for t in LogLocator(subs=(1, 2, 5), numticks=12).tick_values(low, high) if low <= t <= high]
    return whole if len(whole) > 2 else fine
