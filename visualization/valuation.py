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


def plot_valuation(folder: PathLike) -> list[Path]:
    """All pictures of a results folder, written into ``plots`` in it. Raises UsageError of damaged records."""
    folder = Path(folder)
    record = read_record(folder / "valuation.json", "institutions", "truth", "methods", "metric")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    with style():
        return [save(draw_values(record), plots / "values.png"), save(draw_costs(record), plots / "costs.png")]


def draw_values(record: dict[str, Any]) -> Figure:
    """The truth as bars, and every method's value of every institution as a mark."""
    names, methods, truth = record["institutions"], record["methods"], record["truth"]
    N = len(names)
    figure = Figure(figsize=(max(6.5, 1.1 * N + 3), 4))
    axes = figure.add_subplot()
    if truth is not None:
        axes.bar(range(N), truth, 0.86, color=GREY, alpha=0.3, label="truth (all coalitions trained)")
    offsets = np.linspace(-0.34, 0.34, len(methods)) if len(methods) > 1 else [0.0]
    for i, (name, found) in enumerate(methods.items()):
        label = name.replace("_", " ")
        if found.get("relative_l1") is not None:
            label += f" (off by {found['relative_l1']:.0%})"
        colour, mark = CATEGORIES[i % len(CATEGORIES)], MARKS[i % len(MARKS)]
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
    seconds = {name: found["seconds"] for name, found in methods.items()}
    if record.get("truth_seconds") is not None:
        seconds["truth"] = record["truth_seconds"]
    figure = Figure(figsize=(6.5, 3.6))
    axes = figure.add_subplot()
    for i, (name, took) in enumerate(seconds.items()):
        error = methods[name].get("relative_l1") if name in methods else 0.0
        if error is None:
            continue
        mark = MARKS[i % len(MARKS)]
        axes.plot(max(took, 1e-4), error, mark, color=CATEGORIES[i % len(CATEGORIES)], markersize=8,
                  label=f"{name.replace('_', ' ')}: {took:.2g} s")  # fmt: skip
    axes.set(xscale="log", xlabel="seconds after the model of all is trained", ylabel="relative L1 error")
    axes.set_ylim(bottom=-0.02)
    axes.set_title("How near, at what cost")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure
