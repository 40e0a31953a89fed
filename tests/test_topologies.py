"""The Base-(k+1) graph averages exactly in few rounds; tori, lines and trees have the links they should."""

import json
import math
import time

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import UsageError
from utils.topologies import _fewest_factors
from utils.topology import Topology, build_topology


def dense(mode, num_workers, **options):
    (matrix,) = build_topology(mode, num_workers, **options).matrices
    return matrix.toarray()


# ---- Base-(k+1) -----------------------------------------------------------------------------------------


def check_base(n, k):
    """What Takezawa et al. 2023 promise of the Base-(k+1) graph."""
    topology = build_topology("base", n, base_neighbors=k)
    product = np.eye(n)
    for matrix in topology.matrices:
        weights = matrix.toarray()
        assert np.array_equal(weights, weights.T)
        assert weights.min() >= 0 and weights.diagonal().min() > 0
        assert np.abs(weights.sum(axis=0) - 1).max() < 1e-14 and np.abs(weights.sum(axis=1) - 1).max() < 1e-14
        assert np.count_nonzero(weights, axis=1).max() <= k + 1
        product = weights @ product
    np.testing.assert_allclose(product, 1 / n, rtol=0, atol=1e-12)
    assert topology.period <= 2 * math.log(n, k + 1) + 2
    assert topology.spectral_gap == 1.0 and not topology.directed and topology.is_connected


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_period_of_base_averages_exactly_whatever_n(k):
    for n in range(2, 65):
        check_base(n, k)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 250), st.integers(1, 20))
def test_base_of_any_size(n, k):
    check_base(n, k)


@pytest.mark.parametrize(
    "n, k, period",
    [
        (1, 1, 1), (2, 1, 1), (3, 1, 3), (5, 1, 5), (7, 1, 5), (16, 1, 4), (16, 2, 4), (16, 3, 2),
        (25, 1, 9), (25, 2, 6), (25, 3, 5),
        (6, 1, 4),  # by factors: 3 rounds for 3 workers, 1 for 2; the simple graph has 2 + 1 + 2
        (22, 4, 4),  # the simple graph: 2 + 1 + 1; by factors it would be 4 for 11 workers, 1 for 2
        (8, 7, 1), (8, 100, 1),  # all at once
        (216, 7, 3),  # 6 x 6 x 6: to take 8 first would come to 4
    ],
)  # fmt: skip
def test_periods_of_base(n, k, period):
    assert build_topology("base", n, base_neighbors=k).period == period


def test_base_by_hand():
    """n = 3 = 2 + 1: workers 0 and 1 average, then 0 and 2 settle with weight 2 / (2 + 1), then 0 and 1 again."""
    pair, settle = [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], [[1 / 3, 0, 2 / 3], [0, 1, 0], [2 / 3, 0, 1 / 3]]
    matrices = [matrix.toarray() for matrix in build_topology("base", 3).matrices]
    np.testing.assert_allclose(matrices, [pair, settle, pair], rtol=0, atol=1e-15)


@pytest.mark.parametrize("n, k", [(5, 1), (23, 1), (23, 2), (61, 3), (47, 4)])
def test_the_simple_base_graph_has_two_averages_of_its_first_part(n, k):
    """m_1 + 1 + p_1 rounds, where n = a_1 (k+1)^p_1 + ..., and m_1 = p_1, and 1 more where a_1 > 1. (n is prime and
    above k + 1: no factors.)"""
    power = int(math.log(n, k + 1) + 1e-9)
    first = n // (k + 1) ** power
    assert build_topology("base", n, base_neighbors=k).period == 2 * power + (first > 1) + 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.integers(2, 16))
def test_fewest_factors(n, largest):
    """Against products of 0, 1, 2, ... factors, all of them."""
    found, products, count = _fewest_factors(n, largest), {1}, 0
    while n not in products and any(p * 2 <= n for p in products):
        products = {p * f for p in products for f in range(2, largest + 1) if n % (p * f) == 0}
        count += 1
    if n not in products:
        assert found is None
    else:
        assert len(found) == count and math.prod(found) == n and max(found, default=1) <= largest


def test_base_is_quick_at_scale_and_its_gap_is_one():
    start = time.perf_counter()
    topology = build_topology("base", 3001)
    record = json.loads(json.dumps(topology.to_json(), allow_nan=False))
    assert record["spectral_gap"] == 1.0 and record["period"] == topology.period == 23
    assert Topology.from_json(record).to_json() == record
    assert time.perf_counter() - start < 5  # about 0.3 s


@pytest.mark.parametrize("rest", [0.1, 1e-6, 1e-9])
def test_a_gap_close_to_one_is_not_one(rest):
    """Almost the average, and a little of the star, whose second eigenvalue is 1 - 1 / n."""
    weights = sp.csr_array((1 - rest) / 25 + rest * dense("star", 25))
    assert 1 - Topology("mine", 25, (weights,)).spectral_gap == pytest.approx(rest * 24 / 25, rel=1e-5)


# ---- torus, line, tree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 12])
def test_a_torus_of_one_dimension_is_the_ring(n):
    for sizes in (n,), (n, 1), (1, 1, n):
        np.testing.assert_allclose(dense("torus", n, torus=sizes), dense("ring", n), rtol=0, atol=1e-15)


@pytest.mark.parametrize("rows, columns", [(1, 5), (2, 2), (2, 3), (3, 3), (3, 4), (4, 6)])
def test_a_torus_of_two_dimensions_is_the_grid(rows, columns):
    torus = dense("torus", rows * columns, torus=(rows, columns))
    np.testing.assert_array_equal(torus, dense("grid", rows * columns))
    turned = np.arange(rows * columns).reshape(rows, columns).T.ravel()
    np.testing.assert_array_equal(torus[turned][:, turned], dense("torus", rows * columns, torus=(columns, rows)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_torus_links_workers_a_step_apart(sizes):
    n = math.prod(sizes)
    topology = build_topology("torus", n, torus=tuple(sizes))
    place_ND = np.stack(np.unravel_index(np.arange(n), sizes), axis=1)
    step_NND = np.abs(place_ND[:, None] - place_ND[None])
    distance_NN = np.minimum(step_NND, np.array(sizes) - step_NND).sum(axis=2)
    degree = sum(min(size - 1, 2) for size in sizes)
    weights_NN = topology.mixing(0).toarray()
    np.testing.assert_allclose(weights_NN, (distance_NN <= 1) / (degree + 1), rtol=0, atol=1e-14)
    assert topology.is_connected and topology.is_doubly_stochastic and topology.period == 1


def test_gap_of_a_torus():
    """The slowest wave is along the longest dimension: 1 - lambda = 2 (1 - cos(2 pi / 5)) / (2 D + 1)."""
    expected = 2 * (1 - math.cos(2 * math.pi / 5)) / 7
    assert build_topology("torus", 60, torus=(3, 5, 4)).spectral_gap == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 33])
def test_line(n):
    topology = build_topology("line", n)
    assert topology.edges() == [(i, i + 1) for i in range(n - 1)] and topology.is_connected
    weight = 0.5 if n == 2 else 1 / 3
    links = np.diag(np.full(n - 1, weight), 1) + np.diag(np.full(n - 1, weight), -1)
    expected = links + np.diag(1 - links.sum(axis=1))
    np.testing.assert_allclose(topology.mixing(0).toarray(), expected, rtol=0, atol=1e-15)
    if n > 2:  # I less a third of the Laplacian of a path, whose eigenvalues are 2 - 2 cos(pi j / n)
        assert topology.spectral_gap == pytest.approx((2 - 2 * math.cos(math.pi / n)) / 3)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 40])
@pytest.mark.parametrize("branches", [1, 2, 3, 5])
def test_tree(n, branches):
    topology = build_topology("tree", n, branches=branches)
    edges = topology.edges()
    assert edges == sorted(((i - 1) // branches, i) for i in range(1, n)) and topology.is_connected
    children_N = np.bincount([i for i, _ in edges], minlength=n)
    inner = (n - 1) // branches  # all of these have all children, and one more may have some
    assert (children_N[:inner] == branches).all() and not children_N[inner + 1 :].any()
    degree_N = children_N + (np.arange(n) > 0)
    weights_NN = topology.mixing(0).toarray()
    assert np.array_equal(np.count_nonzero(weights_NN, axis=1), degree_N + 1)
    for i, j in edges:
        assert weights_NN[i, j] == weights_NN[j, i] == 1 / (1 + max(degree_N[i], degree_N[j]))


def test_trees_that_are_other_graphs():
    assert build_topology("tree", 7).edges() == [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6)]  # two each by default
    np.testing.assert_array_equal(dense("tree", 9, branches=8), dense("star", 9))
    np.testing.assert_array_equal(dense("tree", 9, branches=1), dense("line", 9))


@pytest.mark.parametrize(
    "mode, options, message",
    [
        ("torus", {}, r"--mode torus needs --torus SIZES.* product is the number of workers, 12: as in --torus 3 4"),
        ("torus", {"torus": ()}, "--torus SIZES"),
        ("torus", {"torus": (2, 5)}, r"the number of workers, 12, not 10: as in --torus 3 4"),
        ("torus", {"torus": (12, 0)}, "each 1 or more"),
        ("torus", {"torus": (-3, -4)}, "each 1 or more"),
        ("tree", {"branches": 0}, "--branches must be 1 or more, not 0"),
        ("base", {"base_neighbors": 0}, "--base_neighbors must be 1 or more, not 0"),
    ],
)
def test_bad_options_are_one_line(mode, options, message):
    with pytest.raises(UsageError, match=message) as error:
        build_topology(mode, 12, **options)
    assert "\n" not in str(error.value)
