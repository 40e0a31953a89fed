"""Read a user's communication graph: an edge list or a square matrix.

- ``.npy``, ``.csv``: a square matrix. Other text: a matrix if it has N rows of N numbers (or more than
  three columns), else an edge list, one ``i j`` or ``i j weight`` a line. Numbers are separated by
  blanks, commas or semicolons; ``#`` starts a comment; workers count from 0. Row = receiver:
  worker i receives from worker j.
- Entries that are all 0 or 1, and edges without weights: an undirected graph that is yet to be weighted.
- Anything else: the mixing weights themselves, the diagonal included.

Legend: N workers.
"""

from __future__ import annotations

import io
import re
import reprlib
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from utils.errors import UsageError
from utils.files import read_bytes, read_lines

SEPARATOR = re.compile(r"\s*[,;]\s*|\s+")
ROW_SUM_TOLERANCE = 1e-5  # weights printed with six digits pass: three times 0.333333 is off by 1e-6


def read_topology_file(path: str | Path, num_workers: int) -> tuple[sp.csr_array, bool]:
    """(matrix, weighted): the N x N mixing weights, or the symmetric 0/1 adjacency (its diagonal as given).

    Weights are nonnegative and their rows are rescaled to sum to 1 to full precision. Raises UsageError
    for a file that cannot be read, is not square, has not ``num_workers`` workers, has negative weights
    or rows that do not sum to 1 (to 1e-5), or has 0/1 entries that are not symmetric. Whether the graph
    is connected is for the caller to check.
    """
    path = Path(path)
    if path.suffix == ".npy":
        matrix = sp.csr_array(_load_npy(path, num_workers))
    else:
        rows = _read_numbers(path)
        widths = {len(row) for _, row in rows}
        is_matrix = path.suffix == ".csv" or max(widths) > 3 or widths == {len(rows)} == {num_workers}
        if is_matrix:
            if len(widths) > 1:
                raise UsageError(f"topology file {path}: its rows have different lengths ({_few(widths)}).")
            _check_square(path, (len(rows), *widths), num_workers)
            matrix = sp.csr_array(np.array([row for _, row in rows]))
        else:
            matrix = _from_edges(path, rows, num_workers)
    if not np.isfinite(matrix.data).all():
        raise UsageError(f"topology file {path}: entries must be finite numbers.")
    matrix.eliminate_zeros()

    if (matrix.data == 1).all():
        if (matrix != matrix.T).nnz:
            raise UsageError(
                f"topology file {path}: a 0/1 matrix is an undirected graph and must be symmetric; "
                f"for directed links give weights whose rows sum to 1."
            )
        return matrix, False
    return _row_stochastic(path, matrix), True


def _load_npy(path: Path, num_workers: int) -> np.ndarray:
    """The header is judged before anything is read by it: it may claim a matrix of terabytes."""
    data = read_bytes(path, "topology file")
    file = io.BytesIO(data)
    try:
        header = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}[read_magic(file)]
        shape, fortran_order, dtype = header(file)
    except Exception as error:  # damaged headers are parsed as Python, and raise what Python raises
        raise UsageError(f"cannot read topology file {path}: it has no header that .npy files have.") from error
    if dtype.kind not in "biuf":
        raise UsageError(f"topology file {path}: entries must be real numbers, not {dtype.name}.")
    _check_square(path, shape, num_workers)
    if len(data) - file.tell() < num_workers**2 * dtype.itemsize:
        raise UsageError(f"topology file {path} is cut off: {num_workers} x {num_workers} numbers do not fit in it.")
    entries = np.frombuffer(data, dtype, num_workers**2, file.tell()).astype(np.float64)
    return entries.reshape(num_workers, num_workers, order="F" if fortran_order else "C")


def _read_numbers(path: Path) -> list[tuple[int, list[float]]]:
    """(line number, numbers) of every line that has any."""
    rows = []
    for number, line in read_lines(path, "topology file"):
        words = SEPARATOR.split(line.strip())
        if words != [""]:
            rows.append((number, [_number(word, path, number) for word in words]))
    if not rows:
        raise UsageError(f"topology file {path} is empty; give an edge list ('i j' a line) or a square matrix.")
    return rows


def _number(word: str, path: Path, line: int) -> float:
    """As ``float`` reads it, but for underscores and the digits of other scripts, which are likelier an accident."""
    try:
        if word.isascii() and "_" not in word:
            return float(word)
    except ValueError:
        pass
    raise UsageError(f"topology file {path}, line {line}: {reprlib.repr(word)} is not a number.")


def _check_square(path: Path, shape: tuple[int, ...], num_workers: int) -> None:
    if len(shape) != 2 or shape[0] != shape[1]:
        size = " x ".join(map(str, shape)) or "one number"
        raise UsageError(f"topology file {path}: the matrix is {size}; it must be square, one row a worker.")
    if shape[0] != num_workers:
        raise UsageError(
            f"topology file {path} is for {shape[0]} workers, but --num_workers is {num_workers}; make them equal."
        )


def _from_edges(path: Path, rows: list[tuple[int, list[float]]], num_workers: int) -> sp.csr_array:
    seen: dict[tuple[int, int], float] = {}
    if len({len(row) for _, row in rows}) > 1:
        raise UsageError(f"topology file {path}: give every edge a weight, or none ('i j' or 'i j weight').")
    unweighted = all(len(row) < 3 or row[2] == 1 for _, row in rows)
    for number, row in rows:
        where = f"topology file {path}, line {number}"
        if len(row) == 1 or not all(x.is_integer() and x >= 0 for x in row[:2]):
            raise UsageError(f"{where}: an edge is 'i j' or 'i j weight' with worker numbers from 0.")
        i, j = int(row[0]), int(row[1])
        if max(i, j) >= num_workers:
            raise UsageError(
                f"{where}: no worker {max(i, j):.15g}; --num_workers is {num_workers}, and workers count from 0."
            )
        if unweighted:
            seen[i, j] = seen[j, i] = 1.0
        elif (i, j) in seen:
            raise UsageError(f"{where}: the edge {i} {j} is given twice.")
        else:
            seen[i, j] = row[2]
    receivers, senders = zip(*seen, strict=True)
    return sp.csr_array((list(seen.values()), (receivers, senders)), shape=(num_workers, num_workers))


def _row_stochastic(path: Path, matrix: sp.csr_array) -> sp.csr_array:
    if (matrix.data < 0).any():
        raise UsageError(f"topology file {path}: mixing weights must not be negative.")
    with np.errstate(over="ignore"):  # an infinite sum is refused like any other
        sums_N = matrix.sum(axis=1)
    worst = int(np.abs(sums_N - 1).argmax())
    if abs(sums_N[worst] - 1) > ROW_SUM_TOLERANCE:
        raise UsageError(
            f"topology file {path}: the weights of row {worst} sum to {sums_N[worst]:.9g}, not 1 "
            f"(row = receiver, its own weight included); entries of 0 and 1 only would be read as a graph."
        )
    return sp.csr_array(sp.diags_array(1 / sums_N) @ matrix)


def _few(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)[:5]))
