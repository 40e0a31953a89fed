"""Pictures of influence: the audit, the extreme samples, accuracy by share kept; all from records.

``draw_*`` make a matplotlib Figure; ``plot_*`` read records, draw and save. Positive scores helped.
What a pruning was worth is in comparison_plots.py, the scores by class and worker in score_plots.py, the ripples
on the graph in node_view.py.
Legend: n samples, M groups of the audit, R ratios.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from utils.records import PathLike
from visualization.checked import load_audit, load_sweep
from visualization.comparison_plots import comparisons_of, plot_all_comparisons, plot_comparison
from visualization.node_view import plot_node_view
from visualization.score_plots import plot_scores
from visualization.style import (
    BLACK,
    GREY,
    LONGEST_LABEL,
    METHODS,
    OTHER,
    RED,
    accuracy_scale,
    note,
    plain,
    power_ticks,
    save,
    styled,
)

__all__ = [  # all pictures of influence, wherever they are drawn
    "comparisons_of", "plot_all_comparisons", "plot_audit", "plot_comparison", "plot_contact_sheet", "plot_node_view",
    "plot_scores", "plot_sweep",
]  # fmt: skip
LONGEST_SOURCE = 20  # letters of a folder or file name in a cell of the contact sheet


# ---- audit --------------------------------------------------------------------------------------


def plot_audit(run_dir: PathLike, out: PathLike) -> Path:
    """Draw ``audit.json`` of a run, predicted against actual change, and write the picture to ``out``."""
    return save(draw_audit(load_audit(run_dir)), out)


@styled
def draw_audit(audit: dict[str, Any]) -> Figure:
    """A panel a method: predicted (own scale) against actual change of F for each masked group.

    Grey lines: zero; dashed: predicted = actual. Either is left out where it is out of view.
    """
    methods, actual_M = audit["methods"], np.array(audit["actual"], dtype=float)
    columns = min(3, max(1, len(methods)))
    rows = -(-max(1, len(methods)) // columns)
    figure = Figure(figsize=(max(5.6, 3.3 * columns), 0.7 + 3.1 * rows))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, (name, method) in zip(panels, methods.items(), strict=False):
        predicted_M = np.array(method["predicted"], dtype=float)
        look = METHODS.get(name, OTHER)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.scatter(predicted_M, actual_M, s=26, color=look["color"], marker=look["marker"], alpha=0.75, linewidths=0)
        for set_limits, values_M in (axes.set_xlim, predicted_M), (axes.set_ylim, actual_M):
            set_limits(*_padded(values_M))
        low, high = max(axes.get_xlim()[0], axes.get_ylim()[0]), min(axes.get_xlim()[1], axes.get_ylim()[1])
        if low < high:
            axes.plot([low, high], [low, high], color=BLACK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        lds, low, high = np.array([method.get("lds"), *(method.get("interval") or (None, None))], dtype=float)
        text = f"LDS {lds:.2f}" if np.isfinite(lds) else "LDS undefined"
        text += f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) and np.isfinite(high) else ""
        axes.set_title(f"{plain(name)}: {text.replace('-', '−')}")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        power_ticks(axes.xaxis, "predicted change", "" if name == "random" else "nats")
    for axes in panels[len(methods) :]:
        axes.axis("off")
    for axes in panels[::columns]:
        power_ticks(axes.yaxis, "actual change", "nats")
    figure.suptitle(
        f"{len(actual_M)} retrainings, {100 * audit['fraction']:.3g}% of the samples masked in each: change of\n"
        f"the validation loss ({plain(audit['target'])}); dashed: predicted = actual",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    return figure


def _padded(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return -1.0, 1.0
    pad = 0.07 * np.ptp(values) or max(abs(values[0]), 1e-6)
    return values.min() - pad, values.max() + pad


# ---- contact sheet ------------------------------------------------------------------------------


def plot_contact_sheet(
    images_nHWC: np.ndarray,
    labels_n: np.ndarray,
    scores_m: np.ndarray,
    sample_ids_m: np.ndarray,
    class_names: Sequence[str],
    out: PathLike,
    flipped: Collection[int] | None = None,
    method: str = "",
    sources: Sequence[str] | None = None,
) -> Path:
    """Draw the most helpful and the most harmful images and write the sheet to ``out``."""
    args = images_nHWC, labels_n, scores_m, sample_ids_m, class_names, flipped, method, sources
    return save(draw_contact_sheet(*args), out)


@styled
def draw_contact_sheet(
    images_nHWC: np.ndarray,
    labels_n: np.ndarray,
    scores_m: np.ndarray,
    sample_ids_m: np.ndarray,
    class_names: Sequence[str],
    flipped: Collection[int] | None = None,
    method: str = "",
    sources: Sequence[str] | None = None,
    each: int = 16,
) -> Figure:
    """The ``each`` highest-scored and lowest-scored images, with label, score, sample id and source.

    ``images_nHWC`` (uint8, C 1 or 3), ``labels_n`` (as trained on) and ``sources`` are by sample id; ``scores_m``
    are those of ``sample_ids_m``. Images whose id is in ``flipped`` get a thick frame.
    """
    order_m = np.argsort(-np.asarray(scores_m), kind="stable")
    order_m = order_m[np.isfinite(np.asarray(scores_m)[order_m])]
    each = min(each, len(order_m) // 2)
    shown = order_m[:each], order_m[::-1][:each]
    largest = np.abs(np.asarray(scores_m)[np.concatenate(shown)]).max(initial=0)
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    scale = rf" in $10^{{{power}}}$" if power else ""

    columns = int(np.clip(each, 4, 8))
    cell, heading, margin = (1.5 if sources else 1.2), 0.6, 0.1  # inches; known sizes, so no layout is searched
    named = [_two_lines(sources[sample_ids_m[i]]) for i in np.concatenate(shown)] if sources else []
    caption = 0.155 * (2 + max(map(len, named), default=0)) + 0.08
    block = heading + -(-each // columns) * (cell + caption)
    width, height = margin + columns * cell, 2 * block + margin
    figure = Figure(figsize=(width, height), layout="none")
    by = f", {plain(method, LONGEST_LABEL)}" if method else ""
    for top, picked, title in zip((height, height - block), shown, ("Most helpful", "Most harmful"), strict=True):
        framed = "; framed: flipped label" if flipped else ""
        where = ", source (whole paths: stage1/sources.txt)" if sources else ""
        text = f"{title} samples{by}\nlabel, sample id, score{scale}{where}{framed}"
        figure.text(margin / width, (top - margin) / height, text, va="top", fontsize=11)
        for place, i in enumerate(picked):
            row, column = divmod(place, columns)
            x, y = margin + column * cell, top - heading - (row + 1) * (cell + caption) + margin
            side, sample = cell - margin, int(sample_ids_m[i])
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            axes.axis("off")
            image = images_nHWC[sample, ..., 0] if images_nHWC.shape[-1] == 1 else images_nHWC[sample]
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            if flipped is not None and sample in flipped:
                look = {"fill": False, "color": RED, "linewidth": 5, "clip_on": False}
                axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **look))
            score = f"{scores_m[i] / 10.0**power:+.2f}".replace("-", "−")
            lines = [plain(class_names[labels_n[sample]]), f"#{sample}  {score}"]
            lines += _two_lines(sources[sample]) if sources else []
            axes.set_title("\n".join(lines), fontsize=9, loc="center", pad=5)
    return figure


def _two_lines(source: str) -> list[str]:
    """A path as its folder, of which the end tells most, and its file name, cut to what a cell has room for."""
    folder, slash, name = source.rpartition("/")
    folder = f"…{folder[1 - LONGEST_SOURCE :]}" if len(folder) > LONGEST_SOURCE else folder
    return [*([plain(folder + slash, LONGEST_SOURCE + 1)] if slash else []), plain(name, LONGEST_SOURCE)]


# ---- sweep --------------------------------------------------------------------------------------


def plot_sweep(run_dir: PathLike, out: PathLike) -> Path:
    """Draw ``sweep.json`` of a run, accuracy against the share kept, and write the picture to ``out``."""
    return save(draw_sweep(load_sweep(run_dir)), out)


@styled
def draw_sweep(sweep: dict[str, Any]) -> Figure:
    """Test accuracy of stage 2 over the share of samples kept, a line a method; bars: ± deviation."""
    ratio_R = np.array(sweep["ratios"], dtype=float)
    order_R = np.argsort(ratio_R)
    figure = Figure(figsize=(6.8, 4.3))
    axes = figure.subplots()
    notes = [f"mean over {sweep['seeds']} seeds"] if (sweep.get("seeds") or 1) > 1 else []
    if any(method.get("test_accuracy_std") is not None for method in sweep["methods"].values()):
        notes.append("bars: ± standard deviation")
    for k, (name, method) in enumerate(sweep["methods"].items()):
        look = {"linestyle": "-", **METHODS.get(name, OTHER)}
        mean_R, deviation_R = np.array(method["test_accuracy"], dtype=float), method.get("test_accuracy_std")
        if deviation_R is not None:
            deviation_R = np.array(deviation_R, dtype=float)[order_R]
        shift = 0.004 * (k - (len(sweep["methods"]) - 1) / 2)  # bars of several methods side by side
        axes.errorbar(
            ratio_R[order_R] + shift * (deviation_R is not None), mean_R[order_R], deviation_R, label=plain(name),
            linewidth=2, markersize=6, capsize=2, elinewidth=1, zorder=2 - (name == "random"), **look,
        )  # fmt: skip
    full, deviation = float(sweep["stage1"]["test_accuracy"]), sweep["stage1"].get("test_accuracy_std")
    label = f"no pruning ({full:.1%})"
    if deviation is not None:
        axes.axhspan(full - deviation, full + deviation, color=BLACK, alpha=0.1, linewidth=0, zorder=0)
        label = f"no pruning\n({full:.1%} ± {deviation:.1%})"
    axes.axhline(full, color=BLACK, linewidth=1.2, linestyle=":", label=label)
    title = f"Accuracy after pruning and retraining\n{'; '.join(notes)}".rstrip()
    axes.set(xlabel="training samples kept", ylabel="test accuracy", title=title)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    accuracy_scale(axes)
    if not len(ratio_R):
        note(axes, "nothing was swept")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
