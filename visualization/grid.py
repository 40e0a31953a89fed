"""A grid of runs, from grid.json and the runs' records: a table, a picture of the metric over the values, a page.

Legend: V values of a flag, S seeds.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.errors import UsageError
from utils.records import PathLike, read_record
from visualization.checked import damaged
from visualization.measures import Measure, number_axis
from visualization.runs import Row, rows_of, table, write_index
from visualization.style import LONGEST_LABEL, category, note, plain, save, styled

MOST_PANELS = 6
MOST_LINES = 28


def sum_up(folder: PathLike, plots: bool = True) -> list[str]:
    """The table of a grid's runs, and, with ``plots``, the paths of grid.png and index.html; as lines to be printed.
    Raises UsageError where a record is damaged."""
    folder = Path(folder)
    record = read_record(folder / "grid.json", "axes", "runs")
    points = _points(folder, record)
    if not points:
        raise UsageError(f"no run of {folder / 'grid.json'} has been trained")
    rows = [row for _, row in points]
    lines = [table(rows)]
    if plots:
        axes = {str(name): [str(value) for value in values] for name, values in record["axes"].items()}
        lines.append(str(save(draw_grid(axes, points), folder / "grid.png")))
        lines.append(str(write_index(folder / "index.html", rows, folder.name)))
    return lines


def _points(folder: Path, record: dict[str, Any]) -> list[tuple[dict[str, str], Row]]:
    """The settings of each run that has begun, and its row."""
    points = []
    try:
        dict(record["axes"])
        for run in record["runs"]:
            rows = rows_of(folder / run["folder"], folder)
            points += [(dict(run["settings"]), row) for row in rows if row.name == run["folder"]]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise damaged(folder / "grid.json", "'axes' and 'runs' must say which values each run has") from error
    return points


@styled
def draw_grid(axes: dict[str, list[str]], points: list[tuple[dict[str, str], Row]]) -> Figure:
    """The figure over the flag with the most values (numbers first), a line a combination of the others; of three and
    more flags a panel a value of the one with the fewest."""
    metrics = {row.metric["name"]: row.metric for _, row in points if row.values}
    name = next(iter(metrics), "")
    measure = Measure(name, metrics[name]["higher_is_better"], metrics[name]["unit"]) if name else None
    order = sorted(axes, key=lambda flag: (_numbers(axes[flag]) is not None, len(axes[flag])), reverse=True)
    over, rest = order[0], order[1:]
    split = rest.pop() if len(rest) > 1 and len(axes[rest[-1]]) <= MOST_PANELS else None
    panels = axes[split] if split else [None]
    figure = Figure(figsize=(max(5.6, 4.2 * len(panels)), 4.2))
    number_V = _numbers(axes[over])
    x_V = np.arange(len(axes[over])) if number_V is None else number_V
    lines = list(itertools.product(*(axes[flag] for flag in rest)))
    for panel, drawn in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], strict=True):
        for k, values in enumerate(lines[:MOST_LINES]):
            wanted = dict(zip(rest, values, strict=True)) | ({split: panel} if split else {})
            here = {settings[over]: row for settings, row in points if row.metric["name"] == name
                    and all(settings.get(flag) == value for flag, value in wanted.items())}  # fmt: skip
            at = [v for v, value in enumerate(axes[over]) if value in here and here[value].values]
            if not at:
                continue
            at.sort(key=lambda v: x_V[v])
            mean_V = np.array([here[axes[over][v]].mean for v in at])
            deviation_V = np.nan_to_num([here[axes[over][v]].deviation for v in at])
            label = ", ".join(f"{flag} {value}" for flag, value in zip(rest, values, strict=True))
            drawn.errorbar(x_V[at], mean_V, deviation_V, marker="o", capsize=3, linewidth=2,
                           label=plain(label, LONGEST_LABEL) if label else None, **category(k))  # fmt: skip
        drawn.set_xlabel(plain(over, LONGEST_LABEL))
        if split:
            drawn.set_title(plain(f"{split} {panel}", LONGEST_LABEL))
        if number_V is None:
            drawn.set_xticks(x_V, [plain(value, 20) for value in axes[over]])
        elif len(x_V) > 2 and x_V.min() > 0 and x_V.max() / x_V.min() >= 5:
            drawn.set_xscale("log")
            drawn.set_xticks(x_V, axes[over])
            drawn.minorticks_off()
        if measure is None:
            note(drawn, "no run has ended")
        elif drawn is figure.axes[0]:
            drawn.set_ylabel(measure.label("test"))
            number_axis(drawn.yaxis, measure)
    if rest:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    several = any(len(row.values) > 1 for _, row in points)
    figure.suptitle("± standard deviation over seeds" if several else "one seed each", x=0.01, ha="left", fontsize=10)
    return figure


def _numbers(values: list[str]) -> Any:
    """The values as numbers; None where one is none."""
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return None
