"""Several runs on one sheet: side by side, or as seeds of one configuration.

Legend: T logged rounds, S seeds.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from utils.errors import UsageError
from utils.records import PathLike
from visualization.checked import load_lines, load_shown, was_pruned
from visualization.finals import Final, draw_finals, load_final
from visualization.measures import ACCURACY, Measure, Shown, metric_scale
from visualization.run_folders import seeds_or_stage
from visualization.style import (
    BLUE,
    CATEGORIES,
    LONGEST_LABEL,
    SKY,
    Lines,
    category,
    legend_below,
    line,
    loss_scale,
    mean_curve,
    note,
    plain,
    round_ticks,
    save,
    series,
    styled,
)

LONGEST_FILE_NAME = 80  # letters of the runs' names in that of their sheet


def plot_compare(runs: Sequence[PathLike], out: PathLike, loss: bool = False) -> Path:
    """Draw several runs on one sheet and write it to ``out`` (a PNG file).

    ``runs``: stage directories, or folders of seeds, which are shown as mean and standard deviation. ``loss``: in the
    place of their metric. Raises UsageError where they are not measured alike.
    """
    names, stages = run_names(runs), [seeds_or_stage(path) for path in runs]
    shown = common_measures([stage for each in stages for stage in each])
    measure = shown.loss if loss else shown.metric
    lines = [[load_lines(stage) for stage in each] for each in stages]
    finals = [load_final(each, measure) for each in stages]
    chosen = any(was_pruned(stage) for each in stages for stage in each)
    figure = draw_compare(dict(zip(names, lines, strict=True)), dict(zip(names, finals, strict=True)), measure, chosen)
    return save(figure, out)


def common_measures(stages: Sequence[PathLike]) -> Shown:
    """What these stages are measured by. Raises UsageError where they differ in it."""
    shown = [load_shown(stage) for stage in stages]
    for stage, other in zip(stages, shown, strict=True):
        if other.both != shown[0].both:
            metrics = [f"{path}: {one.metric.words}{one.metric.units}" for path, one in
                       ((stages[0], shown[0]), (stage, other))]  # fmt: skip
            raise UsageError(f"runs on one sheet must be measured alike ({', '.join(metrics)}); name runs of one task")
    return shown[0]


@styled
def draw_compare(
    runs: dict[str, Sequence[Lines]], finals: dict[str, Final], measure: Measure = ACCURACY, chosen: bool = False
) -> Figure:
    """The test figure of several runs at their end, and validation curves over epochs and, where logged, over
    simulated time and bytes sent.

    ``runs``: for each the metrics lines of its seeds, one or more. ``virtual_seconds`` and ``bytes`` of a line count
    from the start of the run. Curves are those of the consensus model, or of the workers' mean where one of the
    runs has no consensus model. ``chosen``: validation samples decided what some of the runs train on.
    """
    is_loss = measure.name == "loss"
    key, of = f"consensus_val_{measure.name}", "consensus model"
    if not all(len(series(lines, "round", key)[0]) for each in runs.values() for lines in each):
        key, of = f"val_{measure.name}", "mean of workers"
    panels = [("epoch", "epoch", "Over epochs")]
    panels += [("virtual_seconds", "simulated time (s)", "Over simulated time")]
    panels += [("bytes", "bytes sent", "Over bytes sent")]
    logged = {x for x, *_ in panels if any(len(series(lines, x, key)[0]) for each in runs.values() for lines in each)}
    panels = [panel for panel in panels if panel[0] in logged | {"epoch"}]
    figure = Figure(figsize=(4.0 + 3.3 * len(panels), max(4.0, 1.6 + 0.26 * len(runs))))
    final, *all_axes = figure.subplots(1, 1 + len(panels), width_ratios=(3, *[4] * len(panels)))
    looks = [category(k) for k in range(len(runs))]
    draw_finals(final, [finals[name] for name in runs], list(runs), looks, measure)
    final.set_title(f"Test {measure.words}")
    for axes, (x, label, title) in zip(all_axes, panels, strict=True):
        if axes is not all_axes[0]:
            axes.sharey(all_axes[0])
            axes.tick_params(axis="y", labelleft=False)
        missing = 0
        for look, (name, each) in zip(looks, runs.items(), strict=True):
            x_T, y_T, deviation_T = mean_curve(each, x, key)
            missing += not len(x_T)
            line(axes, x_T, y_T, label=plain(name, LONGEST_LABEL), linewidth=2, **look)
            if deviation_T is not None:
                band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
                axes.fill_between(x_T, y_T - deviation_T, y_T + deviation_T, **band)
        axes.set(xlabel=label, title=title)
        if missing:
            text = f"not logged: {missing} of {len(runs)} runs"
            axes.text(0.98, 0.03, text, transform=axes.transAxes, ha="right", color="#666666", size=9)
        bytes_scale(axes) if x == "bytes" else round_ticks(axes, most=5, whole=x != "virtual_seconds")
    choice = "\n(its samples chose what is kept)" * chosen
    all_axes[0].set_ylabel(f"validation {measure.words}{measure.units}, {of}{choice}")
    loss_scale(all_axes[0]) if is_loss else metric_scale(all_axes[0], measure)
    if any(len(each) > 1 for each in runs.values()):
        all_axes[0].set_title("Over epochs, ± deviation over seeds")
    if len(runs) > len(CATEGORIES):  # else the colours of the rows say it
        legend_below(figure, all_axes[0])
    return figure


def bytes_scale(axes: Axes) -> None:
    """Logarithmic from the smallest message on, with zero at the left: runs that send little stay readable."""
    x = np.concatenate([curve.get_xdata() for curve in axes.lines] or [np.empty(0)])
    sent = x[x > 0]
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    if not len(sent):
        axes.set_xticks([0])
        return
    low, high = math.floor(math.log10(sent.min())), math.ceil(math.log10(sent.max()))
    axes.set_xscale("symlog", linthresh=10.0**low, linscale=0.4)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    axes.set_xticks([0, *10.0 ** np.arange(low, high + 1, max(1, -(-(high - low) // 4)))])
    axes.set_xlim(-0.1 * 10.0**low, 1.3 * sent.max())
    axes.minorticks_off()


def plot_seeds(run_dirs: Sequence[PathLike], out: PathLike) -> Path:
    """Draw the runs of several seeds as mean and standard deviation and write the picture to ``out``."""
    _resolve(run_dirs)
    shown = common_measures(run_dirs)
    return save(draw_seeds([load_lines(path) for path in run_dirs], load_final(run_dirs, shown.metric), shown), out)


@styled
def draw_seeds(runs: Sequence[Lines], final: Final | None = None, shown: Shown | None = None) -> Figure:
    """Mean over seeds (thick), its sample standard deviation (band) and each seed (thin).

    Validation loss and metric of the consensus model (the workers' mean where there is none) over the epochs
    that all seeds logged; ``final``: the test figures at the end. ``shown``: what they are, accuracies unless given.
    """
    shown = shown or Shown()
    figure = Figure(figsize=(9, 3.8))
    for axes, measure in zip(figure.subplots(1, 2), shown.both, strict=True):
        consensus = all(len(series(lines, "round", f"consensus_val_{measure.name}")[0]) for lines in runs)
        key = f"consensus_val_{measure.name}" if consensus else f"val_{measure.name}"
        of = "consensus model" if consensus else "mean of workers"
        for k, lines in enumerate(runs):
            line(axes, *series(lines, "epoch", key), color=SKY, linewidth=0.9, label=None if k else "each seed")
        x_T, mean_T, deviation_T = mean_curve(runs, "epoch", key)
        if deviation_T is not None:
            band = {"color": BLUE, "alpha": 0.2, "linewidth": 0, "label": "± standard deviation"}
            axes.fill_between(x_T, mean_T - deviation_T, mean_T + deviation_T, **band)
        line(axes, x_T, mean_T, color=BLUE, linewidth=2.4, label="mean of the seeds")
        units = measure.units if measure is shown.metric else ""
        axes.set(xlabel="epoch", ylabel=f"validation {measure.words}{units}, {of}")
        axes.set_title(f"Validation {measure.words} of {len(runs)} seed{'s' * (len(runs) > 1)}")
        round_ticks(axes)
        loss_scale(axes) if measure is shown.loss else metric_scale(axes, measure)
        if not len(x_T):
            note(axes, "no round that all seeds logged")
    if final is not None and np.isfinite(final.mean):
        metric = shown.metric
        spread = f" ± {metric.text(np.std(final.values_S, ddof=1))}" if len(runs) > 1 else ""
        said = f"Test {metric.words} at the end: {metric.text(final.mean)}{spread}{metric.units}"
        figure.suptitle(said, x=0.01, ha="left", fontsize=11)
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


def compare_path(run_dirs: Sequence[PathLike], loss: bool = False) -> Path:
    """Where the sheet of these runs goes unless the user says: in the folder they share, under a name made
    of theirs, so that another comparison gets another file."""
    folder = shared_folder(run_dirs)
    paths = [os.path.relpath(path, folder) for path in run_dirs]
    names = [path.removesuffix(f"{os.sep}stage1") for path in paths]
    text = "_vs_".join(names)
    name = re.sub(r"[^\w.=+-]", "_", text, flags=re.ASCII)[:LONGEST_FILE_NAME]
    if name != text or any("vs" in name for name in names):  # other runs could end up with the same
        name += "_" + hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()[:8]
    return folder / f"compare_{name}{'_loss' * loss}.png"


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
