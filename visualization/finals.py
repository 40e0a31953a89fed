"""The end of a run on the test set, as a figure with a bar: a row a run, or a row a configuration over its seeds.

Legend: S seeds, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from utils.records import PathLike
from visualization.checked import load_right, load_summary
from visualization.style import plain

LONGEST_ROW_NAME = 34
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Final:
    """A test figure at the end: of one run with the ends of its interval where they are known, or of each seed."""

    values_S: np.ndarray  # float; NaN: not finished, or not finite
    interval: tuple[float, float] | None = None  # of one run: 95 %, over the test samples

    @property
    def mean(self) -> float:
        return float(np.mean(self.values_S)) if len(self.values_S) else float("nan")

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the bar: the interval of one run, mean ± standard deviation of several."""
        if len(self.values_S) < 2:
            return self.interval
        deviation = float(np.std(self.values_S, ddof=1))
        return (self.mean - deviation, self.mean + deviation) if np.isfinite(deviation) else None


def load_final(run_dirs: Sequence[PathLike], what: str = "accuracy") -> Final:
    """``test_accuracy`` or ``test_loss`` of a run, or of the same run of several seeds. Raises UsageError where a
    record is damaged; a run that is not finished has none."""
    finished = [Path(path, "summary.json").is_file() for path in run_dirs]
    values = [load_summary(p)[f"test_{what}"] if there else None for p, there in zip(run_dirs, finished, strict=True)]
    counts = load_right(run_dirs[0]) if len(run_dirs) == 1 and finished[0] and what == "accuracy" else None
    return Final(np.array(values, dtype=float), counts and wilson_interval(*counts))


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The ends of the 95 % interval of a share, ``right`` of ``count`` (Wilson 1927): inside [0, 1] and of sensible
    width also near its ends. Of test samples it covers the choice of the samples, not that of the seed."""
    share, z2 = right / count, NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def bars_say(finals: Sequence[Final]) -> str:
    """What the bars of these rows are, in words; empty where there are none."""
    said = []
    if any(len(final.values_S) == 1 and final.interval for final in finals):
        said.append("bar: 95 % interval over the test samples")
    counts = sorted({len(final.values_S) for final in finals if len(final.values_S) > 1})
    if counts:
        said.append(f"bar: ± standard deviation over {', '.join(map(str, counts))} seeds")
    return "\n".join(said)


def draw_finals(
    axes: Axes, finals: Sequence[Final], names: Sequence[str], looks: Sequence[dict[str, Any]], what: str = "accuracy"
) -> None:
    """A row each, the first on top: its bar, a dot a seed, and the figure in words at the right edge."""
    for row, (final, look) in enumerate(zip(finals, looks, strict=True)):
        color = look["color"]
        if final.ends:
            axes.hlines(row, *final.ends, color=color, linewidth=2.2)
        if len(final.values_S) > 1:
            spread = np.linspace(-0.14, 0.14, len(final.values_S))
            axes.scatter(final.values_S, row + spread, s=9, color=color, alpha=0.5, linewidths=0)
        axes.plot([final.mean], [row], look.get("marker", "o"), color=color, markersize=7)
        known = np.isfinite(final.mean)
        text = (f"{final.mean:.2%}" if what == "accuracy" else f"{final.mean:.4g}") if known else "no figure"
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", size=9)
    rows_of(axes, len(names), names)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    if what == "accuracy":
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        low, high = axes.get_xlim()
        least = max(0.0, 0.02 - (high - low)) / 2  # small differences stay small
        axes.set_xlim(low - least, high + least)
    axes.set_xlabel("\n".join(filter(None, [f"test {what} at the end", bars_say(finals)])))


def rows_of(axes: Axes, count: int, names: Sequence[str] | None = None) -> None:
    """So many rows, the first on top, with or without their names."""
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(range(count), [plain(name, LONGEST_ROW_NAME) for name in names] if names else [""] * count)
    axes.tick_params(axis="y", left=False)
    axes.grid(False, axis="y")
