"""The gossip step, rows of the fleet's matrix averaged with their neighbours: Y = W X.

Sparse graphs read each neighbour's row once, left to right in ascending order of neighbours; blocks of
columns and of rows have fixed sizes, so that every process that owns part of the rows gets the same
bits. Nearly full graphs are a matrix product, and equal rows are computed once.

A matrix need not be square: a protocol's messages may have rows of their own.

Legend: N workers, n receivers, A rows at hand, D floats a row, W mixing matrix (row = receiver).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from utils import devices
from utils.devices import send
from workers.engine import Engine

COLUMNS = 131_072  # columns added at a time: 512 KiB of float32 stay in the second-level cache
SHORT_ROW = 32_768  # rows shorter than this are mixed many at a time: the cost is in calls, not in bytes
ROWS = 64  # short rows mixed at a time on a CPU; on an accelerator an eighth of them: what is gathered is a copy
GATHERED = 8
PRODUCT_ROWS = 256  # rows up to which a GPU mixes by one product: it reads and writes the matrix once, where adding
# neighbour by neighbour reads and writes it for each of them


def is_dense(matrix: sparse.csr_array) -> bool:
    """Whether a product is cheaper than adding neighbour by neighbour."""
    return matrix.shape[0] > 4 and matrix.nnz > 0.75 * matrix.shape[0] * matrix.shape[1]


def is_average(matrix: sparse.csr_array) -> bool:
    """Whether every row is the same (complete averaging, a server's broadcast)."""
    degrees_N = np.diff(matrix.indptr)
    if matrix.nnz == 0 or degrees_N.min() != degrees_N.max():
        return False  # nobody gets anything, or some get more than others
    indices, data = matrix.indices.reshape(len(degrees_N), -1), matrix.data.reshape(len(degrees_N), -1)
    return bool((indices == indices[0]).all() and (data == data[0]).all())


def stands_apart(engine: Engine, matrix: sparse.csr_array) -> bool:
    """Whether somebody hears nobody and nobody hears them, as one who is isolated. Such a row may be no number, and a
    product would multiply it by 0, which is no number either: it would reach everybody."""

    def found() -> bool:
        alone = np.flatnonzero(np.diff(matrix.indptr) == 1)
        alone = alone[matrix.indices[matrix.indptr[alone]] == alone]
        return bool((np.bincount(matrix.indices, minlength=matrix.shape[1])[alone] == 1).any())

    return engine.kept(("apart", id(matrix)), matrix, found)


def without_workers(matrix: sparse.csr_array, workers: Collection[int]) -> sparse.csr_array:
    """The mixing matrix in which nobody hears these workers and they hear nobody: what they would have
    weighed stays with the receiver."""
    coo = matrix.tocoo()
    row, col = coo.coords
    cut = np.isin(row, list(workers)) | np.isin(col, list(workers))
    col = np.where(cut, row, col)
    result = sparse.csr_array(sparse.coo_array((coo.data, (row, col)), shape=matrix.shape))  # duplicates add up
    result.sort_indices()
    return result


def mix_rows(
    engine: Engine,
    matrix: sparse.csr_array,
    source_AD: Tensor,
    target_nD: Tensor,
    receivers: np.ndarray | None = None,
    position_N: np.ndarray | None = None,
) -> None:
    """``target_nD[i]`` = row ``receivers[i]`` of W X (default: all rows).

    ``source_AD`` holds the rows of X that are at hand, ``position_N[l]`` says where row l is (default: at l).
    """
    receivers = np.arange(matrix.shape[0]) if receivers is None else receivers
    if len(receivers) == 0:
        return
    local = matrix[receivers].tocsr() if len(receivers) < matrix.shape[0] else matrix
    if local.nnz == 0:  # nobody here gets anything, as of several processes may be
        target_nD.zero_()
        return
    place = local.indices if position_N is None else position_N[local.indices]
    accelerator = devices.is_accelerator(source_AD.device)
    where = b"" if position_N is None else position_N.tobytes()
    key = (id(matrix), receivers.tobytes(), where, source_AD.shape[0], source_AD.dtype, source_AD.device)
    if accelerator and source_AD.shape[0] <= PRODUCT_ROWS and not stands_apart(engine, matrix):
        weights_nA = engine.kept(key, matrix, lambda: _dense(local, place, source_AD))
        torch.mm(weights_nA, source_AD, out=target_nD)
        return
    width = source_AD.shape[1]
    columns = [slice(start, min(start + COLUMNS, width)) for start in range(0, width, COLUMNS)]
    if accelerator:
        columns = [slice(0, width)]
    if is_average(matrix):
        degree = int(local.indptr[1])
        places, weights = place[:degree].tolist(), local.data[:degree].tolist()

        def average(part: slice) -> None:
            _combine(target_nD[0, part], source_AD[:, part].unbind(), places, weights)
            target_nD[1:, part] = target_nD[0, part]

        engine.map(average, _split(columns, engine.threads))
    elif is_dense(matrix) and not stands_apart(engine, matrix):
        weights_nA = _dense(local, place, source_AD)

        def product(part: slice) -> None:
            torch.mm(weights_nA, source_AD[:, part], out=target_nD[:, part])

        engine.map(product, _split(columns, engine.threads))
    elif (width < SHORT_ROW or accelerator) and _regular(matrix):
        slots = engine.kept(key, matrix, lambda: _slots(local, place, source_AD))
        _mix_short(engine, *slots, source_AD, target_nD)
    else:
        ends, places, weights = local.indptr.tolist(), place.tolist(), local.data.tolist()

        def add(part: slice) -> None:
            # Views of all rows in one call: threads that ask for the interpreter's lock for every view stand in
            # each other's way, which halved the speed.
            rows_A = source_AD[:, part].unbind()
            for i, target in enumerate(target_nD[:, part].unbind()):
                entries = slice(ends[i], ends[i + 1])
                _combine(target, rows_A, places[entries], weights[entries])

        engine.map(add, _split(columns, engine.threads))


def mix_replicas(
    engine: Engine, matrix: sparse.csr_array, blocks: sparse.csr_array, source_RD: Tensor, target_RD: Tensor
) -> None:
    """:func:`mix_rows` in every replica of a fleet, by ``blocks``, which has W once for each. On a GPU a product for
    each: a product of all would carry what is no number from one replica to the others."""
    n, A = matrix.shape
    if not devices.is_accelerator(source_RD.device) or A > PRODUCT_ROWS or stands_apart(engine, matrix):
        mix_rows(engine, blocks, source_RD, target_RD)
        return
    key = ("replicas", id(matrix), source_RD.dtype, source_RD.device)
    weights_nA = engine.kept(key, matrix, lambda: _dense(matrix, matrix.indices, source_RD[:A]))
    source_MAD, target_MnD = source_RD.unflatten(0, (-1, A)), target_RD.unflatten(0, (-1, n))
    torch.bmm(weights_nA.expand(len(source_MAD), -1, -1), source_MAD, out=target_MnD)


def _dense(local: sparse.csr_array, place: np.ndarray, source_AD: Tensor) -> Tensor:
    """The weights [n, A] of receivers and rows at hand."""
    weights_nA = np.zeros((local.shape[0], len(source_AD)))
    weights_nA[np.repeat(np.arange(local.shape[0]), np.diff(local.indptr)), place] = local.data
    return send(torch.as_tensor(weights_nA, dtype=source_AD.dtype), source_AD.device)


def _combine(target: Tensor, rows_A: Sequence[Tensor], places: list[int], weights: list[float]) -> None:
    """``target = sum_l weights[l] * rows_A[places[l]]``, left to right."""
    if not places:
        target.zero_()
        return
    torch.mul(rows_A[places[0]], weights[0], out=target)
    for place, weight in zip(places[1:], weights[1:], strict=False):
        target.add_(rows_A[place], alpha=weight)


def _split(columns: list[slice], threads: int) -> list[slice]:
    """Blocks of columns, cut further where there are fewer than threads to work on them. Cuts are at
    multiples of 64 columns: vector instructions see the same columns whatever the cuts."""
    pieces = -(-threads // len(columns)) if len(columns) < 2 * threads else 1
    result = []
    for block in columns:
        step = max(64, -(-(block.stop - block.start) // pieces // 64) * 64)
        result += [slice(a, min(a + step, block.stop)) for a in range(block.start, block.stop, step)]
    return result


def _regular(matrix: sparse.csr_array) -> bool:
    degrees_N = np.diff(matrix.indptr)
    return bool(degrees_N.max() <= 3 * degrees_N.mean())


def _slots(local: sparse.csr_array, place: np.ndarray, source_AD: Tensor) -> tuple[Tensor, Tensor]:
    """The s-th neighbour's place and weight [n, s] of every receiver; those with fewer neighbours repeat their last
    one with weight 0."""
    degrees_n = np.diff(local.indptr)
    slots = int(degrees_n.max())
    entry_ns = local.indptr[:-1, None] + np.minimum(np.arange(slots), np.maximum(degrees_n[:, None] - 1, 0))
    entry_ns = np.minimum(entry_ns, local.nnz - 1)  # of one who gets nothing: any row, with weight 0
    weight_ns = np.where(np.arange(slots) < degrees_n[:, None], local.data[entry_ns], 0.0)
    device = source_AD.device
    places = send(torch.as_tensor(place[entry_ns], dtype=torch.int64), device)
    return places, send(torch.as_tensor(weight_ns, dtype=source_AD.dtype), device)


def _mix_short(engine: Engine, place_ns: Tensor, weight_ns: Tensor, source_AD: Tensor, target_nD: Tensor) -> None:
    """Many short rows at a time: the s-th neighbour of all receivers is gathered and added at once."""
    count, slots = place_ns.shape
    size = max(ROWS, count // GATHERED) if devices.is_accelerator(source_AD.device) else ROWS

    def block(start: int) -> None:
        part = slice(start, start + size)
        target = target_nD[part]
        torch.mul(source_AD.index_select(0, place_ns[part, 0]), weight_ns[part, 0, None], out=target)
        for s in range(1, slots):
            target.addcmul_(source_AD.index_select(0, place_ns[part, s]), weight_ns[part, s, None])

    engine.map(block, range(0, count, size))
