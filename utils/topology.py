"""Who averages with whom, and with what weight.

A topology is one or more N x N mixing matrices W, sparse; row = receiver: after a gossip step worker i
holds sum_j W[i, j] * x_j. Every row sums to 1, and no weight is negative. A topology of several
matrices uses them in turn, one a round.

To add one: write a function ``(num_workers, seed, path) -> matrices`` that takes what it needs of
these and ``**_``, and add a line to ``utils.registry.TOPOLOGIES``.

Legend: N workers, E nonzero weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, eigs
from scipy.spatial.distance import cdist

from utils.errors import UsageError
from utils.random import numpy_rng
from utils.registry import TOPOLOGIES, load
from utils.topology_file import ROW_SUM_TOLERANCE, read_topology_file

Matrices = tuple[sp.csr_array, ...]

DENSE_LIMIT = 2048  # workers up to which a general spectrum is computed


@dataclass(frozen=True, eq=False)
class Topology:
    """The mixing matrices of a run: float64 CSR, [N, N], column indices sorted, no stored zeros."""

    mode: str
    num_workers: int
    matrices: Matrices

    def __post_init__(self) -> None:
        if not self.matrices:
            raise ValueError(f"topology '{self.mode}' has no mixing matrix")
        object.__setattr__(self, "matrices", tuple(_canonical(matrix) for matrix in self.matrices))
        for matrix in self.matrices:
            if matrix.shape != (self.num_workers, self.num_workers):
                raise ValueError(f"topology '{self.mode}': {matrix.shape} for {self.num_workers} workers")
            if not (matrix.data > 0).all() or np.abs(matrix.sum(axis=1) - 1).max() > 1e-9:
                raise ValueError(f"topology '{self.mode}': weights must be nonnegative, with rows that sum to 1")

    @property
    def period(self) -> int:
        """Rounds after which the matrices repeat."""
        return len(self.matrices)

    def mixing(self, round_index: int) -> sp.csr_array:
        """The mixing matrix of a round (from 0)."""
        return self.matrices[round_index % self.period]

    def messages(self, round_index: int) -> int:
        """Parameter vectors that cross a link in a round: the nonzeros off the diagonal."""
        matrix = self.mixing(round_index)
        return int(matrix.nnz - np.count_nonzero(matrix.diagonal()))

    @cached_property
    def directed(self) -> bool:
        """Whether some worker receives from one that never receives from it (over a period)."""
        pattern = self._links()
        return (pattern != pattern.T).nnz > 0

    def edges(self) -> list[tuple[int, int]]:
        """The links used in a period, sorted: (receiver, sender) if directed, else each once, i < j."""
        links = self._links().tocoo()
        pairs = zip(links.row.tolist(), links.col.tolist(), strict=True)
        return sorted((i, j) for i, j in pairs if self.directed or i < j)

    @cached_property
    def is_connected(self) -> bool:
        """Whether what any worker knows can reach every other (strongly connected over a period)."""
        return connected_components(self._links(), connection="strong", return_labels=False) == 1

    @cached_property
    def is_doubly_stochastic(self) -> bool:
        """Whether the columns of all matrices sum to 1 as well (to 1e-5), so that gossip keeps the mean."""
        return all(np.abs(matrix.sum(axis=0) - 1).max() <= ROW_SUM_TOLERANCE for matrix in self.matrices)

    @cached_property
    def spectral_gap(self) -> float | None:
        """1 - |lambda_2|, where lambda_2 is the eigenvalue of second largest modulus of the product
        W_{p-1} ... W_1 W_0 of the matrices over one period of p rounds.

        Disagreement shrinks by about 1 - gap a period: 0 never agrees, 1 agrees exactly. For the normal
        matrices here (symmetric or circulant) |lambda_2| is also the second largest singular value.
        None where it would take too long: N above 2048 and matrices that are not all circulant.
        """
        if self.num_workers == 1:
            return 1.0
        # Circulant matrices (ring, all, exponential) share their eigenvectors, the Fourier basis: the
        # eigenvalues of the product are the products of the transforms of the first rows. Any N, exact.
        if all(_is_circulant(matrix) for matrix in self.matrices):
            first_rows = [matrix[[0]].toarray()[0] for matrix in self.matrices]
            moduli = np.abs(np.prod([np.fft.fft(row) for row in first_rows], axis=0))
        elif self.num_workers <= DENSE_LIMIT:
            moduli = _largest_moduli(reduce(lambda product, matrix: matrix @ product, self.matrices))
        else:
            return None
        return float(1.0 - min(1.0, np.sort(moduli)[-2]))

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, with derived figures for the reader; ``from_json`` reads it back."""
        return {
            "mode": self.mode,
            "num_workers": self.num_workers,
            "period": self.period,
            "directed": self.directed,
            "connected": self.is_connected,
            "doubly_stochastic": self.is_doubly_stochastic,
            "spectral_gap": self.spectral_gap,
            "matrices": [
                {"receiver": m.row.tolist(), "sender": m.col.tolist(), "weight": m.data.tolist()}
                for m in (matrix.tocoo() for matrix in self.matrices)
            ],
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> Topology:
        """The topology that ``to_json`` wrote. Derived figures are computed anew, not read."""
        num_workers = record["num_workers"]
        matrices = tuple(
            sp.csr_array((m["weight"], (m["receiver"], m["sender"])), shape=(num_workers, num_workers))
            for m in record["matrices"]
        )
        return Topology(record["mode"], num_workers, matrices)

    def _links(self) -> sp.csr_array:
        """Pattern of the off-diagonal weights of a period, as ones."""
        links = sp.csr_array(sum(self.matrices[1:], start=self.matrices[0]), copy=True)
        links.setdiag(0)
        links.eliminate_zeros()
        links.data[:] = 1.0
        return links


def build_topology(mode: str, num_workers: int, seed: int = 0, **options: object) -> Topology:
    """The topology of that name for N workers. ``seed`` matters to 'random'; ``options``: ``path`` of 'file',
    ``positions_NX`` and ``neighbors`` of 'nearest'.

    Raises UsageError for an unknown name, fewer than one worker, or a file that is no valid topology.
    """
    function = load(TOPOLOGIES, mode, "topology (--mode)")
    if num_workers < 1:
        raise UsageError(f"--num_workers must be 1 or more, not {num_workers}.")
    return Topology(mode, num_workers, function(num_workers=num_workers, seed=seed, **options))


def metropolis_hastings(adjacency: sp.sparray) -> sp.csr_array:
    """Weights for an undirected graph: W[i, j] = 1 / (1 + max(degree_i, degree_j)) on its edges, and the
    rest of each row on the diagonal: symmetric, doubly stochastic (Xiao & Boyd 2004,
    doi:10.1016/j.sysconle.2004.02.022). ``adjacency``: [N, N], symmetric; its diagonal and values are
    ignored."""
    pattern = sp.csr_array(adjacency, dtype=np.float64, copy=True)
    pattern.setdiag(0)
    pattern.eliminate_zeros()
    degree_N = np.diff(pattern.indptr)
    links = pattern.tocoo()
    weight_E = 1.0 / (1.0 + np.maximum(degree_N[links.row], degree_N[links.col]))
    weights = sp.csr_array((weight_E, (links.row, links.col)), shape=pattern.shape)
    return _canonical(weights + sp.diags_array(1.0 - weights.sum(axis=1)))


def ring(num_workers: int, **_: object) -> Matrices:
    """Every worker averages itself and its two neighbours, a third each (N = 2: two halves)."""
    return (_circulant(num_workers, (-1, 1)),)


def complete(num_workers: int, **_: object) -> Matrices:
    """Every worker averages all: weights 1 / N."""
    return (_circulant(num_workers, range(num_workers)),)


def exponential(num_workers: int, **_: object) -> Matrices:
    """Static exponential graph: worker i receives from i - 1, i - 2, i - 4, ... (mod N), all weights equal.
    Directed, doubly stochastic, degree ceil(log2 N) (Ying et al. 2021, arXiv:2110.13363)."""
    return (_circulant(num_workers, [-distance for distance in _powers_of_two(num_workers)]),)


def exponential_one_peer(num_workers: int, **_: object) -> Matrices:
    """One link of the exponential graph at a time: in round r worker i takes half of its own value and half
    of that of i - 2^(r mod ceil(log2 N)). Where N is a power of two, a period is an exact average
    (Ying et al. 2021, arXiv:2110.13363)."""
    return tuple(_circulant(num_workers, [-distance]) for distance in _powers_of_two(num_workers) or [0])


def grid(num_workers: int, **_: object) -> Matrices:
    """Two-dimensional torus, as square as N allows: rows x columns = N with the largest rows <= sqrt(N).
    Equal weights over a worker and its neighbours (4; fewer where a side is 1 or 2). A prime N has
    only 1 x N, which is the ring."""
    rows = max(r for r in range(1, math.isqrt(num_workers) + 1) if num_workers % r == 0)
    columns = num_workers // rows
    along_row = sp.kron(sp.eye_array(rows), _circulant(columns, (-1, 1)))
    along_column = sp.kron(_circulant(rows, (-1, 1)), sp.eye_array(columns))
    return (metropolis_hastings(along_row + along_column),)


def star(num_workers: int, **_: object) -> Matrices:
    """Worker 0 is linked to all others; Metropolis-Hastings weights, 1 / N on each link."""
    leaves = np.arange(1, num_workers)
    return (_from_links(leaves, np.zeros_like(leaves), num_workers),)


def random(num_workers: int, seed: int = 0, **_: object) -> Matrices:
    """A connected Erdos-Renyi graph with a mean degree of about ln N + 2, Metropolis-Hastings weights.

    Links are drawn uniformly without replacement (G(N, M)); a draw that is not connected, about one in
    eight, is thrown away. A function of (N, seed)."""
    rng = numpy_rng("random topology", num_workers, seed)
    pairs = num_workers * (num_workers - 1) // 2
    count = min(pairs, math.ceil(num_workers * (math.log(num_workers) + 2) / 2))
    while True:
        code = rng.choice(pairs, size=count, replace=False)  # pair (i, j), j < i, is number i (i - 1) / 2 + j
        i = ((1 + np.sqrt(1 + 8 * code.astype(np.float64))) / 2).astype(np.int64)
        weights = _from_links(i, code - i * (i - 1) // 2, num_workers)
        if connected_components(weights, directed=False, return_labels=False) == 1:
            return (weights,)


def from_file(num_workers: int, path: str | Path | None = None, **_: object) -> Matrices:
    """The graph or the mixing matrix of a file (formats: utils/topology_file.py). A graph gets
    Metropolis-Hastings weights. Must be (strongly) connected."""
    if path is None:
        raise UsageError("--mode file needs --topology_file FILE: an edge list or a square matrix.")
    matrix, weighted = read_topology_file(path, num_workers)
    parts, part_N = connected_components(matrix, connection="strong")
    if parts > 1:
        first_other = int(np.flatnonzero(part_N != part_N[0])[0])
        raise UsageError(
            f"topology file {path}: the graph of the {num_workers} workers is not connected ({parts} parts); "
            f"add links so that workers 0 and {first_other} reach each other, in both directions."
        )
    return (matrix if weighted else metropolis_hastings(matrix),)


def nearest(
    num_workers: int, positions_NX: np.ndarray | None = None, neighbors: int = 3, **_: object
) -> Matrices:
    """Every worker is linked to the K workers nearest to it (and those to whom it is among the nearest), and parts that
    this leaves apart by the shortest links between them; Metropolis-Hastings weights."""
    if positions_NX is None:
        raise UsageError(
            "--mode nearest needs data that know where their owners are, and --partition natural (air does; for "
            "timeseries give positions.csv)."
        )
    distance_NN = cdist(positions_NX, positions_NX)
    np.fill_diagonal(distance_NN, np.inf)
    count = min(neighbors, num_workers - 1)
    near_Nk = np.argsort(distance_NN, axis=1, kind="stable")[:, :count]
    links = sp.csr_array((np.ones(near_Nk.size), (np.repeat(np.arange(num_workers), count), near_Nk.ravel())),
                         shape=(num_workers, num_workers))  # fmt: skip
    links = links + links.T
    while (found := connected_components(links, directed=False))[0] > 1:
        apart_NN = np.where(found[1][:, None] != found[1][None], distance_NN, np.inf)
        i, j = np.unravel_index(apart_NN.argmin(), apart_NN.shape)
        links = links + sp.csr_array(([1.0, 1.0], ([i, j], [j, i])), shape=links.shape)
    return (metropolis_hastings(links),)


def _powers_of_two(num_workers: int) -> list[int]:
    """1, 2, 4, ... below N: ceil(log2 N) of them."""
    return [2**j for j in range((num_workers - 1).bit_length())]


def _circulant(num_workers: int, offsets: Iterable[int]) -> sp.csr_array:
    """Equal weights over worker i and the workers i + offset (mod N); offsets that coincide count once."""
    distinct = np.array(sorted({0, *(offset % num_workers for offset in offsets)}))
    senders = (np.arange(num_workers)[:, None] + distinct) % num_workers
    indptr = np.arange(num_workers + 1) * len(distinct)
    weights = np.full(senders.size, 1.0 / len(distinct))
    return _canonical(sp.csr_array((weights, senders.ravel(), indptr), shape=(num_workers, num_workers)))


def _from_links(i: np.ndarray, j: np.ndarray, num_workers: int) -> sp.csr_array:
    """Metropolis-Hastings weights of the undirected graph with links i[k] - j[k]."""
    graph = sp.csr_array((np.ones(len(i)), (i, j)), shape=(num_workers, num_workers))
    return metropolis_hastings(graph + graph.T)


def _canonical(matrix: sp.sparray) -> sp.csr_array:
    matrix = sp.csr_array(matrix, dtype=np.float64)
    matrix.sum_duplicates()  # sorts the column indices as well
    matrix.eliminate_zeros()
    return matrix


def _is_circulant(matrix: sp.csr_array) -> bool:
    size = matrix.shape[0]
    entries = matrix.tocoo()
    offset_E = (entries.col - entries.row) % size
    first_row = matrix[[0]].toarray()[0]
    return matrix.nnz == size * np.count_nonzero(first_row) and bool((entries.data == first_row[offset_E]).all())


def _largest_moduli(matrix: sp.csr_array) -> np.ndarray:
    """The moduli of the eigenvalues of W, at least the two largest."""
    if (matrix != matrix.T).nnz == 0:
        return np.abs(np.linalg.eigvalsh(matrix.toarray()))
    if matrix.shape[0] > 64:  # the dense method takes seconds at N = 1024 where the matrix is not symmetric
        try:
            start = np.cos(np.arange(matrix.shape[0]))  # fixed, so that the figure is the same every time
            return np.abs(eigs(matrix, k=2, v0=start, return_eigenvectors=False))
        except ArpackNoConvergence:
            pass
    return np.abs(np.linalg.eigvals(matrix.toarray()))
