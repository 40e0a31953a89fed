"""Several runs on one sheet: side by side, or as seeds of one configuration.

Legend: T logged rounds, S seeds.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from utils.errors import UsageError
from utils.records import PathLike
from visualization.checked import load_lines
from visualization.style import (
    BLUE,
    LONGEST_LABEL,
    SKY,
    Lines,
    accuracy_scale,
    category,
    legend_below,
    line,
    loss_scale,
    note,
    plain,
    round_ticks,
    save,
    series,
    styled,
)

LONGEST_FILE_NAME = 80  # letters of the runs' names in that of their sheet


def plot_compare(run_dirs: Sequence[PathLike], out: PathLike) -> Path:
    """Draw several runs on one sheet and write it to ``out`` (a PNG file)."""
    metrics = [load_lines(path) for path in run_dirs]
    return save(draw_compare(dict(zip(run_names(run_dirs), metrics, strict=True))), out)


@styled
def draw_compare(runs: dict[str, Lines]) -> Figure:
    """Accuracy of several runs over rounds and, where logged, over simulated time and bytes sent.

    ``virtual_seconds`` and ``bytes`` of a line count from the start of the run. The accuracy is that
    of the consensus model, or the workers' mean where one of the runs has no consensus model.
    """
    key, what = "consensus_val_accuracy", "validation accuracy, consensus model"
    if not all(len(series(lines, "round", key)[0]) for lines in runs.values()):
        key, what = "val_accuracy", "validation accuracy, mean of workers"
    panels = [("round", "round", "Accuracy over rounds")]
    panels += [("virtual_seconds", "simulated time (s)", "Accuracy over simulated time")]
    panels += [("bytes", "bytes sent", "Accuracy over bytes sent")]
    logged = {x for x, *_ in panels if any(len(series(lines, x, key)[0]) for lines in runs.values())}
    panels = [panel for panel in panels if panel[0] in logged | {"round"}]
    figure = Figure(figsize=(2.2 + 3.6 * len(panels), 4.0))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (x, label, title) in zip(all_axes, panels, strict=True):
        missing = 0
        for k, (name, lines) in enumerate(runs.items()):
            x_T, y_T = series(lines, x, key)
            missing += not len(x_T)
            line(axes, x_T, y_T, label=plain(name, LONGEST_LABEL), linewidth=2, **category(k))
        axes.set(xlabel=label, title=title)
        if missing:
            text = f"not logged: {missing} of {len(runs)} runs"
            axes.text(0.98, 0.03, text, transform=axes.transAxes, ha="right", color="#666666", size=9)
        round_ticks(axes, most=5, whole=x != "virtual_seconds")
    if panels[-1][0] == "bytes":
        all_axes[-1].xaxis.set_major_formatter(EngFormatter(unit="B"))
    all_axes[0].set_ylabel(what)
    accuracy_scale(all_axes[0])
    legend_below(figure, all_axes[0])
    return figure


def plot_seeds(run_dirs: Sequence[PathLike], out: PathLike) -> Path:
    """Draw the runs of several seeds as mean and standard deviation and write the picture to ``out``."""
    _resolve(run_dirs)
    return save(draw_seeds([load_lines(path) for path in run_dirs]), out)


@styled
def draw_seeds(runs: Sequence[Lines]) -> Figure:
    """Mean over seeds (thick), its sample standard deviation (band) and each seed (thin).

    Loss and accuracy of the consensus model (the workers' mean where there is none) over the rounds
    that all seeds logged.
    """
    figure = Figure(figsize=(9, 3.8))
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        consensus = all(len(series(lines, "round", f"consensus_val_{what}")[0]) for lines in runs)
        key = f"consensus_val_{what}" if consensus else f"val_{what}"
        of = "consensus model" if consensus else "mean of workers"
        by_round = [dict(zip(*series(lines, "round", key), strict=True)) for lines in runs]
        x_T = np.array(sorted(set.intersection(*map(set, by_round))))
        y_ST = np.array([[seed[x] for x in x_T] for seed in by_round])
        for k, y_T in enumerate(y_ST):
            line(axes, x_T, y_T, color=SKY, linewidth=0.9, label=None if k else "each seed")
        mean_T = y_ST.mean(0)
        if len(runs) > 1:
            deviation_T = y_ST.std(0, ddof=1)
            band = {"color": BLUE, "alpha": 0.2, "linewidth": 0, "label": "± standard deviation"}
            axes.fill_between(x_T, mean_T - deviation_T, mean_T + deviation_T, **band)
        line(axes, x_T, mean_T, color=BLUE, linewidth=2.4, label="mean of the seeds")
        axes.set(xlabel="round", ylabel=f"validation {what}, {of}")
        axes.set_title(f"Validation {what} of {len(runs)} seed{'s' * (len(runs) > 1)}")
        round_ticks(axes)
        loss_scale(axes) if what == "loss" else accuracy_scale(axes)
        if not len(x_T):
            note(axes, "no round that all seeds logged")
    legend_below(figure, figure.axes[0])
    return figure


def run_names(run_dirs: Sequence[PathLike]) -> list[str]:
    """A short name for each run: the parts of its path in which the runs differ."""
    parts = [path.parts for path in _resolve(run_dirs)]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    start = len(os.path.commonprefix(parts))
    end = len(os.path.commonprefix([p[start:][::-1] for p in parts]))
    names = ["/".join(p[start : len(p) - end]) or p[-1] for p in parts]
    return names if len(set(names)) == len(names) else [str(path) for path in run_dirs]


def _resolve(run_dirs: Sequence[PathLike]) -> list[Path]:
    """The directories without links. Raises UsageError where two are the same."""
    paths = [Path(path).resolve() for path in run_dirs]
    if len(set(paths)) < len(paths):
        raise UsageError("a run is named twice; name each run once")
    return paths


def compare_path(run_dirs: Sequence[PathLike]) -> Path:
    """Where the sheet of these runs goes unless the user says: in the folder they share, under a name made
    of theirs, so that another comparison gets another file."""
    folder = shared_folder(run_dirs)
    paths = [os.path.relpath(path, folder) for path in run_dirs]
    names = [path.removesuffix(f"{os.sep}stage1") for path in paths]
    text = "_vs_".join(names)
    name = re.sub(r"[^\w.=+-]", "_", text, flags=re.ASCII)[:LONGEST_FILE_NAME]
    if name != text or any("vs" in name for name in names):  # other runs could end up with the same
        name += "_" + hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()[:8]
    return folder / f"compare_{name}.png"


def seeds_path(run_dirs: Sequence[PathLike]) -> Path:
    """Where the sheet of these seeds goes unless the user says: in the folder they share."""
    return shared_folder(run_dirs) / "seeds.png"


def shared_folder(run_dirs: Sequence[PathLike]) -> Path:
    """The innermost folder that all these stage directories lie in.

    Raises UsageError where that is no place for a picture.
    """
    folder = Path(os.path.commonpath([Path(path).absolute().parent for path in run_dirs]))
    if folder == folder.parent or not os.access(folder, os.W_OK):
        raise UsageError(f"no sheet can be put in {folder}, the folder that the runs share; say where with --out FILE")
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
