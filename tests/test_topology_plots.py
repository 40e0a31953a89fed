"""The graph of the workers as a picture."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.patches import FancyArrowPatch

from utils.topology import build_topology
from visualization import plot_utils as plots
from visualization.style import graph_edges, node_diameter, place_workers


@given(st.integers(1, 6), st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_edges_agree_with_the_dense_matrices(workers, period, random):
    dense = np.array([[[random.choice([0, 0, 0.25, 0.5]) for _ in range(workers)] for _ in range(workers)]
                      for _ in range(period)])  # fmt: skip
    matrices = []
    for matrix in dense:
        receiver, sender = np.nonzero(matrix)
        entry = {"receiver": receiver, "sender": sender, "weight": matrix[receiver, sender]}
        matrices.append({key: values.tolist() for key, values in entry.items()})
    lines_E2, arrows_E2 = graph_edges({"num_workers": workers, "matrices": matrices})
    total = dense.sum(0)
    pairs = list(itertools.combinations(range(workers), 2))
    alike = {(i, j) for i, j in pairs if total[i, j] == total[j, i] > 0}
    others = {(j, i) for i, j in itertools.permutations(range(workers), 2)
              if total[i, j] > 0 and total[i, j] != total[j, i]}  # fmt: skip
    assert sorted(map(tuple, lines_E2.tolist())) == sorted(alike)
    assert sorted(map(tuple, arrows_E2.tolist())) == sorted(others)


def test_topology_draws_lines_arrows_colours_and_numbers():
    accuracy_N = np.linspace(0.5, 0.9, 8)
    for mode, lines, arrows in ("ring", 8, 0), ("exponential", 4, 16), ("exponential_one_peer", 4, 16):
        figure = plots.draw_topology(build_topology(mode, 8).to_json(), accuracy_N, "test accuracy")
        axes, bar = figure.axes
        edges, nodes = axes.collections
        assert len(edges.get_segments()) == lines
        assert len([patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]) == arrows
        np.testing.assert_allclose(nodes.get_facecolors(), colormaps["viridis"](Normalize(0.5, 0.9)(accuracy_N)))
        assert {text.get_text() for text in axes.texts} == {str(k) for k in range(8)}
        assert bar.get_ylabel() == "test accuracy of the worker"


@pytest.mark.slow
def test_topology_says_what_it_leaves_out_and_survives_unknown_accuracies():
    (axes,) = plots.draw_topology(build_topology("all", 300).to_json()).axes
    assert "20,000 of 44,850 edges drawn" in axes.get_title(loc="left") and not axes.texts
    axes, _ = plots.draw_topology(build_topology("ring", 3).to_json(), np.array([0.5, np.nan, 0.5])).axes
    assert len(np.unique(axes.collections[1].get_facecolors(), axis=0)) == 2


@pytest.mark.parametrize("mode", ["ring", "grid", "star", "random", "all"])
@pytest.mark.parametrize("workers", [2, 7, 12, 36, 64])
def test_nodes_have_a_place_of_their_own(mode, workers):
    pairs_E2, _ = graph_edges(build_topology(mode, workers).to_json())
    place_N2, torus = place_workers(mode, workers, pairs_E2)
    assert torus == (mode == "grid" and workers in (12, 36, 64))
    distance_NN = np.linalg.norm(place_N2[:, None] - place_N2, axis=-1) + 1e9 * np.eye(workers)
    points = 340 * distance_NN.min() / np.ptp(place_N2, axis=0).max()
    assert node_diameter(place_N2) < points, "two nodes touch"
    if mode == "star" and workers > 2:
        assert not place_N2[0].any()


def test_a_torus_edge_around_the_sheet_becomes_two_stubs():
    axes = plots.draw_topology(build_topology("grid", 12).to_json()).axes[0]  # 3 x 4
    inner, around = 2 * 4 + 3 * 3, 4 + 3
    segments = axes.collections[0].get_segments()
    assert len(segments) == inner + 2 * around
    assert max(np.linalg.norm(s[1] - s[0]) for s in segments) == 1
