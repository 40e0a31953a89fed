"""Pictures of influence: the audit, and how good models are by share kept; all from records.

``draw_*`` make a matplotlib Figure; ``plot_*`` read records, draw and save. Positive scores helped.
What a pruning was worth is in comparison_plots.py, the scores by class and worker in score_plots.py, the extreme
samples in contact_sheet.py, the ripples on the graph in node_view.py.
Legend: n samples, M groups of the audit, R ratios.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from utils.records import PathLike
from visualization.checked import load_audit, load_shown, load_sweep
from visualization.comparison_plots import comparisons_of, plot_all_comparisons, plot_comparison
from visualization.contact_sheet import draw_contact_sheet, plot_contact_sheet
from visualization.edges import plot_edges
from visualization.measures import ACCURACY, LOSS, Measure, metric_scale
from visualization.node_view import plot_node_view
from visualization.score_plots import plot_scores
from visualization.style import (
    BLACK,
    GREY,
    METHODS,
    OTHER,
    note,
    plain,
    power_ticks,
    save,
    styled,
)

__all__ = [  # all pictures of influence, wherever they are drawn
    "comparisons_of", "draw_contact_sheet", "plot_all_comparisons", "plot_audit", "plot_comparison",
    "plot_contact_sheet", "plot_edges", "plot_node_view", "plot_scores", "plot_sweep",
]  # fmt: skip


# ---- audit --------------------------------------------------------------------------------------


def plot_audit(run_dir: PathLike, out: PathLike, stage1_dir: PathLike | None = None) -> Path:
    """Draw ``audit.json`` of a run, predicted against actual change, and write the picture to ``out``. ``stage1_dir``:
    the stage that says what its loss is, unless it is stage1 in the folder."""
    return save(draw_audit(load_audit(run_dir), load_shown(stage1_dir or Path(run_dir, "stage1")).loss), out)


@styled
def draw_audit(audit: dict[str, Any], loss: Measure = LOSS) -> Figure:
    """A panel a method: predicted (own scale) against actual change of F for each masked group.

    Grey lines: zero; dashed: predicted = actual. Either is left out where it is out of view. Retrainings that diverged
    have no place on it and are counted above it.
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
        power_ticks(axes.xaxis, "predicted change", "" if name == "random" else loss.unit)
    for axes in panels[len(methods) :]:
        axes.axis("off")
    for axes in panels[::columns]:
        power_ticks(axes.yaxis, "actual change", loss.unit)
    gone = int((~np.isfinite(actual_M)).sum())
    figure.suptitle(
        f"{len(actual_M)} retrainings, {100 * audit['fraction']:.3g}% of the samples masked in each: change of\n"
        f"the validation loss ({plain(audit['target'])}); dashed: predicted = actual"
        + f"; {gone} diverged" * (gone > 0),
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    return figure


def _padded(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return -1.0, 1.0
    pad = 0.07 * np.ptp(values) or max(abs(values[0]), 1e-6)
    return values.min() - pad, values.max() + pad


# ---- sweep --------------------------------------------------------------------------------------


def plot_sweep(run_dir: PathLike, out: PathLike) -> Path:
    """Draw ``sweep.json`` of a run, the test figure against the share kept, and write the picture to ``out``."""
    return save(draw_sweep(load_sweep(run_dir)), out)


@styled
def draw_sweep(sweep: dict[str, Any]) -> Figure:
    """The test figure of stage 2 over the share of samples kept, a line a method; bars: ± deviation."""
    metric: Measure = sweep.get("metric", ACCURACY)
    key = f"test_{metric.name}"
    ratio_R = np.array(sweep["ratios"], dtype=float)
    order_R = np.argsort(ratio_R)
    figure = Figure(figsize=(6.8, 4.3))
    axes = figure.subplots()
    notes = [f"mean over {sweep['seeds']} seeds"] if (sweep.get("seeds") or 1) > 1 else []
    if any(method.get(f"{key}_std") is not None for method in sweep["methods"].values()):
        notes.append("bars: ± standard deviation")
    for k, (name, method) in enumerate(sweep["methods"].items()):
        look = {"linestyle": "-", **METHODS.get(name, OTHER)}
        mean_R, deviation_R = np.array(method[key], dtype=float), method.get(f"{key}_std")
        if deviation_R is not None:
            deviation_R = np.array(deviation_R, dtype=float)[order_R]
        shift = 0.004 * (k - (len(sweep["methods"]) - 1) / 2)  # bars of several methods side by side
        axes.errorbar(
            ratio_R[order_R] + shift * (deviation_R is not None), mean_R[order_R], deviation_R, label=plain(name),
            linewidth=2, markersize=6, capsize=2, elinewidth=1, zorder=2 - (name == "random"), **look,
        )  # fmt: skip
    full, deviation = float(sweep["stage1"][key]), sweep["stage1"].get(f"{key}_std")
    digits = ".1%" if metric.is_accuracy else ".4g"
    label = f"no pruning ({full:{digits}})"
    if deviation is not None:
        axes.axhspan(full - deviation, full + deviation, color=BLACK, alpha=0.1, linewidth=0, zorder=0)
        label = f"no pruning\n({full:{digits}} ± {deviation:{digits}})"
    axes.axhline(full, color=BLACK, linewidth=1.2, linestyle=":", label=label)
    title = f"{metric.title} after pruning and retraining\n{'; '.join(notes)}".rstrip()
    axes.set(xlabel="training samples kept", ylabel=metric.label("test"), title=title)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    metric_scale(axes, metric)
    if not len(ratio_R):
        note(axes, "nothing was swept")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
