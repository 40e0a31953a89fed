"""The graphs that have a name: each a function ``(num_workers, **options) -> matrices``.

How to add one, and what the matrices mean: utils/topology.py. Most graphs get Metropolis-Hastings weights.

Legend: N workers, E links, each once; of the Base-(k+1) graph: k most neighbours a round, n workers of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from utils.errors import UsageError
from utils.random import numpy_rng
from utils.topology import Matrices, metropolis_hastings, with_own_share
from utils.topology_file import read_topology_file

Links = tuple[np.ndarray, np.ndarray, np.ndarray]  # of a round: i_E, j_E, weight_E


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
    return torus(num_workers, (rows, num_workers // rows))


def torus(num_workers: int, torus: Sequence[int] = (), **_: object) -> Matrices:
    """Torus of any number of dimensions, with sizes ``torus`` whose product is N; workers are numbered as in an
    array of that shape, the last dimension fastest. Metropolis-Hastings weights, which are all equal: a worker
    has two neighbours in each dimension (one where the size is 2, none where it is 1). One size is the ring."""
    if not torus or min(torus) < 1 or math.prod(torus) != num_workers:
        given = f", not {math.prod(torus)}" if torus and min(torus) >= 1 else ""
        rows = max(r for r in range(1, math.isqrt(num_workers) + 1) if num_workers % r == 0)
        raise UsageError(
            f"--mode torus needs --torus SIZES, each 1 or more, whose product is the number of workers, "
            f"{num_workers}{given}: as in --torus {rows} {num_workers // rows}."
        )
    links = sp.csr_array((num_workers, num_workers))
    for dimension, size in enumerate(torus):
        before, after = math.prod(torus[:dimension]), math.prod(torus[dimension + 1 :])
        along = sp.kron(_circulant(size, (-1, 1)), sp.eye_array(after))
        links = links + sp.kron(sp.eye_array(before), along)
    return (metropolis_hastings(links),)


def line(num_workers: int, **_: object) -> Matrices:
    """A path 0 - 1 - ... - (N - 1); Metropolis-Hastings weights, a third on each link (N = 2: a half)."""
    return tree(num_workers, branches=1)


def tree(num_workers: int, branches: int = 2, **_: object) -> Matrices:
    """Complete tree in the order of a heap: the parent of worker i > 0 is (i - 1) // ``branches``, so that all
    levels but the last are full. Metropolis-Hastings weights."""
    if branches < 1:
        raise UsageError(f"--branches must be 1 or more, not {branches}.")
    children = np.arange(1, num_workers)
    return (_from_links(children, (children - 1) // branches, num_workers),)


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


def base(num_workers: int, base_neighbors: int = 1, **_: object) -> Matrices:
    """Base-(k+1) graph with k = ``base_neighbors``: rounds of symmetric matrices in each of which a worker has at most
    k neighbours, and whose product over one period is the exact average 11'/N, for every N and k (Takezawa et al. 2023,
    arXiv:2305.11420). A period is at most 2 log_{k+1}(N) + 2 rounds."""
    if base_neighbors < 1:
        raise UsageError(f"--base_neighbors must be 1 or more, not {base_neighbors}.")
    rounds = _base(num_workers, base_neighbors) or [_together()]  # a single worker averages itself
    matrices = []
    for i_E, j_E, weight_E in rounds:
        half = sp.csr_array((weight_E, (i_E, j_E)), shape=(num_workers, num_workers))
        matrices.append(with_own_share(half + half.T))
    return tuple(matrices)


def _base(n: int, k: int) -> list[Links]:
    """Algorithm 3: the rounds of the Base-(k+1) graph on workers 0 ... n - 1.

    n = p q, where p has all prime factors up to k + 1. Workers lie on a p x q table: the simple graph averages each
    row, then the hyper-hypercube each column, and with it the rows' averages. The simple graph on all n where that
    takes fewer rounds."""
    p, q = 1, n
    for factor in range(2, min(k + 1, n) + 1):
        while q % factor == 0:
            p, q = p * factor, q // factor
    table_pq = np.arange(n).reshape(p, q)
    rows = [
        ((table_pq[:, :1] + i_E).ravel(), (table_pq[:, :1] + j_E).ravel(), np.tile(weight_E, p))
        for i_E, j_E, weight_E in _simple_base(q, k)
    ]
    by_factors, simple = rows + _hyper_hypercube(table_pq.T, k), _simple_base(n, k)
    return simple if len(simple) < len(by_factors) else by_factors


def _simple_base(n: int, k: int) -> list[Links]:
    """Algorithm 2: the rounds of the Simple Base-(k+1) graph on workers 0 ... n - 1.

    The digits of n in base k + 1 cut the workers into parts V_1, V_2, ..., V_L of a_l (k+1)^p_l, with falling p_l and
    1 <= a_l <= k. First each part averages itself. Then, for l = 1, 2, ..., V_l settles with all parts after it:
    they get the average of V_l, ..., V_L, and so does V_l, though unevenly spread over its workers. In the rounds that
    remain, V_l averages itself: as each of its a_l groups of (k+1)^p_l workers got the same, that is p_l rounds in each
    group, and none is later than V_1, at p_1 + 1 rounds after the first average."""
    if _fewest_factors(n, k + 1) is not None:
        return _hyper_hypercube(np.arange(n)[None], k)
    size, start = 1, 0
    while size * (k + 1) <= n:
        size *= k + 1
    parts = []  # V_l as its groups, a row each: [a_l, (k+1)^p_l]
    while start < n:
        count = (n - start) // size
        if count:
            parts.append(np.arange(start, start + count * size).reshape(count, size))
        start, size = start + count * size, size // (k + 1)

    whole = [_hyper_hypercube(part.reshape(1, -1), k) for part in parts]
    # Groups of one worker have nothing to average: their part averages itself as a whole meanwhile.
    groups = [_hyper_hypercube(part if part.shape[1] > 1 else part.T, k) for part in parts]
    # A part that is done begins again, here and below. It keeps the average, and mixes what training adds.
    rounds = [_together(*(turns[r % len(turns)] for turns in whole if turns)) for r in range(len(whole[0]))]
    last = len(parts) - 1
    for r in range(len(groups[0]) + 1):
        links = [_settle(parts[r], np.concatenate([part.ravel() for part in parts[r + 1 :]]), k)] if r < last else []
        for part, turns in enumerate(groups):
            turn = r - part - (part < last)  # the last part settles with none: it is free a round earlier
            if turns and turn >= 0:
                links.append(turns[turn % len(turns)])
        rounds.append(_together(*links))
    return rounds


def _settle(groups_An: np.ndarray, later_R: np.ndarray, k: int) -> Links:
    """The round in which a part of A <= k groups of n workers meets the R workers of the parts after it (R < n): each
    of those takes n / (A n + R) from a worker of each group, who meets nobody else.

    Say all of the part have x, and the later workers the mean y: theirs becomes the mean of all, (A n x + R y) /
    (A n + R); and as the sum is kept and the groups got the same, so does the mean of each group. The part's other
    workers, all at x, are linked in cliques of k + 1, which changes no mean and mixes what training adds."""
    groups, n = groups_An.shape
    met = len(later_R)
    weight = n / (groups * n + met)  # the share, over the part's groups
    links = np.tile(later_R, groups), groups_An[:, :met].ravel(), np.full(groups * met, weight)
    idle = groups_An[:, met:].ravel()
    full = len(idle) // (k + 1) * (k + 1)
    return _together(links, _cliques(idle[:full].reshape(-1, k + 1)), _cliques(idle[None, full:]))


def _hyper_hypercube(sets_An: np.ndarray, k: int) -> list[Links]:
    """Algorithm 1: the rounds of the k-peer Hyper-Hypercube graph on each of A disjoint sets of n workers, where no
    prime factor of n is above k + 1. n is a product of as few factors <= k + 1 as can be; numbers in that mixed radix
    name the workers, and round l averages those that differ in digit l alone."""
    factors = _fewest_factors(sets_An.shape[1], k + 1)
    assert factors is not None
    digits = sets_An.reshape(-1, *factors)
    return [_cliques(np.moveaxis(digits, l, -1).reshape(-1, factor)) for l, factor in enumerate(factors, start=1)]


@cache
def _fewest_factors(n: int, largest: int) -> tuple[int, ...] | None:
    """The fewest factors 2 ... ``largest`` with product n, falling; None where a prime factor of n is larger."""
    if n <= largest:
        return (n,) if n > 1 else ()
    found = []
    for factor in range(2, largest + 1):
        if n % factor == 0 and (others := _fewest_factors(n // factor, factor)) is not None:
            found.append((factor, *others))
    return min(found, key=len, default=None)


def _cliques(groups_Gc: np.ndarray) -> Links:
    """Every group of c workers, a row each, averages itself."""
    size = groups_Gc.shape[1]
    a, b = np.triu_indices(size, 1)
    i_E = groups_Gc[:, a].ravel()
    return i_E, groups_Gc[:, b].ravel(), np.full(len(i_E), 1.0 / max(size, 1))


def _together(*links: Links) -> Links:
    """All these links in one round."""
    nothing = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0)
    i_E, j_E, weight_E = (np.concatenate(arrays) for arrays in zip(nothing, *links, strict=True))
    return i_E, j_E, weight_E


def _powers_of_two(num_workers: int) -> list[int]:
    """1, 2, 4, ... below N: ceil(log2 N) of them."""
    return [2**j for j in range((num_workers - 1).bit_length())]


def _circulant(num_workers: int, offsets: Iterable[int]) -> sp.csr_array:
    """Equal weights over worker i and the workers i + offset (mod N); offsets that coincide count once."""
    distinct = np.array(sorted({0, *(offset % num_workers for offset in offsets)}))
    senders = (np.arange(num_workers)[:, None] + distinct) % num_workers
    indptr = np.arange(num_workers + 1) * len(distinct)
    weights = np.full(senders.size, 1.0 / len(distinct))
    return sp.csr_array((weights, senders.ravel(), indptr), shape=(num_workers, num_workers))


def _from_links(i: np.ndarray, j: np.ndarray, num_workers: int) -> sp.csr_array:
    """Metropolis-Hastings weights of the undirected graph with links i[k] - j[k]."""
    graph = sp.csr_array((np.ones(len(i)), (i, j)), shape=(num_workers, num_workers))
    return metropolis_hastings(graph + graph.T)
