"""What pruning was worth: a picture for each pruning of a run, and all of them on one sheet; from records alone.

The validation samples chose what is kept, so they judge nothing here: figures are of the test set, and curves of
validation samples say that they are. A folder above several seeds has the same sheets over its seeds.
Legend: S seeds, T logged rounds, R rows.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from utils.records import PathLike, pruned_by, read_json
from visualization.checked import UNSCORED, load_comparison, load_lines, load_shown
from visualization.finals import Final, draw_finals, load_final, rows_of
from visualization.measures import ACCURACY, Measure, Shown, metric_scale
from visualization.style import (
    BLACK,
    BLUE,
    GREY,
    LONGEST_LABEL,
    METHODS,
    OTHER,
    RED,
    Lines,
    line,
    loss_scale,
    mean_curve,
    note_if_empty,
    plain,
    round_ticks,
    save,
    styled,
)

LONGEST_VERDICT = 400  # letters


@dataclass(frozen=True)
class Stage:
    """A stage of a pruning, or the same stage of several seeds."""

    name: str
    runs: Sequence[Lines]  # the metrics lines of each seed
    final: Final
    look: dict[str, Any]


# ---- one pruning --------------------------------------------------------------------------------


def plot_comparison(path: PathLike, out: PathLike | None = None) -> Path:
    """Draw a ``comparison_<method>_<ratio>.json`` and the runs that it names; to ``out``, or beside it as PNG.

    Raises UsageError where a record is missing or damaged.
    """
    record = load_comparison(path)
    ratio = f"{100 * record['ratio']:.4g}% kept"
    named = {
        "stage1": ("stage 1, all samples", {"color": BLUE}),
        "control": (f"random, {ratio}", {"color": GREY, "marker": "X"}),
        "stage2": (f"{pruned_by(record)}, {ratio}", {"color": RED, "marker": "s"}),
    }
    stages = [
        Stage(name, [load_lines(run) for run in record["runs"][key]], _final(record, key), look)
        for key, (name, look) in named.items()
        if record["figures"][key] is not None
    ]
    shown = replace(load_shown(record["runs"]["stage1"][0]), metric=record["metric"])
    figure = draw_comparison(stages, record["algorithm"] not in UNSCORED, record["verdict"] or "", shown)
    return save(figure, out or Path(path).with_suffix(".png"))


@styled
def draw_comparison(
    stages: Sequence[Stage], chosen: bool = True, verdict: str = "", shown: Shown | None = None
) -> Figure:
    """The test figure at the end of each stage, and its validation curves over epochs (of stage 1's length).

    ``chosen``: the validation samples decided what is kept. Of one seed a band reaches from the worst worker to the
    best, of several it is their standard deviation. ``shown``: what figures are, accuracies unless given.
    """
    shown = shown or Shown()
    several = max(len(stage.runs) for stage in stages) > 1
    figure = Figure(figsize=(11.5, 4.4))
    final, metric, loss = figure.subplots(1, 3, width_ratios=(2.6, 3, 3))
    rows = zip(*((stage.final, stage.name, stage.look) for stage in stages), strict=True)
    draw_finals(final, *rows, measure=shown.metric)
    final.set_title(f"Test {shown.metric.words}")
    for axes, measure in (metric, shown.metric), (loss, shown.loss):
        for stage in stages:
            _curves(axes, stage, measure.name, band=several or stage.look["color"] != GREY)
        axes.set(xlabel="epoch", ylabel=f"validation {measure.words}{measure.units}")
        axes.set_title(f"Validation {measure.words}" + "\n(its samples chose what is kept)" * chosen)
        round_ticks(axes)
        note_if_empty(axes)
    metric_scale(metric, shown.metric)
    loss_scale(loss)
    band = f"± standard deviation over {len(stages[0].runs)} seeds" if several else "from the worst worker to the best"
    handles = [Line2D([], [], color=BLACK, linewidth=2.4, label="consensus model")]
    handles += [Line2D([], [], color=BLACK, linewidth=0.9, label="mean of the workers")] * (not several)
    handles += [Patch(color=BLACK, alpha=0.18, linewidth=0, label=band)]
    figure.legend(handles=handles, loc="outside lower right", ncols=3)
    if verdict:
        said = re.sub(r"-(?=\d)", "−", plain(verdict, LONGEST_VERDICT))
        figure.suptitle("\n".join(textwrap.wrap(said, 135)), x=0.01, ha="left", fontsize=10)
    return figure


def _curves(axes: Axes, stage: Stage, what: str, band: bool) -> None:
    """The consensus model's curve, thick, and of a single seed the workers' mean and range."""
    look = {"color": stage.look["color"], "linestyle": "--" if stage.look["color"] == GREY else "-"}
    x_T, mean_T, deviation_T = mean_curve(stage.runs, "epoch", f"consensus_val_{what}")
    if deviation_T is not None:
        low_T, high_T, band_T = mean_T - deviation_T, mean_T + deviation_T, x_T
    else:
        band_T, low_T, high_T = _range_of_workers(stage.runs[0], f"worker_val_{what}")
        line(axes, *mean_curve(stage.runs, "epoch", f"val_{what}")[:2], linewidth=0.9, **look)
    if band:
        axes.fill_between(band_T, low_T, high_T, color=look["color"], alpha=0.18, linewidth=0)
    line(axes, x_T, mean_T, label=plain(stage.name, LONGEST_LABEL), linewidth=2.4, **look)


def _range_of_workers(lines: Lines, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epoch, smallest and largest value over the workers, of the lines that have them."""
    rows = [(row.get("epoch"), np.array(row.get(key) or [], dtype=float)) for row in lines]
    rows = [(epoch, values) for epoch, values in rows if epoch is not None and np.isfinite(values).any()]
    table = [(epoch, np.nanmin(values), np.nanmax(values)) for epoch, values in rows]
    return tuple(np.array(table, dtype=float).reshape(-1, 3).T)


# ---- all prunings of a run ----------------------------------------------------------------------


def comparisons_of(folder: PathLike) -> list[Path]:
    """The records of the prunings of a run, or of its seeds, in this folder (but for old ones, which do not say
    which runs they compare)."""
    return [path for path in sorted(Path(folder).glob("comparison_*.json")) if "runs" in read_json(path)]


def plot_all_comparisons(folder: PathLike) -> Path:
    """Draw all prunings of a run folder on one sheet, ``comparison.png`` in it."""
    records = [load_comparison(path) for path in comparisons_of(folder)]
    return save(draw_all_comparisons(prunings(records)), Path(folder, "comparison.png"))


@dataclass(frozen=True)
class Pruning:
    """A row of the sheet."""

    name: str
    final: Final
    over_random: np.ndarray | None  # mean and ends of the interval; NaN: not known
    over_stage1: np.ndarray | None
    look: dict[str, Any]
    starts_group: bool = False
    metric: Measure = ACCURACY


def prunings(records: Sequence[dict[str, Any]]) -> list[Pruning]:
    """The rows of what ``load_comparison`` gives: stage 1, then by share kept, the random control of each last."""
    records = sorted(records, key=lambda record: (-record["ratio"], _place(record["algorithm"]), pruned_by(record)))
    rows = [_row("stage 1, all samples", records[0], "stage1", {"color": BLACK})]
    for ratio in dict.fromkeys(record["ratio"] for record in records):
        group = [record for record in records if record["ratio"] == ratio]
        methods = [record["algorithm"] for record in group]
        entries = [(pruned_by(record), record, "stage2") for record in group]
        controls = [record for record in group if record["figures"]["control"] is not None]
        if controls and "random" not in methods:
            entries.append(("random", controls[0], "control"))
        for place, (method, record, key) in enumerate(entries):
            name = "noprune" if method == "noprune" else f"{method}, {100 * ratio:.4g}% kept"
            look = METHODS.get(method.partition(" ")[0], OTHER)
            rows.append(_row(name, record, key, look, starts_group=place == 0))
    return rows


def _place(method: str) -> int:
    return [*METHODS, method].index(method)


def _row(name: str, record: dict[str, Any], key: str, look: dict[str, Any], starts_group: bool = False) -> Pruning:
    over = [record[over] if key == "stage2" else None for over in ("over_random", "over_stage1")]
    return Pruning(name, _final(record, key), *over, look, starts_group, record["metric"])


def _final(record: dict[str, Any], key: str) -> Final:
    """The recorded figures of a stage; those of accuracy with their interval, where its predictions are there."""
    return Final(record["figures"][key], load_final(record["runs"][key], record["metric"]).interval)


@styled
def draw_all_comparisons(rows: Sequence[Pruning]) -> Figure:
    """The test figure of each pruning, and by how much it differs from a random one of its size and from stage 1."""
    metric = rows[0].metric
    factor, least, unit = (100, 0.5, "points of ") if metric.is_accuracy else (1, 0.0, "")
    figure = Figure(figsize=(11.5, 2.0 + 0.3 * len(rows)))
    final, *differences = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    looks = [row.look for row in rows]
    draw_finals(final, [row.final for row in rows], [row.name for row in rows], looks, metric)
    final.axvline(rows[0].final.mean, color=BLACK, linewidth=1, linestyle=":")
    final.set_title(f"Test {metric.words} (dotted: stage 1)")
    scope = "of test samples" if all(len(row.final.values_S) == 1 for row in rows) else "over seeds"
    for axes, over, title in zip(
        differences, ("over_random", "over_stage1"), ("Minus random of its size", "Minus stage 1"), strict=True
    ):
        axes.axvline(0, color=BLACK, linewidth=1)
        for place, row in enumerate(rows):
            if (value := getattr(row, over)) is not None:
                _difference(axes, place, factor * value, row.look)
        rows_of(axes, len(rows))
        axes.margins(x=0.1)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -least), max(high, least))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set(title=title, xlabel=f"{metric.label(f'{unit}test')}\n95 % interval {scope}")
    figure.suptitle(
        "What the prunings of this run were worth, on test samples. Filled marks: the interval leaves zero out",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    for axes in figure.axes:
        for place, row in enumerate(rows):
            if row.starts_group:
                axes.axhline(place - 0.5, color="#CCCCCC", linewidth=0.8)
    return figure


def _difference(axes: Axes, row: int, points_3: np.ndarray, look: dict[str, Any]) -> None:
    """A dot and its interval, filled where the interval leaves zero out."""
    mean, low, high = points_3
    sure = low > 0 or high < 0
    if np.isfinite(low):
        axes.hlines(row, low, high, color=look["color"], linewidth=2.2)
    fill = look["color"] if sure else "white"
    axes.plot([mean], [row], look["marker"], color=look["color"], markerfacecolor=fill, markersize=7)
