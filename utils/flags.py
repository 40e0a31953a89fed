"""A flag: a field of a configuration, with its default, its help and its check."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from utils.errors import UsageError, unknown_name
from utils.files import check_text
from utils.recorded import LARGEST

Check = tuple[Callable[[Any], bool], str]

POSITIVE: Check = (lambda v: v > 0, "must be greater than 0")
NOT_NEGATIVE: Check = (lambda v: v >= 0, "must be 0 or greater")
FRACTION: Check = (lambda v: 0 < v < 1, "must be between 0 and 1, both excluded")
NOT_ABOVE_ONE: Check = (lambda v: 0 <= v <= 1, "must be at least 0 and at most 1")
BELOW_ONE: Check = (lambda v: 0 <= v < 1, "must be at least 0 and below 1")
PIXELS: Check = (lambda v: 1 <= v <= 4096, "must be from 1 to 4096 pixels")
SHARE: Check = (lambda v: 0 < v <= 1, "must be above 0 and at most 1")
BITS: Check = (lambda v: 2 <= v <= 16, "must be from 2 to 16")
SEEDS: Check = (lambda v: 1 <= v <= 10_000, "must be from 1 to 10000")  # more are a mistake in typing, days later


def flag(
    default: Any,
    group: str,
    help: str,
    *,
    choices: Collection[str] | None = None,
    check: Check | None = None,
    changes_results: bool = True,
    metavar: str | None = None,
) -> Any:
    """A field of a Config. ``choices``: names, or a registry, whose later entries count too. ``changes_results``:
    whether it changes the numbers of a run; paths, verbosity and plots do not, and are left out when two
    configurations are compared. ``metavar``: what --help calls its value."""
    metadata = {
        "group": group, "help": help, "choices": choices, "check": check, "changes_results": changes_results,
        "metavar": metavar,
    }  # fmt: skip
    if isinstance(default, list):
        raise TypeError("use a tuple")
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Raises :class:`UsageError` of a value that a flag does not take."""
    for f in dataclasses.fields(config):
        value, meta = getattr(config, f.name), f.metadata
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, str):
                check_text(f"--{f.name}", number)
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"--{f.name} is {number}: it must be a finite number.")
            if isinstance(number, int | float) and abs(number) >= LARGEST:
                raise UsageError(f"--{f.name} is {number}: it must be below {LARGEST:.0e}.")
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            if meta["choices"] and one not in meta["choices"]:
                raise unknown_name(f"--{f.name}", str(one), meta["choices"])
            if meta["check"] and not meta["check"][0](one):
                raise UsageError(f"--{f.name} is {one}: it {meta['check'][1]}.")


def check_run_name(name: str) -> None:
    """Raises :class:`UsageError` unless the name is that of a folder in --results_dir (or in folders in it)."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UsageError(
            f"--run_name {name!r} is no folder inside --results_dir: give a name, as in --run_name first, and the "
            "place with --results_dir."
        )


def check_cluster(value: str | None) -> None:
    """Raises :class:`UsageError` unless the value of --cluster is None or says where tasks run."""
    if value and not re.fullmatch(r"t(cp|ls)://[^/:]+:[0-9]{1,5}|(local|slurm):[1-9][0-9]{0,3}|recipes", value):
        raise UsageError(
            f"--cluster {value}: give tcp://HOST:PORT, tls://HOST:PORT, local:K with K processes, slurm:K with K jobs, "
            "or recipes, to run files yourself."
        )


def where(cluster: str | None, options: str | None) -> str | None:
    """--cluster and --cluster_options as one word, for :mod:`training.cluster`. Raises :class:`UsageError` of options
    without SLURM."""
    check_cluster(cluster)
    if options is None:
        return cluster
    if not (cluster or "").startswith("slurm:"):
        raise UsageError("--cluster_options is for --cluster slurm:K.")
    return f"{cluster}?{options}"
