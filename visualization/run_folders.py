"""From the folders that a user names to the stage directories in them.

    results/NAME/stage1, stage2_<method>_<share>    stage directories: they hold metrics.jsonl
    results/NAME                                    a run folder: it holds stages, or seeds
    results/NAME/seed-<s>                           the run folder of one of several seeds
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from utils.errors import UsageError
from utils.records import PathLike

MOST_LISTED_RUNS = 5  # of those that an error suggests


def stages_of(folder: PathLike) -> list[Path]:
    """The folder itself if it is a stage directory, else the stages right in it: stage1, then every stage2_*."""
    return [Path(folder)] if _is_stage(folder) else sorted(f.parent for f in Path(folder).glob("stage*/metrics.jsonl"))


def seeds_of(folder: PathLike) -> list[Path]:
    """The run folders of the seeds in this folder, in the order of the seeds."""
    seeds = {path.parent.parent for path in Path(folder).glob("seed-*/stage*/metrics.jsonl")}
    return sorted(seeds, key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)])


def first_stage(folder: PathLike) -> Path:
    """The one stage that a run stands for on a sheet of several: the directory itself, or its stage1; a folder of
    seeds stands for itself."""
    if stages := stages_of(folder):
        return stages[0]
    if seeds_of(folder):
        return Path(folder)
    raise no_run(folder)


def seeds_or_stage(folder: PathLike) -> list[Path]:
    """The stage that :func:`first_stage` finds, or that of each seed."""
    stage = first_stage(folder)
    return [stage] if _is_stage(stage) else [first_stage(seed) for seed in seeds_of(stage)]


def stages_of_seeds(folders: Sequence[PathLike]) -> list[Path]:
    """The stage of each seed, where a folder may be one seed or hold several."""
    return [stage for folder in folders for stage in seeds_or_stage(folder)]


def no_run(folder: PathLike) -> UsageError:
    """The error for a path at which there is no run, with what may have been meant."""
    path, such = Path(folder), "name the folder of a run, such as results/NAME"
    if path.is_file():
        return UsageError(f"{folder} is a file; {such}")
    if not path.exists():
        beside = [p.name for p in path.absolute().parent.glob("*") if p.is_dir()]
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {path.with_name(near[0])}?" if near else such
        return UsageError(f"there is no {folder}; {hint}")
    runs = sorted(p for p in path.glob("*") if stages_of(p) or seeds_of(p))
    if not runs:
        return UsageError(f"{folder} is no run: there is no stage1/metrics.jsonl in it; {such}")
    named = ", ".join(map(str, runs[:MOST_LISTED_RUNS])) + ", …" * (len(runs) > MOST_LISTED_RUNS)
    return UsageError(f"{folder} is no run; name one of the runs in it: {named}")


def _is_stage(folder: PathLike) -> bool:
    return Path(folder, "metrics.jsonl").is_file()
