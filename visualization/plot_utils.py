"""Pictures of a run, from its records alone: ``python -m visualization.plot_utils RUN [RUN ...]``.

``draw_*`` make a matplotlib Figure; ``plot_*`` read run directories, draw and save.
Legend: N workers, C classes, T logged rounds, E edges, S seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from utils.errors import UsageError, refusal
from utils.records import PathLike, Run, read_confusion, read_json
from visualization.checked import (
    Record,
    load_labels,
    load_lines,
    load_partition,
    load_shown,
    load_summary,
    load_topology,
    load_values,
)
from visualization.class_plots import count_classes, draw_class_mix, draw_confusion
from visualization.finetune_plot import draw_finetune
from visualization.measures import ACCURACY, BRIGHT_IS_GOOD, Measure, Shown, metric_scale, number_axis
from visualization.prediction_plots import draw_areas, draw_predicted
from visualization.run_folders import first_stage, no_run, seeds_of, stages_of, stages_of_seeds
from visualization.several_runs import (
    compare_path,
    draw_compare,
    draw_seeds,
    plot_compare,
    plot_seeds,
    seeds_path,
)
from visualization.stages import draw_stages
from visualization.style import (
    BLACK,
    BLUE,
    RED,
    Lines,
    draw_edges,
    graph_edges,
    legend_below,
    line,
    log_ticks,
    loss_scale,
    node_diameter,
    note,
    note_if_empty,
    place_workers,
    plain,
    round_ticks,
    save,
    series,
    styled,
    worker_lines,
)

__all__ = [  # what draws a run, or several, wherever it is
    "draw_areas", "draw_class_mix", "draw_compare", "draw_confusion", "draw_consensus_distance", "draw_finetune",
    "draw_predicted", "draw_seeds", "draw_topology", "draw_training", "plot_compare", "plot_run", "plot_seeds",
]  # fmt: skip


# ---- one run ------------------------------------------------------------------------------------


def plot_run(run_dir: PathLike) -> list[Path]:
    """Write the plots of a stage directory (:func:`figures_of`) to its ``plots/`` and return their paths."""
    return [save(figure, Path(run_dir, "plots", f"{name}.png")) for name, figure in figures_of(run_dir).items()]


def figures_of(run_dir: PathLike) -> dict[str, Figure]:
    """The plots of a stage directory by name.

    ``training`` and ``consensus_distance`` always, and what else there are records of: ``class_mix`` (labels.npz,
    partition.npz), ``topology`` (topology.json), ``confusion`` (confusion.npz), ``predictions`` (predictions.npz of a
    regression), ``auroc`` (by finding, in summary.json), ``stages`` (in config.json), ``finetune`` (in summary.json).

    Raises UsageError where the directory is no run, a record is damaged, or the disk refuses.
    """
    run, lines, shown = Run(run_dir), load_lines(run_dir), load_shown(run_dir)
    summary = load_summary(run_dir) if run.has("summary.json") else {}
    figures = {"training": draw_training(lines, shown=shown), "consensus_distance": draw_consensus_distance(lines)}
    if run.has("partition.npz") and run.has("labels.npz"):
        labels_n, class_names = load_labels(run_dir)
        shards = load_partition(run_dir, len(labels_n))
        figures["class_mix"] = draw_class_mix(count_classes(shards, labels_n, len(class_names)), class_names, shown)
    if run.has("topology.json"):
        topology, (figure_N, what) = load_topology(run_dir), worker_figures(lines, summary, shown.metric)
        if figure_N is not None and len(figure_N) != topology["num_workers"]:
            raise UsageError(
                f"topology.json of {run_dir} is of {topology['num_workers']} workers, the {what} of {len(figure_N)}: "
                "they are of different runs; restore one of them"
            )
        figures["topology"] = draw_topology(topology, figure_N, what, shown.metric)
    if run.has("confusion.npz"):
        figures["confusion"] = draw_confusion(*read_confusion(run_dir))
    if shown.group == "value" and run.has("predictions.npz"):
        figures["predictions"] = draw_predicted(*load_values(run_dir), shown)
    if summary.get("auroc"):
        figures["auroc"] = draw_areas(summary["auroc"])
    config = Record(run.path / "config.json", read_json(run.path / "config.json")) if run.has("config.json") else None
    if config is not None and config.has("stages"):
        figures["stages"] = draw_stages(config.parts("stages"))
    if summary.get("finetune"):
        figures["finetune"] = draw_finetune(summary["finetune"])
    return figures


@styled
def draw_training(lines: Lines, x: str = "round", shown: Shown | None = None) -> Figure:
    """Loss and metric over ``x`` ('round' or 'epoch'): workers thin, mean and consensus thick. ``shown``: what they
    are, cross-entropy and accuracy unless given."""
    shown = shown or Shown()
    figure = Figure(figsize=(9, 3.8))
    loss, metric = figure.subplots(1, 2)
    for axes, measure in (loss, shown.loss), (metric, shown.metric):
        what = measure.name
        worker_lines(axes, lines, x, f"worker_val_{what}")
        if measure is shown.loss:
            train = series(lines, x, "train_loss")
            line(axes, *train, label="training, mean of workers", color=BLACK, linestyle=":", linewidth=1.8)
        mean, consensus = series(lines, x, f"val_{what}"), series(lines, x, f"consensus_val_{what}")
        line(axes, *mean, label="validation, mean of workers", color=BLUE, linewidth=2.4)
        line(axes, *consensus, label="validation, consensus model", color=RED, linewidth=2.4, linestyle="--")
        axes.set_xlabel(x)
        round_ticks(axes)
        note_if_empty(axes)
    loss.set(ylabel=f"{shown.loss.long}{shown.loss.units}", title=f"Loss over {x}s")
    loss_scale(loss)
    said = f"Validation {shown.metric.words} over {x}s{shown.metric.direction}"
    metric.set(ylabel=f"validation {shown.metric.words}{shown.metric.units}", title=said)
    metric_scale(metric, shown.metric)
    legend_below(figure, loss)
    return figure


@styled
def draw_consensus_distance(lines: Lines, x: str = "round") -> Figure:
    """How far the workers' parameters are from their mean over ``x``, on a log scale."""
    figure = Figure(figsize=(5.6, 3.6))
    axes = figure.subplots()
    x_T, distance_T = series(lines, x, "consensus_distance")
    if len(x_T) > 1 and distance_T[0] < 1e-4 * distance_T[1]:
        x_T, distance_T = x_T[1:], distance_T[1:]  # a common start: rounding alone, decades below the rest
    axes.set(
        xlabel=x,
        ylabel="consensus distance (RMS over workers)",
        title=f"Distance of the workers to their mean over {x}s",
    )
    positive_T = distance_T > 0
    if positive_T.any():
        axes.set_yscale("log")
        line(axes, x_T[positive_T], distance_T[positive_T], color=BLUE, linewidth=2)
        log_ticks(axes.yaxis)
    elif len(x_T):
        line(axes, x_T, distance_T, color=BLUE, linewidth=2)
        axes.set_ylim(-0.05, 1)
        note(axes, "the workers never differ")
    else:
        note(axes, "not measured in this run")
    round_ticks(axes)
    return figure


def worker_figures(
    lines: Lines, summary: dict[str, Any], measure: Measure = ACCURACY
) -> tuple[np.ndarray | None, str]:
    """The latest figure of each worker (float [N]) and what it is: test, else the last validation."""
    if summary.get(f"worker_test_{measure.name}") is not None:
        return summary[f"worker_test_{measure.name}"], f"test {measure.words}"
    for row in reversed(lines):
        if row.get(f"worker_val_{measure.name}"):
            return np.array(row[f"worker_val_{measure.name}"], dtype=float), f"validation {measure.words}"
    return None, ""


@styled
def draw_topology(
    topology: dict[str, Any], figure_N: np.ndarray | None = None, what: str = "", measure: Measure = ACCURACY
) -> Figure:
    """The graph (all edges of one period), each worker coloured by its figure: the better, the brighter.

    A pair that weighs each other alike is joined by a line; otherwise arrows point at the receiver.
    """
    workers = topology["num_workers"]
    lines_E2, arrows_E2 = graph_edges(topology)
    place_N2, torus = place_workers(topology["mode"], workers, np.concatenate([lines_E2, arrows_E2]))
    figure = Figure(figsize=(6.4, 5.6))
    axes = figure.subplots()
    axes.set_aspect("equal")
    axes.axis("off")
    axes.margins(0.08)
    if workers == 1:
        axes.set(xlim=(-2, 2), ylim=(-1, 3))
    diameter = node_diameter(place_N2)
    hidden = draw_edges(axes, place_N2, lines_E2, arrows_E2, torus, diameter)

    figure_N = np.full(workers, np.nan) if figure_N is None else figure_N
    known_N = np.isfinite(figure_N)
    low, high = (figure_N[known_N].min(), figure_N[known_N].max()) if known_N.any() else (0.0, 1.0)
    least = 0.005 * (1 if measure.bounded else max(abs(low), abs(high), 1e-6))
    pad = max(0.0, least - (high - low) / 2)  # equal figures still need a scale
    colours = ScalarMappable(Normalize(low - pad, high + pad), BRIGHT_IS_GOOD[measure.higher_is_better])
    fill_N4 = np.where(known_N[:, None], colours.to_rgba(figure_N), (0.85, 0.85, 0.85, 1))
    outline = {"edgecolors": "#333333", "linewidths": 0.8} if diameter > 8 else {"linewidths": 0}
    axes.scatter(*place_N2.T, s=diameter**2, c=fill_N4, zorder=3, **outline)
    if diameter >= 2 + 5.2 * len(str(workers - 1)):  # points that a number of this many digits needs
        for k, (x, y) in enumerate(place_N2):
            ink = "white" if fill_N4[k, :3] @ (0.3, 0.59, 0.11) < 0.55 else "black"
            axes.text(x, y, str(k), ha="center", va="center_baseline", color=ink, size=9, zorder=4)
    if known_N.any():
        label = f"{what} of the worker{measure.units}{measure.direction}"
        bar = figure.colorbar(colours, ax=axes, shrink=0.8, label=label)
        number_axis(bar.ax.yaxis, measure)
    axes.set_title(_topology_title(topology, hidden))
    return figure


def _topology_title(topology: dict[str, Any], left_out: str) -> str:
    names = {
        "base": "Base graph", "torus": "Torus", "tree": "Tree", "line": "Line",
        "ring": "Ring", "all": "Complete graph", "exponential": "Exponential graph", "star": "Star",
        "exponential_one_peer": "One-peer exponential graph",
        "grid": "Grid on a torus", "random": "Random graph", "nearest": "Graph of near neighbours",
        "file": "Graph from a file",
    }  # fmt: skip
    mode, workers, gap = topology["mode"], topology["num_workers"], topology.get("spectral_gap")
    title = f"{names.get(mode) or plain(mode)} of {workers:,} worker{'s' * (workers != 1)}"
    if gap is not None:
        title += f", spectral gap {gap:.3g}"
    if len(topology["matrices"]) > 1:
        title += f"\nall edges of its {len(topology['matrices'])} rounds"
    return f"{title}\n{left_out}" if left_out else title


# ---- the folder of a run ------------------------------------------------------------------------


def plot_folder(folder: PathLike) -> list[Path]:
    """The pictures of what lies beside the stages of a run, or above its seeds: prunings, scores, audit, sweep.
    (``extremes_*.png`` show the samples themselves, which no record holds.)"""
    from visualization import influence_plots as influence

    folder, pictures = Path(folder), []
    stage1, prunings = folder / "stage1", influence.comparisons_of(folder)
    pictures += [influence.plot_comparison(path) for path in prunings]
    pictures += [influence.plot_all_comparisons(folder)] if prunings else []
    if (folder / "sweep.json").is_file():
        pictures.append(influence.plot_sweep(folder, folder / "sweep.png"))
    if not (stage1 / "metrics.jsonl").is_file():  # above several seeds: their audits are figures, no picture
        return pictures
    if (folder / "audit.json").is_file():
        pictures.append(influence.plot_audit(folder, folder / "audit.png"))
    edges = folder / "influence" / "edges.zarr"
    if edges.is_dir():
        pictures.append(influence.plot_edges(stage1, edges, folder / "edges.png"))
    for path in sorted({*folder.glob("influence/*.zarr")} - {edges}):
        pictures.append(influence.plot_scores(stage1, path, folder / f"scores_{path.stem}.png"))
    for path in sorted(folder.glob("node_view_*.json")):
        pictures.append(influence.plot_node_view(stage1, path, path.with_suffix(".png")))
    return pictures


# ---- command line -------------------------------------------------------------------------------

EXAMPLES = """
examples:
  python -m visualization.plot_utils results/NAME             all stages of a run (of all its seeds), each to its
                                                              plots folder; what pruning, audit and sweep left
                                                              records of, and of several seeds a sheet as well
  python -m visualization.plot_utils results/NAME/stage1      one stage
  python -m visualization.plot_utils results/A results/B      stage 1 of several runs on one sheet, in the folder
                                                              that they share: results/compare_A_vs_B.png (a
                                                              folder of seeds: mean and deviation; --loss: loss)
  python -m visualization.plot_utils results/A/stage*         the stages of a run on one sheet
  python -m visualization.plot_utils --seeds results/A results/B --out AB.png
                                                              runs that differ in the seed: mean and deviation
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the named runs again; returns the exit code (2 for bad input, told in one line)."""
    parser = argparse.ArgumentParser(
        prog="python -m visualization.plot_utils",
        description="Draw the plots of a run again, or several runs on one sheet. Prints the files it wrote.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help shows examples\n")  # one line, no usage
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (results/NAME) or of one of its stages")
    parser.add_argument(
        "--seeds",
        action="store_true",
        help="the runs are seeds of one configuration: only a sheet of their mean and deviation",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.png",
        type=Path,
        help="the sheet of several runs or seeds; replaced if it is there (default: compare_<names>.png or "
        "seeds.png in the folder that the runs share)",
    )
    parser.add_argument("--loss", action="store_true", help="the loss, not the metric, on a sheet of several runs")
    args = parser.parse_args(argv)
    try:
        if args.out and (args.out.suffix.lower() != ".png" or args.out.is_dir()):
            raise UsageError(f"--out {args.out} is no PNG file: give a name such as sheet.png")
        for path in draw(args.runs, args.seeds, args.out, args.loss):
            print(str(path).encode(errors="backslashreplace").decode())  # a path need not be UTF-8
    except (UsageError, OSError) as error:  # OSError: a path that cannot be used, or a full disk behind stdout
        return refusal(error)
    return 0


def draw(folders: Sequence[PathLike], seeds: bool, out: Path | None, loss: bool = False) -> list[Path]:
    """The pictures of what a user names on the command line; returns the files."""
    if loss and (seeds or len(folders) == 1):
        raise UsageError("--loss is for a sheet of several runs; all other pictures show the loss anyway")
    if seeds:
        stages = stages_of_seeds(folders)
        return [plot_seeds(stages, out or seeds_path(stages))]
    if len(folders) > 1:
        stages = [first_stage(folder) for folder in folders]
        return [plot_compare(stages, out or compare_path(stages, loss), loss)]
    (folder,) = folders
    stages, of_seeds = stages_of(folder), seeds_of(folder)
    if not stages and not of_seeds:
        raise no_run(folder)
    if out and not of_seeds:
        raise UsageError("--out is for a sheet of several runs; the plots of one run go to its plots folder")
    stages += [stage for seed in of_seeds for stage in stages_of(seed)]
    pictures = [picture for stage in stages for picture in plot_run(stage)]
    pictures += [picture for run in (*of_seeds, folder) for picture in plot_folder(run)]
    if of_seeds:
        pictures.append(plot_seeds(stages_of_seeds(folders), out or Path(folder, "seeds.png")))
    return pictures


if __name__ == "__main__":
    sys.exit(main())
