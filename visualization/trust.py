"""When scores can be trusted, as a picture: LDS against metasmoothness, of a record of ``python -m benchmarks.trust``.

Legend: L points.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from utils.records import PathLike
from visualization.style import BLACK, BLUE, GREEN, GREY, ORANGE, save, styled

GOOD = 0.8  # an LDS
KINDS = {"MLP": (BLUE, "o"), "CNN": (ORANGE, "s"), "smooth": (GREEN, "^")}


def points(lines: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Metasmoothness [L] and LDS of ``cascade`` [L] of every line and share masked, and of which kind each is."""
    found = [
        (line["smoothness"][fraction], line["lds"][fraction]["cascade"][0], _kind(line["setting"]))
        for line in lines
        for fraction in line["lds"]
    ]
    smooth, lds, kinds = zip(*found, strict=True)
    return np.array(smooth, float), np.array(lds, float), list(kinds)


def _kind(setting: str) -> str:
    return next((kind for kind in KINDS if setting.startswith(kind)), "CNN")


def threshold(smooth_L: np.ndarray, lds_L: np.ndarray) -> float:
    """The metasmoothness that parts points of a good LDS from others with the fewest errors (the middle of a gap)."""
    values = np.unique(smooth_L)
    middles = (values[:-1] + values[1:]) / 2
    between = np.where(middles > values[:-1], middles, values[1:])  # of neighbouring floats there is no middle
    places = np.array([values[0], *between, np.nextafter(values[-1], np.inf)])
    return float(places[np.argmin([wrong_side(smooth_L, lds_L, at) for at in places])])


def wrong_side(smooth_L: np.ndarray, lds_L: np.ndarray, at: float) -> int:
    """How many points of a good LDS are below the threshold, and others not."""
    return int(((smooth_L >= at) != (lds_L > GOOD)).sum())


def together(lines: Sequence[dict[str, Any]]) -> str:
    """How metasmoothness and LDS go together, in a line."""
    smooth_L, lds_L, _ = points(lines)
    at = threshold(smooth_L, lds_L)
    wrong = wrong_side(smooth_L, lds_L, at)
    rank = stats.spearmanr(smooth_L, lds_L).statistic if len(lds_L) > 2 else float("nan")
    return (
        f"{len(lds_L)} points: rank correlation of metasmoothness and LDS of cascade {rank:.2f}; an LDS above {GOOD:g} "
        f"is best foretold by a metasmoothness above {at:.2f} ({wrong} of {len(lds_L)} points are on the wrong side)"
    )


def plot_trust(lines: Sequence[dict[str, Any]], path: PathLike) -> Path:
    """Draw the record, written to ``path``."""
    return save(draw_trust(lines), path)


@styled
def draw_trust(lines: Sequence[dict[str, Any]]) -> Figure:
    """A point a setting, seed and share masked; dashed: the threshold."""
    smooth_L, lds_L, kinds = points(lines)
    figure = Figure(figsize=(6.8, 4.6))
    axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=1)
    for kind, (colour, mark) in KINDS.items():
        of = np.array([k == kind for k in kinds])
        if of.any():
            axes.scatter(smooth_L[of], lds_L[of], s=34, color=colour, marker=mark, alpha=0.8, linewidths=0, label=kind)
    at = threshold(smooth_L, lds_L)
    axes.axvline(at, color=BLACK, linestyle=(0, (5, 3)), linewidth=1.2)
    axes.annotate(f" {at:.2f}", (at, 0.02), xycoords=("data", "axes fraction"))
    axes.set(xlabel="metasmoothness of switching the samples off", ylabel="LDS of cascade", ylim=(None, 1.02),
             title="The smoother a run, the better its scores predict retraining")  # fmt: skip
    axes.legend(title="networks", loc="lower right")
    return figure
