"""Results that are to come from elsewhere: how a command says that it waits for them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AWAITS = 75  # the exit code of a command that waits (EX_TEMPFAIL of sysexits.h: try again later)
MOST_PARTS = 1000  # of an array: SLURM takes no more unless its administrator says so


class ResultsMissing(Exception):  # noqa: N818, nothing is wrong
    """Recipes wait for whoever runs them. ``missing``: of each folder, how many have no result, of how many."""

    def __init__(self, missing: dict[Path, tuple[int, int]]):
        super().__init__("results are missing")
        self.missing = missing

    def what_to_do(self, again: str) -> str:
        """In lines. ``again``: the command that goes on once results are there."""
        count, recipes = (sum(counts) for counts in zip(*self.missing.values(), strict=True))
        command = f"python -m training.job {shlex.join(map(str, self.missing))}"
        parts = min(MOST_PARTS, recipes)
        log = shlex.quote(f"{next(iter(self.missing))}/part-%a.log")
        task = shlex.quote(f"{command} --part $SLURM_ARRAY_TASK_ID/{parts}")
        return (
            f"{count} of {recipes} results are missing. In this project's folder, on any machine, run their recipes "
            f"one after the other, or as an array of SLURM:\n\n  {command}\n"
            f"  sbatch --array=0-{parts - 1} --output={log} --wrap {task}\n\n"
            f"{again} goes on with what is there by then."
        )


def each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``work`` of each item, also where results of another are missing; then one :class:`ResultsMissing` of all."""
    ended, missing = [], {}
    for item in items:
        try:
            ended.append(work(item))
        except ResultsMissing as found:
            missing |= found.missing
    if missing:
        raise ResultsMissing(missing)
    return ended
