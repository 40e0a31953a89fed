"""What ``python -m valuation`` found, as pictures: values beside the truth, and what each method costs.

Reads valuation.json. Legend: N institutions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.records import PathLike, read_record, spelled
from visualization.style import CATEGORIES, GREY, MARKS, save, style

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


def look(i: int) -> tuple[str, str]:
    """Colour and mark of the i-th method."""
    return CATEGORIES[i % len(CATEGORIES)], MARKS[(i + i // len(CATEGORIES)) % len(MARKS)]
