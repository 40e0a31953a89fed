"""What a round does beside its local steps, as lines that read like the equations of a paper.

    Line("half", rows=1)                       X'  =  X, after the local steps
    Line("sum", rows=1, correction=1)          S   =  X' + C
    Line("rows", sum=W)                        X  <-  W S
    Line("correction", rows=1, half=-1)        C  <-  X - X'

A line replaces one named matrix by a sum of others, each times a number, a number for each row, or a sparse matrix.
From such lines follow the round itself (:mod:`workers.rounds`), what several processes exchange, and the adjoint that
influence methods walk back through (:func:`transposed`). Names that mean something:

    rows             X, the parameters of the workers; statistics of BatchNorm are no part of it: they are mixed
    momentum         what the optimizers remember
    before           X at the start of the round
    momentum_before  the optimizers' state at the start of the round
    drift            set by the lines before the local steps: added to every gradient of the round

Others are a protocol's own: kept from round to round where it says so, else forgotten at the end of the round.

Legend: N workers, A, B rows of two matrices, P floats of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse
from torch import Tensor

Coefficient = float | np.ndarray | sparse.csr_array
KEPT = {"before": "rows", "momentum_before": "momentum"}  # what is kept from the start of a round, and of what


@dataclass(frozen=True, eq=False, init=False)
class Line:
    """``target`` <- the sum of ``sources``, each times its coefficient: a number, a number for each row [A], or a
    matrix [A, B] (row = receiver) for a target of A rows and a source of B. Sources are what they were before the
    line."""

    target: str
    sources: Mapping[str, Coefficient]

    def __init__(self, target: str, **sources: Coefficient):
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "sources", sources)


@dataclass(frozen=True, eq=False)
class Nonlinear:
    """``target`` <- ``function(fleet, target)``: what no adjoint is written of."""

    target: str
    function: Callable[[Any, Tensor], Tensor]
    sources: Mapping[str, Coefficient] = field(default_factory=dict)


Lines = tuple[Line | Nonlinear, ...]


@dataclass(frozen=True, eq=False)
class LinearRound:
    """A round without its local steps. ``begin``: lines before them. ``end``: lines after them (default: the rows are
    mixed by ``mixing``, and with ``mix_momentum`` the optimizers' state too). ``mixing`` [N, N] also averages the
    statistics of BatchNorm, which are never extrapolated: a variance would become negative. None: nobody talks."""

    mixing: sparse.csr_array | None = None
    mix_momentum: bool = False
    begin: Lines = ()
    end: Lines | None = None

    @cached_property
    def lines(self) -> Lines:
        """``end``, or what it stands for."""
        if self.end is not None or self.mixing is None:
            return self.end or ()
        rows = (Line("rows", rows=self.mixing),)
        return (*rows, Line("momentum", momentum=self.mixing)) if self.mix_momentum else rows

    @property
    def kept(self) -> list[str]:
        """What must be kept from the start of the round, since a line asks for it."""
        return [name for name in KEPT if any(name in line.sources for line in self.end or ())]

    @property
    def drifts(self) -> bool:
        """Whether something is added to the gradients."""
        return any(line.target == "drift" for line in self.begin)


def transposed(
    lines: Lines, adjoints: dict[str, Tensor], times: Callable[[Line, str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The adjoints before the lines, of those after them: a new dictionary, in which names that nobody asks for are
    missing. ``times(line, source, adjoint)``: the product of the target's adjoint with the source's transposed
    coefficient."""
    adjoints = dict(adjoints)
    for line in reversed(lines):
        arriving = adjoints.pop(line.target, None)  # the target was replaced: what it was counts only as a source
        if arriving is None:
            continue
        if isinstance(line, Nonlinear):
            raise ValueError(f"the adjoint of the line of '{line.target}' is not written")
        for name in line.sources:
            part = times(line, name, arriving)
            adjoints[name] = adjoints[name] + part if name in adjoints else part
    return adjoints


def averaging(num_workers: int) -> sparse.csr_array:
    """The matrix [N, N] that gives everybody the mean."""
    return sparse.csr_array(np.full((num_workers, num_workers), 1.0 / num_workers))
