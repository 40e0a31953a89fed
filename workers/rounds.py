"""The lines of a round (:mod:`utils.linear`), computed on a fleet.

Legend: R rows of the fleet, A, B rows of two matrices here, P trainable floats, D floats a row.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from utils import devices
from utils.devices import send
from utils.linear import KEPT, Line, LinearRound, Lines, Nonlinear
from workers.worker_vision import Fleet

CACHED = 1 << 18  # floats that stay in a CPU's cache between the terms of a sum


def begin_round(fleet: Fleet, around: LinearRound) -> None:
    """Before the local steps: keep what the end of the round asks for, and set what is added to the gradients."""
    if not around.kept and not around.begin:
        return
    at = _values(fleet)
    for name in around.kept:
        _put(fleet.of_round, name, at[KEPT[name]])
    if around.begin:
        at = _computed(fleet, around.begin, at)
        for line in around.begin:
            _put(fleet.of_round, line.target, at[line.target])


def end_round(fleet: Fleet, around: LinearRound) -> None:
    """After the local steps."""
    if around.end is None:
        if around.mixing is not None:
            fleet.mix(around.mixing, around.mix_momentum)
        return
    P, start = fleet.layout.P, _values(fleet)
    spare_RD = fleet.spare()
    at = _computed(fleet, around.end, dict(start), spare_RD[:, :P])
    if around.mixing is not None and P < fleet.layout.D:
        fleet.mix_into(around.mixing, fleet.rows_RD[:, P:], spare_RD[:, P:])
    elif P < fleet.layout.D:
        spare_RD[:, P:] = fleet.rows_RD[:, P:]
    names, given = {line.target for line in around.end}, {id(value) for value in (*start.values(), at["rows"])}
    for name in names & set(fleet.extra):  # what is somebody else's already is copied
        fleet.extra[name] = at[name].clone() if id(at[name]) in given else at[name]
    if "momentum" in names:
        fleet.state_RS.copy_(at["momentum"])  # in place: a recorded step knows where it lies
    if "rows" in names:
        if at["rows"].data_ptr() != spare_RD.data_ptr():
            spare_RD[:, :P] = at["rows"]
        fleet.swap(spare_RD)


def sent(fleet: Fleet, around: LinearRound) -> dict[tuple[Line, str], Tensor]:
    """What the matrices of the end of a round will multiply, after its local steps: a copy [R, P] for each line and
    source. The fleet stays as it is."""
    found: dict[tuple[Line, str], Tensor] = {}
    at = _values(fleet)
    for line in around.lines:
        for name, coefficient in line.sources.items():
            if isinstance(coefficient, sparse.csr_array):
                found[line, name] = at[name].clone()
        at = _computed(fleet, (line,), at)
    return found


def _values(fleet: Fleet) -> dict[str, Tensor]:
    return {"rows": fleet.rows_RD[:, : fleet.layout.P], "momentum": fleet.state_RS, **fleet.extra, **fleet.of_round}


def _put(store: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in store:
        store[name].copy_(value)
    else:
        store[name] = value.clone(memory_format=torch.contiguous_format)


def _computed(
    fleet: Fleet, lines: Lines, at: dict[str, Tensor], rows_RP: Tensor | None = None
) -> dict[str, Tensor]:
    """All named matrices after the lines. Matrices are replaced, never changed: two names may share one. ``rows_RP``:
    where the last line of the rows may put them."""
    last = max((i for i, line in enumerate(lines) if line.target == "rows"), default=None)
    for i, line in enumerate(lines):
        if isinstance(line, Nonlinear):
            at[line.target] = line.function(fleet, at[line.target])
        else:
            at[line.target] = _sum(fleet, line, at, rows_RP if i == last else None)
    return at


def _sum(fleet: Fleet, line: Line, at: dict[str, Tensor], result: Tensor | None = None) -> Tensor:
    """A line's target. ``result``: where to put it (default: fresh memory)."""
    terms = [(coefficient, at[name]) for name, coefficient in line.sources.items()]
    terms.sort(key=lambda term: not isinstance(term[0], sparse.csr_array))  # products first: they need no second matrix
    if len(terms) == 1 and not isinstance(terms[0][0], np.ndarray | sparse.csr_array) and terms[0][0] == 1:
        return terms[0][1]
    coefficient, first = terms[0]
    if isinstance(coefficient, sparse.csr_array):
        result = _product(fleet, coefficient, first, result)
        scale: float | Tensor | None = None
    else:
        result = torch.empty_like(first, memory_format=torch.contiguous_format) if result is None else result
        scale = _scale(fleet, coefficient, first)
    rest = [
        (1.0, _product(fleet, c, source)) if isinstance(c, sparse.csr_array) else (_scale(fleet, c, source), source)
        for c, source in terms[1:]
    ]
    if scale is None and not rest:
        return result

    def add(part: slice) -> None:
        if scale is not None:
            torch.mul(first[part], scale[part] if isinstance(scale, Tensor) else scale, out=result[part])
        for factor, source in rest:
            if isinstance(factor, Tensor):
                result[part].addcmul_(source[part], factor[part])
            else:
                result[part].add_(source[part], alpha=factor)

    step = len(result)
    if not devices.is_accelerator(fleet.device):  # every thread has some, of few enough floats for its cache
        step = min(-(-step // fleet.engine.threads), max(1, CACHED // max(1, result.shape[1])))
    fleet.engine.map(add, [slice(i, i + step) for i in range(0, len(result), max(1, step))])
    return result


def _scale(fleet: Fleet, coefficient: float | np.ndarray, source: Tensor) -> float | Tensor:
    """A number, or one for each row here [., 1]."""
    if not isinstance(coefficient, np.ndarray):
        return float(coefficient)
    block = fleet.block_of(len(coefficient))
    here = torch.as_tensor(coefficient[block.start : block.stop], dtype=source.dtype).repeat(fleet.replicas)
    return send(here, fleet.device)[:, None]


def _product(fleet: Fleet, matrix: sparse.csr_array, source: Tensor, target: Tensor | None = None) -> Tensor:
    if target is None:
        rows = len(fleet.block_of(matrix.shape[0])) * fleet.replicas
        target = torch.empty(rows, source.shape[1], dtype=source.dtype, device=source.device)
    fleet.mix_into(matrix, source, target)
    return target
