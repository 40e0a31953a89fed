"""Mixing matrices: stochastic, connected, with the gaps known in closed form."""

import json
import math
import time

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import UsageError
from utils.registry import TOPOLOGIES
from utils.topology import Topology, build_topology, metropolis_hastings

MODES = [mode for mode in TOPOLOGIES if mode not in ("file", "nearest", "torus")]  # those need more than N
modes, sizes = st.sampled_from(MODES), st.integers(1, 40)


def dense(topology):
    return [matrix.toarray() for matrix in topology.matrices]


def product(topology):
    result = np.eye(topology.num_workers)
    for matrix in dense(topology):
        result = matrix @ result
    return result


def reach(topology):
    """Who has heard of whom after N periods, by plain multiplication."""
    return np.linalg.matrix_power((product(topology) > 0).astype(float), topology.num_workers) > 0


@settings(max_examples=120, deadline=None)
@given(modes, sizes, st.integers(0, 5))
def test_every_topology_is_doubly_stochastic_and_connected(mode, num_workers, seed):
    topology = build_topology(mode, num_workers, seed)
    for matrix in topology.matrices:
        assert matrix.shape == (num_workers, num_workers)
        assert matrix.dtype == np.float64 and matrix.has_sorted_indices
        assert (matrix.data > 0).all()
        assert np.abs(matrix.toarray().sum(axis=1) - 1).max() < 1e-14
        assert np.abs(matrix.toarray().sum(axis=0) - 1).max() < 1e-14
    assert reach(topology).all()
    assert topology.is_doubly_stochastic and topology.is_connected
    assert 0 < topology.spectral_gap <= 1


@settings(max_examples=60, deadline=None)
@given(modes, st.integers(2, 24))
def test_spectral_gap_is_its_definition(mode, num_workers):
    topology = build_topology(mode, num_workers)
    moduli = np.sort(np.abs(np.linalg.eigvals(product(topology))))
    assert topology.spectral_gap == pytest.approx(1 - moduli[-2], abs=1e-7)
    # as the docstring says: here the same as by singular values, the contraction of disagreement
    assert topology.spectral_gap == pytest.approx(1 - np.linalg.svd(product(topology), compute_uv=False)[1], abs=1e-7)


def test_spectral_gap_of_a_period_takes_the_matrices_in_order():
    """Three directed matrices that do not commute: the product in reverse has another spectrum."""
    weights = np.random.default_rng(0).random((3, 6, 6))
    weights /= weights.sum(axis=2, keepdims=True)
    topology = Topology("mine", 6, tuple(map(sp.csr_array, weights)))
    in_order, reverse = weights[2] @ weights[1] @ weights[0], weights[0] @ weights[1] @ weights[2]
    gaps = [1 - np.sort(np.abs(np.linalg.eigvals(matrix)))[-2] for matrix in (in_order, reverse)]
    assert abs(gaps[0] - gaps[1]) > 1e-4
    assert topology.spectral_gap == pytest.approx(gaps[0], abs=1e-9)


@pytest.mark.parametrize("num_workers", [3, 4, 8, 33, 1024, 10_000])
def test_gap_of_the_ring(num_workers):
    expected = 1 - (1 + 2 * math.cos(2 * math.pi / num_workers)) / 3
    assert build_topology("ring", num_workers).spectral_gap == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_workers", [4, 6, 16, 50, 64])
def test_gap_of_the_static_exponential_graph(num_workers):
    """1 - rho with rho = 1 - 2 / (1 + ceil(log2 N)) for even N: Ying et al. 2021, proposition 1."""
    expected = 2 / (1 + math.ceil(math.log2(num_workers)))
    assert build_topology("exponential", num_workers).spectral_gap == pytest.approx(expected)


@pytest.mark.parametrize("num_workers", [2, 4, 8, 64])
def test_a_period_of_one_peer_exponential_averages_exactly(num_workers):
    topology = build_topology("exponential_one_peer", num_workers)
    assert topology.period == math.log2(num_workers)
    assert np.allclose(product(topology), 1 / num_workers, rtol=0, atol=1e-15)
    assert topology.spectral_gap == 1.0


def test_matrices_by_hand():
    third, half = 1 / 3, 1 / 2
    ring = np.array([[third, third, 0, third], [third, third, third, 0], [0, third, third, third]])
    assert np.array_equal(dense(build_topology("ring", 4))[0][:3], ring)
    assert np.array_equal(dense(build_topology("all", 4))[0], np.full((4, 4), 0.25))
    # row = receiver: worker 0 of 4 hears 3 (= 0 - 1) and 2 (= 0 - 2)
    assert np.allclose(dense(build_topology("exponential", 4))[0][0], [third, 0, third, third])
    first, second = dense(build_topology("exponential_one_peer", 4))
    assert np.array_equal(first[0], [half, 0, 0, half])
    assert np.array_equal(second[0], [half, 0, half, 0])
    # 2 x 3 torus: 0 1 2 / 3 4 5
    assert np.array_equal(np.flatnonzero(dense(build_topology("grid", 6))[0][0]), [0, 1, 2, 3])
    star = dense(build_topology("star", 4))[0]
    assert np.allclose(star[0], 0.25)
    assert np.allclose(star[2], [0.25, 0, 0.75, 0])


@pytest.mark.parametrize("mode", MODES)
def test_one_and_two_workers(mode):
    assert np.array_equal(product(build_topology(mode, 1)), [[1.0]])
    assert np.array_equal(product(build_topology(mode, 2)), np.full((2, 2), 0.5))
    assert build_topology(mode, 1).messages(0) == 0 and build_topology(mode, 2).messages(0) == 2


@pytest.mark.parametrize("num_workers, degree", [(3, 2), (4, 2), (7, 2), (8, 3), (9, 4), (12, 4), (16, 4), (14, 3)])
def test_grid_is_a_regular_torus(num_workers, degree):
    matrix = dense(build_topology("grid", num_workers))[0]
    assert (np.count_nonzero(matrix, axis=1) == degree + 1).all()
    assert np.allclose(matrix[matrix > 0], 1 / (degree + 1))
    if degree == 2 and num_workers != 4:  # a prime: the ring (2 x 2 is a ring too, numbered otherwise)
        assert np.allclose(matrix, dense(build_topology("ring", num_workers))[0])


def test_random_depends_on_the_seed_alone():
    first, again, other = (build_topology("random", 30, seed).to_json() for seed in (1, 1, 2))
    assert first == again
    assert first["matrices"] != other["matrices"]
    degrees = [build_topology("random", 200, seed).messages(0) / 200 for seed in range(3)]
    assert np.mean(degrees) == pytest.approx(math.log(200) + 2, abs=0.1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_metropolis_hastings(num_workers, rng):
    pairs = [(i, j) for i in range(num_workers) for j in range(i) if rng.random() < 0.4]
    adjacency = np.zeros((num_workers, num_workers))
    for i, j in pairs:
        adjacency[i, j] = adjacency[j, i] = 1
    degree = adjacency.sum(axis=1)
    weights = metropolis_hastings(sp.csr_array(adjacency)).toarray()
    for i, j in pairs:
        assert weights[i, j] == weights[j, i] == 1 / (1 + max(degree[i], degree[j]))
    assert np.count_nonzero(weights) == 2 * len(pairs) + num_workers
    assert np.allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-14)


def test_rounds_messages_and_edges():
    one_peer = build_topology("exponential_one_peer", 8)
    assert one_peer.mixing(4) is one_peer.matrices[1]
    assert [one_peer.messages(r) for r in range(4)] == [8] * 4
    assert one_peer.directed and len(one_peer.edges()) == 24
    assert (0, 7) in one_peer.edges()  # (receiver, sender)
    ring = build_topology("ring", 4)
    assert not ring.directed and ring.edges() == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert ring.messages(0) == 8
    assert build_topology("star", 5).edges() == [(0, j) for j in range(1, 5)]


def test_reading_a_topology_does_not_change_it():
    topology = build_topology("ring", 6)
    before = dense(topology)[0]
    topology.edges(), topology.to_json(), topology.spectral_gap, metropolis_hastings(topology.mixing(0))
    assert np.array_equal(dense(topology)[0], before)


@settings(max_examples=40, deadline=None)
@given(modes, st.integers(1, 20))
def test_json_round_trip(mode, num_workers):
    topology = build_topology(mode, num_workers)
    record = json.loads(json.dumps(topology.to_json(), allow_nan=False))
    again = Topology.from_json(record)
    assert again.to_json() == record
    assert all(map(np.array_equal, dense(topology), dense(again)))
    assert record["doubly_stochastic"] is True and record["connected"] is True


def test_quick_at_scale():
    start = time.perf_counter()
    for mode in MODES:
        build_topology(mode, 1024).spectral_gap  # noqa: B018
    ring = build_topology("ring", 10_000)
    assert ring.is_connected and ring.mixing(0).nnz == 30_000
    assert build_topology("star", 10_000).spectral_gap is None
    assert time.perf_counter() - start < 10  # about 1 s; a dense N x N at 10,000 would be minutes


def test_a_wrong_matrix_is_refused():
    for wrong in ([[0.5, 0.4], [0.5, 0.5]], [[1.5, -0.5], [0.5, 0.5]], [[1.0]]):
        with pytest.raises(ValueError, match="mine"):
            Topology("mine", 2, (sp.csr_array(np.array(wrong)),))


def test_bad_arguments():
    with pytest.raises(UsageError, match="Did you mean 'ring'"):
        build_topology("rings", 4)
    with pytest.raises(UsageError, match="--num_workers"):
        build_topology("ring", 0)
    with pytest.raises(UsageError, match="--topology_file"):
        build_topology("file", 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 30), st.integers(1, 3), st.integers(0, 2**20), st.booleans())
def test_nearest_links_the_nearest_and_everybody_in_the_end(N, neighbors, dimensions, seed, places_coincide):
    rng = np.random.default_rng(seed)
    shape = N, dimensions
    positions_NX = rng.integers(0, 4, shape).astype(float) if places_coincide else rng.normal(size=shape)
    positions_NX[: N // 2] += 100  # two clusters, that few neighbours leave apart
    topology = build_topology("nearest", N, positions_NX=positions_NX, neighbors=neighbors)
    weights_NN = topology.mixing(0).toarray()
    np.testing.assert_array_equal(weights_NN, weights_NN.T)
    assert topology.is_connected and topology.is_doubly_stochastic and not topology.directed
    linked_NN = (weights_NN > 0) & ~np.eye(N, dtype=bool)
    degree_N = linked_NN.sum(1)
    for i, j in topology.edges():
        assert weights_NN[i, j] == pytest.approx(1 / (1 + max(degree_N[i], degree_N[j])))
    distance_NN = np.linalg.norm(positions_NX[:, None] - positions_NX[None], axis=2)
    for i in range(N):
        others = np.delete(np.arange(N), i)
        reach = np.sort(distance_NN[i, others])[: min(neighbors, N - 1)]
        assert degree_N[i] >= len(reach)
        closer = [j for j in others if len(reach) and distance_NN[i, j] < reach[-1]]
        assert linked_NN[i, closer].all()  # whoever is as far as the last may be linked or not


def test_parts_are_joined_by_the_shortest_link():
    positions_NX = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0], [30.0], [31.0]])
    edges = build_topology("nearest", 8, positions_NX=positions_NX, neighbors=1).edges()
    assert {(2, 3), (5, 6)} <= set(edges) and len(edges) == 7  # a tree: each is linked to its nearest, and three parts


def test_nearest_without_places_says_what_it_needs():
    with pytest.raises(UsageError, match="--mode nearest needs data that know where .* and --partition natural"):
        build_topology("nearest", 4)
