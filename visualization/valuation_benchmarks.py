"""What the benchmarks of valuation found, as pictures: what values of samples are good for, and what valuing costs.

Reads the records of ``python -m benchmarks.valuation`` and ``python -m benchmarks.institutions``.

Legend: S shares of the samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.records import PathLike, read_record, spelled
from visualization.style import BLACK, CATEGORIES, DASHES, GREY, MARKS, METHODS, ORANGE, log_ticks, save, styled

LOOKS = METHODS | {"ddval": {"color": BLACK, "marker": "P"}, "self_loss": {"color": ORANGE, "marker": "v"}}
LEAST = 1e-3  # seconds that are told apart


def plot_tasks(path: PathLike, out: PathLike) -> Path:
    """The picture of a record of ``python -m benchmarks.valuation``, written to ``out``."""
    return save(draw_tasks(read_record(Path(path), "curves", "shares", "bad", "metric", "runs")), out)


@styled
def draw_tasks(record: dict[str, Any]) -> Figure:
    """Three panels, a curve a method: the accuracy against the share removed, the lowest values first and the highest
    first, and the share of the bad samples found against the share inspected. Bands: 95 % intervals over seeds."""
    shares_S, bad, curves = 100 * np.array(record["shares"]), record["bad"], record["curves"]
    figure = Figure(figsize=(12, 4.4))
    lowest, highest, found = figure.subplots(1, 3)
    for name, of_method in curves.items():
        for axes, key in (lowest, "lowest_removed"), (highest, "highest_removed"), (found, "found"):
            _banded(axes, shares_S, of_method[key], name)
    metric = spelled(record["metric"])
    lowest.set(title="Lowest values removed: higher is better", ylabel=f"test {metric} of the model trained anew")
    highest.set(title="Highest values removed: lower is better", ylabel=f"test {metric} of the model trained anew")
    for axes in (lowest, highest):
        axes.axvline(100 * bad, color=GREY, linewidth=1, linestyle=":")
        axes.set(xlabel="removed, % of the training samples", xlim=(0, 100), ylim=(0, 1))
    found.plot([0, 100 * bad, 100], [0, 1, 1], color=GREY, linewidth=1.5, linestyle=":", label="the best there is")
    found.set(title="Bad samples found: higher is better", ylabel="share of the bad samples found",
              xlabel="inspected, % of the training samples", xlim=(0, 100), ylim=(0, 1.02))  # fmt: skip
    handles, labels = found.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    what = f"{bad:.0%} of the training samples are bad (dotted); {record['runs']} seeds, bands: 95 % intervals"
    figure.suptitle(what, x=0.01, ha="left", fontsize=11)
    return figure


def _banded(axes: Axes, x_S: np.ndarray, curve_3S: list[list[float]], name: str) -> None:
    """Mean, and lower and upper end of its interval; curves end where they end."""
    mean_S, low_S, high_S = np.array(curve_3S, float)
    x_S, look = x_S[: len(mean_S)], LOOKS.get(name, {"color": BLACK})
    style = {"linestyle": look.get("linestyle", "-"), "marker": look.get("marker"), "markevery": 2, "markersize": 4}
    axes.plot(x_S, mean_S, color=look["color"], linewidth=1.5, label=name.replace("_", " "), **style)
    if np.isfinite(low_S).all():
        axes.fill_between(x_S, low_S, high_S, color=look["color"], alpha=0.12, linewidth=0)


def plot_institutions(path: PathLike, out: PathLike) -> Path:
    """The picture of a record of ``python -m benchmarks.institutions``, written to ``out``."""
    return save(draw_institutions(read_record(Path(path), "institutions", "all", "truth", "by_count", "methods")), out)


@styled
def draw_institutions(record: dict[str, Any]) -> Figure:
    """Seconds against the number of institutions: the truth (dashed: by the number of coalitions), each method, and the
    model of all that methods start from."""
    counts = np.array(record["institutions"])
    figure = Figure(figsize=(7.5, 4.4))
    axes = figure.add_subplot()
    truth, by_count = np.array(record["truth"], float), np.array(record["by_count"], float)
    axes.plot(counts, by_count, color=BLACK, linestyle="--", linewidth=1.2, label="truth, by the number of coalitions")
    axes.plot(counts, truth, "o-", color=BLACK, markersize=5, label="truth, measured")
    axes.plot(counts, record["all"], color=GREY, linewidth=5, alpha=0.4, label="the model of all")
    for i, (name, seconds) in enumerate(record["methods"].items()):
        colours = [colour for colour in CATEGORIES if colour != BLACK]
        look = {"color": colours[i % len(colours)], "linestyle": DASHES[i // len(colours) % len(DASHES)]}
        shown = np.maximum(np.array(seconds, float), LEAST)
        label = name.replace("_", " ")
        axes.plot(counts, shown, marker=MARKS[i % len(MARKS)], markersize=5, linewidth=1.2, label=label, **look)
    axes.set(yscale="log", xlabel="institutions", ylabel="seconds")
    axes.set_xticks(counts)
    log_ticks(axes.yaxis)
    axes.set_title("What values cost: the truth trains 2$^N$ − 1 coalitions")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure
