"""Scores by class (or what else a task groups samples by) and by worker: histograms, shares below zero, known bad
samples in front.

Legend: n samples, G groups of samples (classes or workers).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from utils.errors import UsageError
from utils.records import PathLike
from utils.scores import read_scores
from visualization.checked import load_corruption, load_labels, load_shown
from visualization.style import BLACK, LONGEST_LABEL, ORANGE, RED, mark_rows, plain, power_ticks, save, styled

MOST_ROW_LABELS = 26
HEAVY_TAIL = 15  # largest score in units of the median one, above which the axis bends
PALE_BLUE = "#7FB8DC"


def plot_scores(stage1_dir: PathLike, zarr_path: PathLike, out: PathLike) -> Path:
    """Draw the scores of ``zarr_path`` by class and by worker and write the picture to ``out``.

    Samples that ``corruption.json`` of the stage says to be bad are set against the others.
    Raises UsageError where a record is missing or damaged, or the scores are of other data.
    """
    record, (labels_n, class_names) = read_scores(zarr_path), load_labels(stage1_dir)
    corruption, ids_n = load_corruption(stage1_dir), record["sample_id"]
    if len(ids_n) and (ids_n.min() < 0 or ids_n.max() >= len(labels_n)):
        raise UsageError(f"{zarr_path} names samples that {stage1_dir} does not have; score this run again")
    bad_n, kind = np.isin(ids_n, corruption["flipped"]), "with a flipped label"
    if not bad_n.any():
        bad_n, kind = np.isin(record["worker"], corruption["bad_workers"]), "of workers with bad data"
    figure = draw_scores(
        record["scores"], labels_n[ids_n], record["worker"], class_names,
        method=Path(zarr_path).stem, bad_n=bad_n, kind=kind, bad_workers=corruption["bad_workers"],
        group=load_shown(stage1_dir).group,
    )  # fmt: skip
    return save(figure, out)


@styled
def draw_scores(
    scores_n: np.ndarray,
    class_n: np.ndarray,
    worker_n: np.ndarray,
    class_names: Sequence[str],
    method: str = "",
    bad_n: np.ndarray | None = None,
    kind: str = "known to be bad",
    bad_workers: Collection[int] = (),
    group: str = "class",
) -> Figure:
    """Histograms of the scores: all, of each class, of each worker, and the shares below zero.

    ``group``: what classes are, where they are other groups of samples. ``bad_n`` (bool [n]) marks samples known to
    be bad, ``kind`` says in what way. In the upper panel bad and other samples each add up to 100 %; each row of the
    lower ones is scaled to its own peak. The score axis is linear, or, for heavy tails, linear up to the median size
    and logarithmic beyond.
    """
    finite_n = np.isfinite(scores_n)
    left_out = len(scores_n) - int(finite_n.sum())
    bad_n = np.zeros(len(scores_n), bool) if bad_n is None else bad_n
    scores_n, class_n, worker_n, bad_n = (a[finite_n] for a in (scores_n, class_n, worker_n, bad_n))
    classes, workers = len(class_names), int(worker_n.max(initial=0)) + 1
    height = float(np.clip(0.9 + 0.26 * max(classes, workers), 3, 7.5))
    figure = Figure(figsize=(10, 2.9 + height))
    panels = figure.subplot_mosaic(
        [["all"] * 4, ["class", "class<0", "worker", "worker<0"]],
        width_ratios=(4, 1.2, 4, 1.2), height_ratios=(2.2, height),
    )  # fmt: skip
    axis = _score_axis(scores_n)
    _everything(panels["all"], scores_n, bad_n, kind, axis)
    title = f"Scores of {len(scores_n):,} samples" + (f", {plain(method, LONGEST_LABEL)}" if method else "")
    title += f": {_mean(scores_n < 0):.0%} below zero (harmful)"
    if bad_n.any():
        lowest_n = np.argsort(scores_n, kind="stable")[: round(len(scores_n) / 10)]
        found = bad_n[lowest_n].sum() / bad_n.sum()
        title += f"\nThe lowest tenth of the scores holds {found:.0%} of the samples {kind}"
    if left_out:
        title += f"\n{left_out:,} scores that are not finite are left out"
    panels["all"].set_title(title)

    for what, group_n, names in ("class", class_n, class_names), ("worker", worker_n, range(workers)):
        rows, shares = panels[what], panels[f"{what}<0"]
        edges = axis.edges(round(2 * np.sqrt(len(scores_n) / len(names))) if len(names) else 0)
        _histogram_rows(rows, scores_n, group_n, names, edges, bad_n)
        axis.apply(rows, per_side=1)
        notes = ["dark: many samples"] if len(names) > MOST_ROW_LABELS else []
        notes += ["red: median of the bad"] if notes and bad_n.any() else []
        notes += ["■ bad data"] if what == "worker" and bad_workers else []
        called = group if what == "class" else what
        rows.set(ylabel=called, title="\n".join([f"By {called}", *notes]))
        harmful_G = [_mean(scores_n[group_n == g] < 0) for g in range(len(names))]
        height = 0.72 if len(names) <= MOST_ROW_LABELS else 1  # gaps between thin bars would flicker
        shares.barh(np.arange(len(names)) - 0.4, harmful_G, height=height, color=ORANGE)
        shares.set(ylim=rows.get_ylim(), yticks=[], xlim=(0, 1.05 * max([*harmful_G, 0.02])))
        shares.set(xlabel="share", title="Below 0")
        shares.grid(False, axis="y")
        shares.xaxis.set_major_locator(MaxNLocator(2))
        shares.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    mark_rows(panels["worker<0"], [k - 0.4 for k in bad_workers if k < workers])
    return figure


@dataclass(frozen=True)
class _ScoreAxis:
    """A score axis that holds zero: linear, or bent like asinh(score / width) for heavy tails."""

    low: float
    high: float
    width: float | None

    def edges(self, bins: int) -> np.ndarray:
        """Edges of about ``bins`` bins (16 to 60 in view) that look equally wide; zero is an edge."""
        low, high = self._bend(self.low), self._bend(self.high)
        step = (high - low) / np.clip(bins, 16, 60)  # a bin more at each end: rounding must lose no score
        return self._unbend(step * np.arange(np.floor(low / step) - 1, np.floor(high / step) + 3))

    def apply(self, axes: Axes, per_side: int) -> None:
        """Scale, limits, ticks (with ``per_side`` labels on the longer side if bent) and the zero line."""
        axes.axvline(0, color=BLACK, linewidth=0.9)
        if self.width is None:
            axes.set_xlim(self.low, self.high)
            axes.xaxis.set_major_locator(MaxNLocator(4 * per_side, steps=[1, 2, 2.5, 5, 10]))
            power_ticks(axes.xaxis, "score")
            return
        axes.set_xscale("asinh", linear_width=self.width)
        ends, ticks = np.abs(self._bend(np.array([self.low, self.high]))), {0.0}
        for sign, end in zip((-1, 1), ends, strict=True):
            count = max(round(per_side * end / ends.max()), int(end > 0.2 * ends.max()))
            ticks |= {_one_digit(sign * self._unbend(end * k / count)) for k in range(1, count + 1)}
        power = math.floor(math.log10(self.width))
        power = 0 if -2 <= power <= 3 else power
        axes.set_xticks(sorted(ticks), [f"{tick / 10.0**power:,.6g}".replace("-", "−") for tick in sorted(ticks)])
        axes.set_xticks([], minor=True)
        unit = rf" in $10^{{{power}}}$" if power else ""
        axes.set(xlim=(self.low, self.high), xlabel=f"score{unit}, logarithmic away from zero")

    def _bend(self, score):
        return score if self.width is None else np.arcsinh(score / self.width)

    def _unbend(self, place):
        return place if self.width is None else np.sinh(place) * self.width


def _score_axis(scores_n: np.ndarray) -> _ScoreAxis:
    low, high = min(scores_n.min(initial=0), 0), max(scores_n.max(initial=0), 0)
    size_n = np.abs(scores_n[scores_n != 0])
    if not len(size_n):
        return _ScoreAxis(-1.0, 1.0, None)
    width = float(np.median(size_n))
    return _ScoreAxis(float(low), float(high), width if size_n.max() > HEAVY_TAIL * width else None)


def _one_digit(value: float) -> float:
    """``value`` cut to its first digit."""
    power = int(np.floor(np.log10(abs(value))))
    return math.copysign(int(abs(value) / 10.0**power) * 10.0**power, value)


def _everything(axes: Axes, scores_n, bad_n, kind: str, axis: _ScoreAxis) -> None:
    """The histogram of all scores; where some samples are known to be bad, theirs against the others'."""
    bad = int(bad_n.sum())
    edges = axis.edges(round(2 * np.sqrt(min(bad or len(bad_n), len(bad_n) - bad))))
    highest = 0.01
    for mask_n, what, look in (
        (~bad_n, "other samples", {"fill": True, "color": PALE_BLUE}),
        (bad_n, f"samples {kind}", {"color": RED, "linewidth": 2}),
    ):
        if mask_n.any():
            share = np.histogram(scores_n[mask_n], edges)[0] / mask_n.sum()
            highest = max(highest, share.max())
            axes.stairs(share, edges, label=f"{what} ({mask_n.sum():,})", **look)
    axes.set_ylim(0, 1.05 * highest)
    if bad_n.any():
        axes.set_ylim(0, 1.3 * highest)  # room for the legend
        axes.legend(loc="upper left", ncols=2, frameon=True, framealpha=1, edgecolor="none")  # the zero line is near
    axes.set_ylabel("share of samples")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axis.apply(axes, per_side=3)


def _histogram_rows(axes: Axes, scores_n, group_n, names: Sequence[Any], edges, bad_n) -> None:
    """A histogram a group, one under the other, the part of the bad samples in front.

    Many groups become rows of a heat map, with a mark at the median of the bad samples.
    """
    groups = len(names)
    heat, median_G = np.zeros((groups, len(edges) - 1)), np.full(groups, np.nan)
    for g in range(groups):
        in_g_n = group_n == g
        if not in_g_n.any():
            continue
        count, bad = (np.histogram(scores_n[mask_n], edges)[0] for mask_n in (in_g_n, in_g_n & bad_n))
        heat[g] = count / count.max()
        if groups > MOST_ROW_LABELS:
            median_G[g] = np.median(scores_n[in_g_n & bad_n]) if bad.any() else np.nan
            continue
        axes.stairs(g - 0.9 * heat[g], edges, baseline=g, fill=True, color=PALE_BLUE)
        if bad.any():
            axes.stairs(g - 0.9 * bad / count.max(), edges, baseline=g, fill=True, color=RED)
    if groups > MOST_ROW_LABELS:
        axes.pcolormesh(edges, np.arange(groups + 1) - 0.9, heat, cmap="Blues", vmin=0, vmax=1)
        axes.plot(median_G, np.arange(groups) - 0.4, "|", color=RED, markersize=5)
    axes.set_ylim(max(groups, 1) - 0.7, -1.1)
    axes.grid(False, axis="y")
    rows = np.arange(0, groups, -(-groups // MOST_ROW_LABELS) or 1)
    axes.set_yticks(rows - 0.4, [plain(names[g]) for g in rows])
    axes.tick_params(axis="y", left=False)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
