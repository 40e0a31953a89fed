"""One page for every run: report.html beside its stages, which opens from disk, in any browser, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.records import PathLike
from visualization.run_folders import no_run, seeds_of, stages_of

if TYPE_CHECKING:
    from visualization.report.parts import Report


def draw_run(run_dirs: Sequence[PathLike], folder: PathLike) -> Path:
    """The plots of each run (a seed each), one of all seeds, and the report, whose path is returned."""
    from visualization.plot_utils import plot_run, plot_seeds

    for run_dir in run_dirs:
        plot_run(run_dir)
    if len(run_dirs) > 1:
        plot_seeds(run_dirs, Path(folder, "seeds.png"))
        return write_report(folder)
    return write_report(folder, *run_dirs)


def write_report(folder: PathLike, stage1: PathLike | None = None) -> Path:
    """Write report.html into the folder of a run (results/NAME), and into those of its seeds; returns its path.

    ``stage1``: the stage that was scored, where it lies elsewhere. Raises UsageError where there is no run, a record
    is damaged, or the disk refuses.
    """
    from visualization.report.parts import write

    folder = Path(folder)
    if (folder / "metrics.jsonl").is_file():  # a stage
        folder, stage1 = folder.parent, folder if folder.name == "stage1" else stage1
    return write(_report_of(folder, stage1 and Path(stage1)), folder / "report.html")


def _report_of(folder: Path, stage1: Path | None) -> Report:
    """The report of the kind of folder that this is."""
    from visualization.report.rooms import report_of_valuation, report_of_valuations, report_of_walks
    from visualization.report.run import report_of
    from visualization.report.seeds import report_of_seeds

    if (folder / "valuation.json").is_file():
        return report_of_valuation(folder)
    if (folder / "summary.json").is_file() and any(folder.glob("seed-*/valuation.json")):
        return report_of_valuations(folder)
    if (folder / "policies.json").is_file():
        return report_of_walks(folder)
    seeds, stages = seeds_of(folder), stages_of(folder)
    if stage1 or (stages and not seeds):
        return report_of(folder, stage1 or stages[0])
    if not seeds:
        raise no_run(folder)
    for seed in seeds:
        write_report(seed)
    return report_of_seeds(folder, seeds)
