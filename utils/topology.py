"""Who averages with whom, and with what weight.

A topology is one or more N x N mixing matrices W, sparse; row = receiver: after a gossip step worker i
holds sum_j W[i, j] * x_j. Every row sums to 1, and no weight is negative. A topology of several
matrices uses them in turn, one a round.

To add one: write a function ``(num_workers, **options) -> matrices`` that takes what it needs of what
``build_topology`` is given, and ``**_``, and add a line to ``utils.registry.TOPOLOGIES``. Those that are there:
utils/topologies.py.

Legend: N workers, E nonzero weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackNoConvergence, eigs

from utils.errors import UsageError
from utils.random import numpy_rng
from utils.registry import TOPOLOGIES, load
from utils.topology_file import ROW_SUM_TOLERANCE

Matrices = tuple[sp.csr_array, ...]

DENSE_LIMIT = 2048  # workers up to which a general spectrum is computed
PROBES = 4  # random vectors that tell whether a period averages exactly


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
        None where it would take too long: N above 2048, and matrices that are not all circulant and do not
        average exactly.
        """
        if self._averages_exactly:
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

    @property
    def _averages_exactly(self) -> bool:
        """Whether a period gives all workers the same (to 1e-12), whatever they had: its product has rank 1, and the
        eigenvalues 1 and 0. Tried on random vectors instead of the product, which may be dense: those that a product
        of higher rank makes constant have probability 0."""
        value_NV = numpy_rng("spectral gap", self.num_workers).standard_normal((self.num_workers, PROBES))
        for matrix in self.matrices:
            value_NV = matrix @ value_NV
        return bool(np.ptp(value_NV, axis=0).max() <= 1e-12)

    def _links(self) -> sp.csr_array:
        """Pattern of the off-diagonal weights of a period, as ones."""
        links = sp.csr_array(sum(self.matrices[1:], start=self.matrices[0]), copy=True)
        links.setdiag(0)
        links.eliminate_zeros()
        links.data[:] = 1.0
        return links


def build_topology(mode: str, num_workers: int, seed: int = 0, **options: object) -> Topology:
    """The topology of that name for N workers. ``seed`` matters to 'random'; ``options``: ``path`` of 'file',
    ``positions_NX`` and ``neighbors`` of 'nearest', ``base_neighbors`` of 'base', ``torus`` of 'torus' (its sizes),
    ``branches`` of 'tree'.

    Raises UsageError for an unknown name, fewer than one worker, options that do not fit, or a file that is no valid
    topology.
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
    return with_own_share(weights)


def with_own_share(weights: sp.csr_array) -> sp.csr_array:
    """The mixing matrix of these weights off the diagonal, [N, N]: what a row lacks of 1 is the worker's own share."""
    return _canonical(weights + sp.diags_array(1.0 - weights.sum(axis=1)))


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
