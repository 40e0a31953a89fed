"""The one exception that means 'the user has to change something'.

Entry points catch :class:`UsageError`, print its single line and exit with code 2 (no traceback).
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
LEDGER = ("cryptography", "securesystemslib")  # what signing and checking records needs


class UsageError(ValueError):
    """Bad input. The message is one line: what is wrong, and what to do about it."""


def check_installed(packages: Iterable[str], requirements: str, who: str) -> None:
    """Raises UsageError where a package is missing that ``who`` needs, with the file that lists it."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{who} needs the package '{name}': pip install -r {requirements}.")


def refusal(error: Exception) -> int:
    """Print the one line that says what the user has to change, and return the exit code of commands for it.
    (In a single write: several processes may share a terminal.)"""
    print(f"error: {' '.join(str(error).split())}\n", end="", file=sys.stderr)
    return 2


def nearest(name: str, names: Iterable[str], alike: float = 0.5) -> str | None:
    """The name that ``name`` is most likely a misspelling of, whatever its case; None where none is ``alike`` enough
    (0: nothing in common, 1: equal)."""
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=alike)
    return by_lower[near[0]] if near else None


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is in no registry: lists the choices and the nearest match."""
    names = list(choices)
    near = nearest(name, names)
    hint = f" Did you mean '{near}'?" if near else ""
    return UsageError(f"unknown {kind} '{name}'.{hint} Choose from: {', '.join(names)}.")


def choose(registry: Mapping[str, T], name: str, kind: str) -> T:
    """``registry[name]``, or a :class:`UsageError` that lists the names of the registry."""
    if name not in registry:
        raise unknown_name(kind, name, registry)
    return registry[name]
