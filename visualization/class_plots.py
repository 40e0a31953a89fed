"""Pictures by class, or by what else a task groups samples: which worker holds which, and which class the model takes
for which.

Legend: N workers, C classes, n samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from visualization.measures import Shown
from visualization.style import BLACK, BLUE, index_ticks, plain, styled

MOST_LISTED_WORKERS = 64  # rows of the class mix that keep their order and numbers
MOST_NUMBERED_CLASSES = 12  # up to here the cells of a heat map hold numbers
MOST_NAMED_CLASSES = 25  # up to here every class has a tick
WORST_CONFUSIONS = 12  # listed where the cells hold no numbers


def _class_ticks(axis: Axis, class_names: Sequence[str]) -> None:
    """The names of the classes at the cells of a heat map; long ones are slanted along x."""
    names = [plain(name) for name in class_names]
    index_ticks(axis, len(names), names, most=MOST_NAMED_CLASSES)
    if axis.axis_name == "x" and max(map(len, names), default=0) > 3:
        for label in axis.get_ticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")


# ---- class mix ----------------------------------------------------------------------------------


def count_classes(shards: Sequence[np.ndarray], labels_n: np.ndarray, classes: int) -> np.ndarray:
    """How many samples of each class each worker holds: int64 [N, C]."""
    return np.stack([np.bincount(labels_n[ids], minlength=classes) for ids in shards])


@styled
def draw_class_mix(counts_NC: np.ndarray, class_names: Sequence[str], shown: Shown | None = None) -> Figure:
    """Share of each class in each worker's shard as a heat map, and the shard sizes beside it.

    With many workers the rows are sorted by main class, so that the skew stays visible. ``shown``: what classes are,
    where they are other groups of samples.
    """
    import seaborn

    shown = shown or Shown()
    workers, classes = counts_NC.shape
    many = workers > MOST_LISTED_WORKERS
    sizes_N = counts_NC.sum(1)
    share_NC = counts_NC / np.maximum(sizes_N, 1)[:, None]
    if many:
        order = np.lexsort((-share_NC.max(1), share_NC.argmax(1)))
        share_NC, sizes_N = share_NC[order], sizes_N[order]

    width, height = np.clip(3.6 + 0.45 * classes, 6.5, 10), np.clip(1.6 + 0.34 * workers, 3, 7)
    figure = Figure(figsize=(width, height))
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    annotate = workers <= 20 and classes <= MOST_NUMBERED_CLASSES
    seaborn.heatmap(
        100 * share_NC, ax=heat, cmap="viridis", vmin=0, annot=annotate, fmt=".0f", annot_kws={"size": 9},
        xticklabels=False, yticklabels=False, linewidths=0.6 if annotate else 0,
        cbar_kws={"label": "share of shard (%)", "location": "left", "shrink": 0.9},
    )  # fmt: skip
    heat.grid(False)
    _class_ticks(heat.xaxis, class_names)
    heat.set(xlabel=shown.stratum, title=f"{shown.group.capitalize()} mix of {workers:,} worker{'s' * (workers > 1)}")
    if many:
        heat.set(ylabel=f"workers, sorted by their main {shown.group}", yticks=[])
        bars.fill_betweenx(np.arange(workers) + 0.5, sizes_N, step="mid", color=BLUE, linewidth=0)
    else:
        heat.set_ylabel("worker")
        index_ticks(heat.yaxis, workers, list(map(str, range(workers))), most=24)
        bars.barh(np.arange(workers) + 0.5, sizes_N, height=0.8, color=BLUE)
    bars.tick_params(axis="y", left=False, labelleft=False)
    bars.grid(False, axis="y")
    bars.set(xlabel="samples", title="Shard size")
    bars.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    return figure


# ---- confusion ----------------------------------------------------------------------------------


@styled
def draw_confusion(counts_CC: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Which class the model takes for which on the test set, and how often it is right on each class.

    ``counts_CC``: row = true class, column = predicted. A colour is a share of its row, on a scale that
    shows rare confusions too. Cells too small for numbers are helped by a list of the most frequent confusions.
    """
    classes, samples = len(class_names), int(counts_CC.sum())
    sizes_C = counts_CC.sum(1)
    share_CC = counts_CC / np.where(sizes_C > 0, sizes_C, np.nan)[:, None]
    side = float(np.clip(1.5 + 0.42 * classes, 3, 6.2))
    numbered = classes <= MOST_NUMBERED_CLASSES and 0.11 * len(str(counts_CC.max())) < side / classes  # inches
    widths = (side, 1.4) if numbered else (side, 1.4, 2.7)
    figure = Figure(figsize=(2.2 + sum(widths), side + 1.1))
    heat, bars, *rest = figure.subplots(1, len(widths), width_ratios=widths)
    colours = colormaps["Blues"].with_extremes(bad="#EEEEEE")
    image = heat.imshow(
        share_CC, cmap=colours, norm=PowerNorm(0.5, 0, 1), extent=(0, classes, classes, 0), aspect="auto"
    )  # fmt: skip
    label = "share of the true class"
    scale = figure.colorbar(image, ax=heat, location="left", shrink=0.9, label=label, format=PercentFormatter(1))
    scale.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    heat.grid(False)
    for axis in heat.xaxis, heat.yaxis:
        _class_ticks(axis, class_names)
    right = int(counts_CC.diagonal().sum())
    said = f"{right / samples:.1%} of {samples:,} test samples right" if samples else "no test samples"
    heat.set(xlabel="predicted class", ylabel="true class", title=f"Confusion of the consensus model\n{said}")
    if numbered:
        for (row, column), count in np.ndenumerate(counts_CC):
            ink = "white" if share_CC[row, column] > 0.4 else "black"
            if count:
                heat.text(column + 0.5, row + 0.5, f"{count}", ha="center", va="center", color=ink, size=9)
    else:
        _worst_confusions(rest[0], counts_CC, class_names)
    _class_accuracy(bars, share_CC.diagonal(), right / samples if samples else np.nan)
    return figure


def _class_accuracy(axes: Axes, accuracy_C: np.ndarray, overall: float) -> None:
    """A bar a class in the rows of the heat map; dashed: over all samples. NaN: a class without samples."""
    classes = len(accuracy_C)
    axes.barh(np.arange(classes) + 0.5, accuracy_C, height=0.8 if classes <= MOST_NAMED_CLASSES else 1, color=BLUE)
    axes.axvline(overall, color=BLACK, linewidth=1, linestyle=(0, (4, 2)))
    if classes <= MOST_NAMED_CLASSES:
        for row, accuracy in enumerate(accuracy_C):
            text = f"{accuracy:.0%}" if np.isfinite(accuracy) else "n/a"
            axes.text(1.05, row + 0.5, text, va="center", size=9)
    axes.set(xlim=(0, 1), ylim=(classes, 0), yticks=[], xlabel="accuracy", title="By class\n(dashed: all)")
    axes.grid(False, axis="y")
    axes.set_xticks([0, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def _worst_confusions(axes: Axes, counts_CC: np.ndarray, class_names: Sequence[str]) -> None:
    """A list of the most frequent confusions."""
    axes.axis("off")
    wrong_CC = counts_CC * (1 - np.eye(len(counts_CC), dtype=np.int64))
    worst = np.argsort(-wrong_CC, axis=None, kind="stable")[:WORST_CONFUSIONS]
    pairs = [divmod(int(cell), len(counts_CC)) for cell in worst if wrong_CC.flat[cell] > 0]
    entries = [
        f"{plain(class_names[true])} → {plain(class_names[taken])}\n   {wrong_CC[true, taken]:,} of "
        f"{counts_CC[true].sum():,} ({wrong_CC[true, taken] / counts_CC[true].sum():.0%})"
        for true, taken in pairs
    ]
    axes.set_title("Most confused\ntrue → predicted")
    axes.text(0, 1, "\n".join(entries) or "nothing", transform=axes.transAxes, va="top", size=9, linespacing=1.3)
