"""Do jobs that lie as recipes in files: each is a piece of work on a run that was split, such as the training of one
coalition of institutions, or some retrainings of an audit.

    python -m training.job RECIPE.json                     one, alone: also how to see what goes wrong in it
    python -m training.job FOLDER                          all of a folder, one after the other
    python -m training.job FOLDER --part 3/16              the fourth of sixteen equal parts: a task of an array
    sbatch --array=0-15 --wrap 'python -m training.job FOLDER --part $SLURM_ARRAY_TASK_ID/16'

--cluster recipes of python -m valuation and of main_pruned.py --audit writes them, and the same command collects what
came out. A result is written beside its recipe, NAME.result.json, in one piece; where it is there nothing is done: an
array that was cancelled or preempted is just started again. A recipe is plain JSON and needs this project's code and
the run's data, which a digest checks; edit its dataset_path where they lie elsewhere. It takes one thread.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.command import STOPPED, ready
from utils.errors import UsageError, refusal
from utils.parser import Help, Parser, unknown_flag

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is not done. Returns the exit code."""
    parser = Parser(
        prog="python -m training.job", description=__doc__, formatter_class=Help, allow_abbrev=False,
        usage="%(prog)s RECIPE ... [--part K/N] [--quiet]",
    )  # fmt: skip
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="files, or folders of them")
    parser.add_argument("--part", metavar="K/N", help="only the K-th of N parts, K from 0 to N - 1")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        asked, rest = parser.parse_known_args(argv)
        if rest:
            raise unknown_flag(rest, ["part", "quiet"])
        run(asked)
    except (UsageError, OSError) as error:
        return refusal(error)
    except KeyboardInterrupt:
        print("interrupted; results that are there are kept, and the same command goes on", file=sys.stderr)
        return STOPPED
    return 0


def run(asked: argparse.Namespace) -> None:
    """All recipes are read before the first is run, so that what is wrong with one is said at once."""
    part = part_of(asked.part)
    from training.recipe import read_recipe, result_path, result_there
    from utils.progress import bar
    from utils.records import write_json

    ready()
    files = recipe_files(asked.recipes)[part]
    recipes = {path: read_recipe(path) for path in files}
    missing = [path for path, recipe in recipes.items() if not result_there(recipe, path)]
    alone, before, job = len(missing) == 1, None, None
    with bar(len(files), "recipes", "recipe", asked.quiet or alone, len(files) - len(missing)) as ticks:
        for path in missing:
            recipe = recipes[path]
            if not result_there(recipe, path):  # another process may have been faster
                try:
                    if before is None or not recipe.same_run(before):
                        job, before = recipe.job(asked.quiet or not alone), recipe
                    result = recipe.result(job)
                except UsageError as error:
                    raise UsageError(f"{path}: {error}") from error
                write_json(result_path(path), result)
            ticks.update(1)
    there = len(files) - len(missing)
    print(f"{len(missing)} done" + (f", {there} {'was' if there == 1 else 'were'} there" if there else ""))


def part_of(text: str | None) -> slice:
    """Which recipes K/N are: K, K + N, K + 2 N, ..."""
    if text is None:
        return slice(None)
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UsageError(f"--part {text}: give K/N with K from 0 to N - 1, as in --part 0/4.")
    return slice(int(found[1]), None, int(found[2]))


def recipe_files(names: Iterable[str]) -> list[Path]:
    """The files that are named and those in the folders that are named, each once; files of results are no recipes."""
    from training.recipe import RESULT, recipes_in
    from utils.files import check_text

    files: dict[Path, None] = {}
    for name in names:
        check_text("RECIPE", name)
        path = Path(name)
        if not path.exists():
            raise UsageError(f"there is no recipe {path}: check the path.")
        found = recipes_in(path) if path.is_dir() else [] if name.endswith(RESULT) else [path]
        if path.is_dir() and not found:
            raise UsageError(f"{path} holds no recipes: --cluster recipes of a command writes them.")
        files |= dict.fromkeys(found)
    if not files:
        raise UsageError("files of results alone were named: name recipes, or their folder.")
    return list(files)


if __name__ == "__main__":
    sys.exit(main())
