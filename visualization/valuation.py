"""What ``python -m valuation`` found, as pictures: values beside the truth, and what each method costs; over several
seeds values against the truth, and how far each method is off.

Reads valuation.json, of several seeds summary.json too. Legend: N institutions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.records import PathLike, read_record, spelled
from visualization.style import BLACK, BLUE, CATEGORIES, GREY, MARKS, save, style, styled

FREE = {"equal": "--", "size": ":"}  # methods that need no model


def plot_valuation(folder: PathLike) -> list[Path]:
    """All pictures of a results folder, written into ``plots`` in it. Raises UsageError of damaged records."""
    folder = Path(folder)
    record = read_record(folder / "valuation.json", "institutions", "truth", "methods", "metric")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    with style():
        written = [save(draw_values(record), plots / "values.png")]
        if record["truth"] is not None:
            written.append(save(draw_costs(record), plots / "costs.png"))
    return written


def draw_values(record: dict[str, Any]) -> Figure:
    """The truth as bars, and every method's value of every institution as a mark."""
    names, methods, truth = record["institutions"], record["methods"], record["truth"]
    N = len(names)
    figure = Figure(figsize=(max(6.5, 1.1 * N + 3), 4))
    axes = figure.add_subplot()
    if truth is not None:
        error = record.get("truth_error")
        label = "truth (all coalitions trained)" if error is None else "truth, from random orders (± 2 standard errors)"
        spread = None if error is None else 2 * np.nan_to_num(np.array(error, float))
        axes.bar(range(N), truth, 0.86, yerr=spread, color=GREY, alpha=0.3, ecolor=GREY, label=label)
    offsets = np.linspace(-0.34, 0.34, len(methods)) if len(methods) > 1 else [0.0]
    for i, (name, found) in enumerate(methods.items()):
        label = name.replace("_", " ")
        if found.get("relative_l1") is not None:
            label += f" (off by {found['relative_l1']:.0%})"
        colour, mark = look(i)
        axes.plot(np.arange(N) + offsets[i], found["values"], mark, color=colour, markersize=6, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    sizes = record.get("sizes") or [None] * N
    ticks = [name if size is None else f"{name}\n{size:,}" for name, size in zip(names, sizes, strict=True)]
    axes.set_xticks(range(N), ticks)
    axes.set(xlabel="institution (below: training samples)", ylabel=f"value ({spelled(record['metric'])})")
    axes.set_title("What each institution's data are worth")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def draw_costs(record: dict[str, Any]) -> Figure:
    """Seconds of each method, after the training of the model of all, and how far it is off."""
    methods = record["methods"]
    figure = Figure(figsize=(6.5, 3.6))
    axes = figure.add_subplot()
    for i, (name, found) in enumerate(methods.items()):
        error = found.get("relative_l1")
        if error is None or name == "leave_one_out":  # it costs what its coalitions cost
            continue
        colour, mark = look(i)
        if name in FREE:
            axes.axhline(error, color=colour, linestyle=FREE[name], label=f"{name}: nothing")
        else:
            seconds, shown = found["seconds"], name.replace("_", " ")
            axes.plot(max(seconds, 1e-3), error, mark, color=colour, markersize=8, label=f"{shown}: {seconds:.2g} s")
    if record.get("truth_seconds"):
        seconds = record["truth_seconds"]
        axes.plot(seconds, 0, "X", color=GREY, markersize=9, label=f"truth: {seconds:.2g} s")
    axes.set(xscale="log", xlabel="seconds after the model of all is trained", ylabel="relative L1 error")
    axes.set_ylim(bottom=-0.03)
    axes.set_title("How near, at what cost")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def plot_seeds(folder: PathLike) -> list[Path]:
    """Both pictures of a folder of several seeds, written into ``plots`` in it; none where there is no truth. Raises
    UsageError of damaged records."""
    folder = Path(folder)
    summary = read_record(folder / "summary.json", "seeds", "methods")
    if not summary["methods"]:
        return []
    paths = [folder / f"seed-{seed}" / "valuation.json" for seed in summary["seeds"]]
    records = [read_record(path, "institutions", "truth", "methods", "metric") for path in paths]
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    return [
        save(draw_against_truth(records, summary["methods"]), plots / "values.png"),
        save(draw_errors(records, summary["methods"]), plots / "errors.png"),
    ]


@styled
def draw_against_truth(records: list[dict[str, Any]], summary: dict[str, Any]) -> Figure:
    """A panel a method: values against the truth, a line a seed with a point an institution; dashed: the truth. All
    panels have one scale, for the methods that come near; triangles at the edge are values beyond it."""
    names = by_error(summary)
    rows = -(-len(names) // 5)
    columns = -(-len(names) // rows)
    figure = Figure(figsize=(max(0.8 + 2.4 * columns, 8.5), 0.9 + 2.4 * rows))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    truths = np.concatenate([record["truth"] for record in records])
    low, high = truths.min(), truths.max()
    pad = 0.06 * (high - low) or 0.1
    reach = max(0.75 * (high - low), 0.2 * abs(high))
    bottom, top = low - reach, high + reach
    for axes, name in zip(panels, names, strict=False):
        axes.plot([bottom, top], [bottom, top], color=GREY, linestyle=(0, (5, 3)), linewidth=1.2)
        for i, record in enumerate(records):
            order = np.argsort(record["truth"])
            truth_N, values_N = np.array(record["truth"])[order], np.array(record["methods"][name]["values"])[order]
            colour = CATEGORIES[i % len(CATEGORIES)]
            axes.plot(truth_N, values_N, "o-", color=colour, markersize=4, linewidth=0.8, alpha=0.8)
            for beyond_N, edge, mark in (values_N > top, top, "^"), (values_N < bottom, bottom, "v"):
                if beyond_N.any():  # an empty curve that is not clipped upsets the layout
                    axes.plot(truth_N[beyond_N], np.full(beyond_N.sum(), edge), mark, color=colour, clip_on=False)
        axes.set(xlim=(low - pad, high + pad), ylim=(bottom, top), title=titled(name, summary[name]))
    for axes in panels[len(names) :]:
        axes.axis("off")
    for axes in panels[len(names) - columns : len(names)]:  # the lowest panel of each column
        axes.xaxis.set_tick_params(labelbottom=True)
    panels[0].xaxis.set_major_locator(MaxNLocator(4))  # of all panels: they share it
    figure.supxlabel(f"true value ({spelled(records[0]['metric'])})", fontsize=10)
    figure.supylabel("value by the method", fontsize=10)
    what = f"{len(records)} seeds, a line each, a point an institution; dashed: the truth; triangles: beyond the scale"
    figure.suptitle(what, x=0.01, ha="left", fontsize=11)
    return figure


@styled
def draw_errors(records: list[dict[str, Any]], summary: dict[str, Any]) -> Figure:
    """The relative L1 error of each method: each seed, the mean and its 95 % interval; dashed: that of equal shares."""
    names = by_error(summary)[::-1]
    figure = Figure(figsize=(6.5, 1.2 + 0.32 * len(names)))
    axes = figure.add_subplot()
    for y, name in enumerate(names):
        mean, low, high = np.array(summary[name]["relative_l1"], float)
        colour = GREY if name in FREE else BLUE
        seeds = [record["methods"][name]["relative_l1"] for record in records]
        axes.plot(seeds, np.full(len(seeds), y), "o", color=colour, markersize=3, alpha=0.4)
        if np.isfinite([low, high]).all():
            axes.plot([max(low, 0), high], [y, y], color=colour, linewidth=2)
        axes.plot(mean, y, "o", color=colour, markersize=7)
    if "equal" in names:
        axes.axvline(summary["equal"]["relative_l1"][0], color=BLACK, linestyle="--", linewidth=1, zorder=0)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(xlabel="relative L1 error", ylim=(-0.6, len(names) - 0.4))
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"How far off: {len(records)} seeds, mean and 95 % interval (dashed: equal shares)")
    return figure


def by_error(summary: dict[str, Any]) -> list[str]:
    """The methods that have an error, the best first."""
    return sorted((n for n in summary if "relative_l1" in summary[n]), key=lambda name: summary[name]["relative_l1"][0])


def titled(name: str, figures: dict[str, list[float]]) -> str:
    """A method and how far it is off."""
    mean, low, high = np.array(figures["relative_l1"], float)
    interval = f" [{100 * max(low, 0):.0f}, {100 * high:.0f}]" if np.isfinite([low, high]).all() else ""
    return f"{name.replace('_', ' ')}\noff by {100 * mean:.0f}{interval} %"


def look(i: int) -> tuple[str, str]:
    """Colour and mark of the i-th method."""
    return CATEGORIES[i % len(CATEGORIES)], MARKS[(i + i // len(CATEGORIES)) % len(MARKS)]
