"""Pictures of influence: the audit, the extreme samples, and what pruning did; all from records.

``draw_*`` make a matplotlib Figure; ``plot_*`` read records, draw and save. Positive scores helped.
The scores by class and worker are in score_plots.py, the ripples on the graph in node_view.py.
Legend: N workers, n samples, M groups of the audit, R ratios, T rounds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from utils.records import PathLike
from visualization.checked import damaged, load_audit, load_lines, load_summary, load_sweep
from visualization.node_view import plot_node_view
from visualization.score_plots import plot_scores
from visualization.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LONGEST_LABEL,
    ORANGE,
    PINK,
    RED,
    Lines,
    accuracy_scale,
    line,
    loss_scale,
    note,
    note_if_empty,
    plain,
    power_ticks,
    round_ticks,
    save,
    series,
    styled,
)

__all__ = [  # all pictures of influence, wherever they are drawn
    "plot_audit", "plot_comparison", "plot_contact_sheet", "plot_node_view", "plot_scores", "plot_sweep",
]  # fmt: skip

# One colour and mark a method, the same in every picture.
METHODS = {
    "cascade": {"color": BLUE, "marker": "o"},
    "dice": {"color": RED, "marker": "s"},
    "delete": {"color": GREEN, "marker": "D"},
    "if": {"color": PINK, "marker": "^"},
    "random": {"color": GREY, "marker": "X", "linestyle": "--"},
}
OTHER = {"color": ORANGE, "marker": "v"}


# ---- stage against stage ------------------------------------------------------------------------


def plot_comparison(run_dir_stage1: PathLike, run_dir_stage2: PathLike, out: PathLike) -> Path:
    """Draw the stage before and the stage after pruning on one sheet and write it to ``out``.

    Raises UsageError where a directory is no finished stage.
    """
    stages = {}
    for name, path in (
        ("stage 1, all samples", run_dir_stage1),
        (_stage2_name(run_dir_stage2), run_dir_stage2),
    ):
        lines, summary = load_lines(path), load_summary(path)
        if summary["test_accuracy"] is None:
            raise damaged(Path(path, "summary.json"), "it has no 'test_accuracy'")
        stages[name] = lines, summary
    return save(draw_comparison(stages), out)


def _stage2_name(path: PathLike) -> str:
    """What a directory stage2_<algorithm>_<ratio> says, else its name."""
    named = re.fullmatch(r"stage2_(.+)_(\d*\.?\d+)", Path(path).name)
    return f"stage 2, {named[1]}, {100 * float(named[2]):.4g}% kept" if named else Path(path).name


@styled
def draw_comparison(stages: dict[str, tuple[Lines, dict[str, Any]]]) -> Figure:
    """Loss and accuracy over rounds and the final test accuracy, of two stages.

    ``stages``: for each name its metrics lines and its summary. Bands reach from the worst worker to
    the best. The axis is rounds, since epochs of a smaller training set are shorter.
    """
    figure = Figure(figsize=(10.5, 4.2))
    loss, accuracy, final = figure.subplots(1, 3, width_ratios=(3, 3, 2.2))
    tests = []
    for x, (stage, (lines, summary)) in enumerate(stages.items()):
        name, color = plain(stage, LONGEST_LABEL), (BLUE, RED)[x]
        for axes, what in (loss, "loss"), (accuracy, "accuracy"):
            worker_T, low_T, high_T = _range_of_workers(lines, f"worker_val_{what}")
            label = f"{name}: range of the workers"
            axes.fill_between(worker_T, low_T, high_T, color=color, alpha=0.18, linewidth=0, label=label)
            mean = series(lines, "round", f"val_{what}")
            line(axes, *mean, color=color, linewidth=1, label=f"{name}: mean of the workers")
            consensus = series(lines, "round", f"consensus_val_{what}")
            look = {"color": color, "linewidth": 2.6, "linestyle": ("-", (0, (4, 1.5)))[x]}
            line(axes, *consensus, label=f"{name}: consensus model", **look)
        worker_N = summary.get("worker_test_accuracy")
        worker_N = np.empty(0) if worker_N is None else np.asarray(worker_N, dtype=float)
        tests.append(float(summary["test_accuracy"]))
        spread_N = x + np.linspace(-0.18, 0.18, len(worker_N)) if len(worker_N) > 1 else [x] * len(worker_N)
        final.scatter(spread_N, worker_N, s=14, color=color, alpha=0.45, linewidths=0)
        final.hlines(tests[x], x - 0.3, x + 0.3, color=color, linewidth=2.6)
    loss.set(ylabel="validation loss (nats)", title="Loss over rounds")
    accuracy.set(ylabel="validation accuracy", title="Accuracy over rounds")
    for axes, scale in (loss, loss_scale), (accuracy, accuracy_scale):
        axes.set_xlabel("round")
        round_ticks(axes)
        note_if_empty(axes)
        scale(axes)
    names = [f"stage {x + 1}\n{test:.2%}" for x, test in enumerate(tests)]
    final.set(
        xlim=(-0.6, 1.6), xticks=range(2), xticklabels=names, ylabel="test accuracy",
        title=f"Test accuracy: {100 * (tests[1] - tests[0]):+.2f} points",
    )  # fmt: skip
    low, high = final.dataLim.intervaly
    middle, half = (low + high) / 2, max(0.6 * (high - low), 0.01)  # small differences stay small
    final.set_ylim(middle - half, middle + half)
    final.grid(False, axis="x")
    accuracy_scale(final)
    final.xaxis.set_label_text("line: consensus model\ndots: workers")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _range_of_workers(lines: Lines, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round, smallest and largest value over the workers, of the lines that have them."""
    rows = [(row["round"], np.array(row[key], dtype=float)) for row in lines if row.get(key)]
    rows = [(round, values) for round, values in rows if np.isfinite(values).any()]
    table = [(round, np.nanmin(values), np.nanmax(values)) for round, values in rows]
    return tuple(np.array(table, dtype=float).reshape(-1, 3).T)


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
        axes.xaxis.set_major_locator(MaxNLocator(5))
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
    labels: np.ndarray,
    scores: np.ndarray,
    sample_ids: np.ndarray,
    class_names: Sequence[str],
    out: PathLike,
    flipped: Collection[int] | None = None,
) -> Path:
    """Draw the most helpful and the most harmful images and write the sheet to ``out``."""
    return save(draw_contact_sheet(images_nHWC, labels, scores, sample_ids, class_names, flipped), out)


@styled
def draw_contact_sheet(
    images_nHWC: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    sample_ids: np.ndarray,
    class_names: Sequence[str],
    flipped: Collection[int] | None = None,
    each: int = 16,
) -> Figure:
    """The ``each`` highest-scored and lowest-scored images, with label, sample id and score.

    ``images_nHWC`` (uint8, C 1 or 3), ``labels``, ``scores`` and ``sample_ids`` go together row by
    row; labels are those trained on. Images whose id is in ``flipped`` get a thick frame.
    """
    order_n = np.argsort(-np.asarray(scores), kind="stable")
    order_n = order_n[np.isfinite(np.asarray(scores)[order_n])]
    each = min(each, len(order_n) // 2)
    shown = order_n[:each], order_n[::-1][:each]
    largest = np.abs(np.asarray(scores)[np.concatenate(shown)]).max(initial=0)
    power = int(np.floor(np.log10(largest))) if largest > 0 else 0
    scale = rf" in $10^{{{power}}}$" if power else ""

    columns = int(np.clip(each, 4, 8))
    cell, caption, heading, margin = 1.2, 0.38, 0.5, 0.1  # inches; known sizes, so no layout is searched
    block = heading + -(-each // columns) * (cell + caption)
    width, height = margin + columns * cell, 2 * block + margin
    figure = Figure(figsize=(width, height), layout="none")
    for top, picked, title in zip((height, height - block), shown, ("Most helpful", "Most harmful"), strict=True):
        framed = "\nframed: flipped label" if flipped else ""
        text = f"{title}: label, sample id, score{scale}{framed}"
        figure.text(margin / width, (top - margin) / height, text, va="top", fontsize=11)
        for place, i in enumerate(picked):
            row, column = divmod(place, columns)
            x, y = margin + column * cell, top - heading - (row + 1) * (cell + caption) + margin
            side = cell - margin
            axes = figure.add_axes((x / width, y / height, side / width, side / height))
            axes.axis("off")
            image = images_nHWC[i, ..., 0] if images_nHWC.shape[-1] == 1 else images_nHWC[i]
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            if flipped is not None and sample_ids[i] in flipped:
                look = {"fill": False, "color": RED, "linewidth": 5, "clip_on": False}
                axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **look))
            name = plain(class_names[labels[i]])
            score = f"{scores[i] / 10.0**power:+.2f}".replace("-", "−")
            axes.set_title(f"{name}\n#{sample_ids[i]}  {score}", fontsize=9, loc="center", pad=4)
    return figure


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
