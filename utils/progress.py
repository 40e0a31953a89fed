"""Progress bars: one look for all long work, each saying what it is a part of.

    with within("run 3 of 25: cascade, 80 % kept"):
        with bar(rounds, "gossip 8 workers", unit="round") as ticks: ...

draws "run 3 of 25: cascade, 80 % kept: gossip 8 workers: 12 %|...".
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from tqdm import tqdm

Progress = Callable[[int], object]  # gets how many ticks of work are done, each time some are

_AROUND: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("around", default=())


@contextlib.contextmanager
def within(label: str) -> Iterator[None]:
    """Every bar that is opened until the block ends says ``label`` first. (Blocks nest.)"""
    token = _AROUND.set((*_AROUND.get(), label))
    try:
        yield
    finally:
        _AROUND.reset(token)


def bar(total: float, what: str, unit: str = "it", quiet: bool = False, initial: int = 0) -> tqdm:
    """A bar of ``total`` ticks (0 or more), to be used as a context; ``quiet``: nothing is drawn."""
    return tqdm(total=total, initial=initial, desc=": ".join((*_AROUND.get(), what)), unit=unit, disable=quiet)


def ignored(ticks: int) -> None:
    """A :data:`Progress` that shows nothing."""
