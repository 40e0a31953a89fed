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
from utils.linear import KEPT, Coefficient, Line, LinearRound, Lines, Nonlinear
from workers.worker_vision import Fleet


def begin_round(fleet: Fleet, around: LinearRound) -> None:
    """Before the local steps: keep what the end of the round asks for, and set what is added to the gradients."""
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
    P = fleet.layout.P
    at = _computed(fleet, around.end, _values(fleet))
    if around.mixing is not None and P < fleet.layout.D:
        mixed_RS = torch.empty_like(fleet.rows_RD[:, P:])
        fleet.mix_into(around.mixing, fleet.rows_RD[:, P:], mixed_RS)
        fleet.rows_RD[:, P:] = mixed_RS
    # In place: a recorded step knows where all of these lie.
    targets = {line.target for line in around.end}
    if "rows" in targets:
        fleet.rows_RD[:, :P] = at["rows"]
    if "momentum" in targets:
        fleet.state_RS.copy_(at["momentum"])
    for name in targets & set(fleet.extra):
        _put(fleet.extra, name, at[name])


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


def _computed(fleet: Fleet, lines: Lines, at: dict[str, Tensor]) -> dict[str, Tensor]:
    """All named matrices after the lines. Matrices are replaced, never changed: two names may share one."""
    for line in lines:
        if isinstance(line, Nonlinear):
            at[line.target] = line.function(fleet, at[line.target])
        else:
            at[line.target] = _sum(fleet, line, at)
    return at


def _sum(fleet: Fleet, line: Line, at: dict[str, Tensor]) -> Tensor:
    parts: list[tuple[float | Tensor, Tensor]] = []
    for name, coefficient in line.sources.items():
        if isinstance(coefficient, sparse.csr_array):
            parts.append((1.0, _product(fleet, coefficient, at[name])))
        elif isinstance(coefficient, np.ndarray):
            parts.append((_column(fleet, coefficient, at[name].dtype), at[name]))
        else:
            parts.append((float(coefficient), at[name]))
    (scale, first), rest = parts[0], parts[1:]
    if not rest and isinstance(scale, float) and scale == 1.0:
        return first
    result = torch.empty_like(first, memory_format=torch.contiguous_format)

    def add(part: slice) -> None:
        torch.mul(first[part], scale[part] if isinstance(scale, Tensor) else scale, out=result[part])
        for factor, source in rest:
            if isinstance(factor, Tensor):
                result[part].addcmul_(source[part], factor[part])
            else:
                result[part].add_(source[part], alpha=factor)

    step = len(first) if devices.is_accelerator(fleet.device) else 1  # a row stays in a CPU's cache
    fleet.engine.map(add, [slice(i, i + step) for i in range(0, len(first), max(1, step))])
    return result


def _column(fleet: Fleet, values_A: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A number for each row here [., 1]."""
    block = fleet.block_of(len(values_A))
    here = torch.as_tensor(values_A[block.start : block.stop], dtype=dtype).repeat(fleet.replicas)
    return send(here, fleet.device)[:, None]


def _product(fleet: Fleet, matrix: Coefficient, source: Tensor) -> Tensor:
    rows = len(fleet.block_of(matrix.shape[0])) * fleet.replicas
    target = torch.empty(rows, source.shape[1], dtype=source.dtype, device=source.device)
    fleet.mix_into(matrix, source, target)
    return target
