"""Train a grid of runs: every flag of main.py takes several values, and all their combinations are trained.

    python -m training.grid --lr 0.02 0.05 0.1 --mode ring exponential --seeds 3    six runs of three seeds
    python -m training.grid --lr 0.02 0.05 --model mlp cnn --cluster local:2        in two processes
    python -m training.grid --alpha 0.1 1 --list                                    the commands, for a job array

Each run is an ordinary run directory, results/grid/lr-0.02_mode-ring, with plots and a report; --run_name names another
folder than grid. Runs that have ended are kept: the same command goes on where it was killed, also with more values. In
the end there are a table, a picture (grid.png) and a page that links all reports (index.html).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import sys
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.args import Config
from utils.command import STOPPED, ready
from utils.errors import UsageError, refusal
from utils.flags import flag, where
from utils.parser import parse
from utils.registry import PICTURES, load

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: parallel over workers, not inside operators

OWN = ("results_dir", "run_name", "resume", "overwrite", "config", "seeds", "seed")  # of all runs together
OF_THE_GRID = ("list", "cluster", "cluster_options", "overwrite", "resume", "results_dir", "run_name")
MOST_RUNS = 10_000


@dataclass(frozen=True)
class GridConfig(Config):
    """The flags of main.py, and where the runs of a grid are trained."""

    cluster: str | None = flag(
        None, "run", "train runs elsewhere: local:K processes here, slurm:K jobs, a Dask scheduler's tcp:// or tls:// "
        "(all must see --results_dir)", changes_results=False,
    )
    cluster_options: str | None = flag(
        None, "run", "--cluster slurm:K: a YAML file with queue, memory, walltime, job_extra_directives",
        changes_results=False, metavar="FILE",
    )
    list: bool = flag(False, "run", "print a command for each run, and train nothing", changes_results=False)

    def check(self) -> None:
        """Settings that do not go together."""
        super().check()
        if where(self.cluster, self.cluster_options) == "recipes":
            raise UsageError("--cluster recipes is for pieces of a run: --list prints a command for each run.")


@dataclass(frozen=True)
class Cell:
    """A run of a grid: its folder's name, the values that make it, and its command line."""

    name: str
    settings: dict[str, str]
    words: list[str]
    config: GridConfig


def cells_of(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[Cell]]:
    """The flags with several values, and a cell for each combination. Raises :class:`UsageError` of bad flags and
    values before anything is trained."""
    fixed, axes = _split(argv)
    if not axes:
        raise UsageError("a grid needs a flag with several values, such as --lr 0.02 0.05 0.1 (main.py trains one run)")
    count = math.prod(map(len, axes.values()))
    if count > MOST_RUNS:
        raise UsageError(f"that are {count:,} runs: give fewer values (at most {MOST_RUNS:,} runs)")
    cells: dict[str, Cell] = {}
    seen = set()
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        words = [*fixed, *(word for name, value in settings.items() for word in (f"--{name}", value))]
        try:
            config = parse(GridConfig, words, __doc__)
        except UsageError as error:
            raise UsageError(f"{' '.join(words[len(fixed):])}: {error}") from error
        if (same := json.dumps(config.changing_results(), sort_keys=True)) in seen:  # 0.1 and 0.10
            continue
        seen.add(same)
        name = "_".join(f"{key}-{re.sub(r'[^A-Za-z0-9.+-]', '-', value)}" for key, value in settings.items())[:150]
        while name in cells:
            name += "+"
        folder = str(Path(config.results_dir) / (config.run_name or "grid"))
        own = dataclasses.replace(config, results_dir=folder, run_name=name, resume=not config.overwrite)
        cells[name] = Cell(name, settings, words, own)
    return axes, list(cells.values())


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words that hold for all runs, and the flags of which each run has one value."""
    kinds = typing.get_type_hints(GridConfig)
    given: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            given.append((name, [value] if equals else []))
        elif given:
            given[-1][1].append(word)
        else:
            raise UsageError(f"'{word}' is neither a flag nor the value of one (--help lists all flags)")
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for word, values in given:
        name, different = word[2:], list(dict.fromkeys(values))
        several = typing.get_origin(kinds.get(name)) is tuple  # values of one run
        if len(different) < 2 or several:
            axes.pop(name, None)
            fixed += [word, *(values if several else different)]
        elif name in OWN or (name in kinds and not _changes_results(name)):
            raise UsageError(f"{word} {' '.join(values)}: this flag has one value for the whole grid.")
        else:
            axes[name] = different
    return fixed, axes


def _changes_results(name: str) -> bool:
    return next(f.metadata["changes_results"] for f in dataclasses.fields(GridConfig) if f.name == name)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train what has not ended, sum up. Returns the exit code."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if {"--help", "-h"} & set(argv):
            parse(GridConfig, ["--help"], __doc__)
        axes, cells = cells_of(argv)
        if cells[0].config.list:
            print("\n".join(map(command_of, cells)))
            return 0
        ready()
        failed = train_all(cells)
        for name, error in failed.items():
            print(f"error: {name}: {' '.join(error.split())}", file=sys.stderr)
        if left := [cell for cell in cells if cell.name not in failed]:
            finish(axes, left)
    except (UsageError, OSError) as error:  # OSError: a path that cannot be used
        return refusal(error)
    except KeyboardInterrupt:
        print("interrupted; runs that have ended are kept, and the same command goes on", file=sys.stderr)
        return STOPPED
    return 2 if failed else 0


def command_of(cell: Cell) -> str:
    """The command that trains a cell alone."""
    words, left_out = [], False
    for word in cell.words:
        if word.startswith("--"):
            left_out = word[2:].removeprefix("no-") in OF_THE_GRID
        words += [] if left_out else [word]
    own = ["--results_dir", cell.config.results_dir, "--run_name", cell.name]
    own += ["--resume"] if cell.config.resume else ["--overwrite"]
    return f"python main.py {shlex.join([*words, *own])}"


def train_all(cells: Sequence[Cell]) -> dict[str, str]:
    """Train all cells, here or elsewhere; returns why some could not be."""
    from utils.progress import bar, within

    config, failed = cells[0].config, {}
    with bar(len(cells), "grid", "run", config.quiet) as ticks:
        if config.cluster:
            from training.cluster import texts

            tasks = [json.dumps(_elsewhere(cell)) for cell in cells]
            for k, error in texts(config.cluster, tasks, train_text):
                if error:
                    failed[cells[k].name] = error
                ticks.update(1)
            return failed
        for k, cell in enumerate(cells):
            with within(f"run {k + 1} of {len(cells)}: {cell.name}"):
                try:
                    train_cell(cell.config)
                except UsageError as error:
                    failed[cell.name] = str(error)
            ticks.update(1)
    return failed


def train_cell(config: Config) -> None:
    """Train one run, unless it has ended, and draw it."""
    from training.deal import with_workers
    from training.run import own_folder, run_folder, train_seeds

    config = with_workers(config)
    folder = run_folder(config)
    with own_folder(folder):
        known = (folder / "report.html").is_file() and config.resume
        before = _ended(folder, config)
        _, run_dirs = train_seeds(config)
        if config.plots and not (known and before):
            load(PICTURES, "run", "pictures")(run_dirs, folder)


def _ended(folder: Path, config: Config) -> bool:
    """Whether all seeds of a run have ended already."""
    seeds = [f"seed-{seed}/" for seed in range(config.seed, config.seed + config.seeds)] if config.seeds > 1 else [""]
    return all((folder / f"{seed}stage1" / "summary.json").is_file() for seed in seeds)


def _elsewhere(cell: Cell) -> dict[str, Any]:
    """What another process needs: absolute paths, and no bar."""
    config = cell.config
    paths = {key: str(Path(getattr(config, key)).resolve()) for key in ("dataset_path", "results_dir")
             if getattr(config, key)}  # fmt: skip
    return {"words": cell.words, "own": {**paths, "run_name": cell.name, "resume": config.resume, "quiet": True}}


def train_text(text: str) -> str:
    """:func:`train_cell` of what another process wrote; returns what stood in its way, or nothing."""
    task = json.loads(text)
    config = parse(GridConfig, task["words"], __doc__, varied=True)
    try:
        train_cell(dataclasses.replace(config, **task["own"], cluster=None, cluster_options=None))
    except UsageError as error:
        return str(error)
    return ""


def finish(axes: dict[str, list[str]], cells: Sequence[Cell]) -> None:
    """grid.json, the table, the picture, the page."""
    from utils.records import write_json

    folder = Path(cells[0].config.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{"folder": cell.name, "settings": cell.settings} for cell in cells]
    write_json(folder / "grid.json", {"axes": axes, "runs": runs})
    for line in load(PICTURES, "grid", "pictures")(folder, cells[0].config.plots):
        print(line)


if __name__ == "__main__":
    sys.exit(main())
