"""The pictures of influence: drawn from synthetic records, checked on the figures and the files."""

from __future__ import annotations

import re
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import FancyArrowPatch, Rectangle, StepPatch
from matplotlib.text import Text

from tests.test_plots import NASTY, assert_legible, make_run, shown
from utils.records import UsageError, write_json
from utils.scores import write_scores
from utils.topology import build_topology
from visualization import influence_plots as plots
from visualization.comparison_plots import Pruning, Stage, draw_all_comparisons, draw_comparison
from visualization.finals import Final
from visualization.node_view import HARMED, HELPED, draw_node_view
from visualization.score_plots import _score_axis, draw_scores
from visualization.style import RED

RNG = np.random.default_rng


def write(path, scores_n, sample_id_n, worker_n):
    """Scores on disk, for a picture to be drawn of."""
    write_scores(path, {"scores": scores_n, "sample_id": sample_id_n, "worker": worker_n}, {"method": path.stem})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with scores, and 1 of 8 workers bad."""
    root = tmp_path_factory.mktemp("run")
    make_run(root / "stage1", 8, rounds=20)
    worker_n = np.arange(400) % 8
    scores_n = 1e-4 * RNG(0).standard_t(2, 400) - 3e-4 * (worker_n == 3)
    write(root / "influence" / "dice.zarr", scores_n, np.arange(400)[::-1], worker_n)
    return root


# ---- scores -------------------------------------------------------------------------------------


SCORES = st.floats(-1e6, 1e6).map(lambda score: round(score, 6))


@given(arrays(float, st.integers(0, 30), elements=SCORES), st.integers(1, 80))
@settings(max_examples=60, deadline=None)
def test_bins_hold_every_score_and_split_at_zero(scores_n, bins):
    edges = _score_axis(scores_n).edges(bins)
    assert (np.diff(edges) > 0).all() and 16 <= len(edges) - 1 <= 64
    count, _ = np.histogram(scores_n, edges)
    assert count.sum() == len(scores_n)
    assert 0.0 in edges
    assert count[edges[1:] <= 0].sum() == (scores_n < 0).sum()


def by_title(figure):
    return {axes.get_title(loc="left").split("\n")[0]: axes for axes in figure.axes}


def test_scores_show_shares_below_zero_and_the_flipped_ones():
    rng = RNG(1)
    class_n, worker_n = rng.integers(0, 3, 600), rng.integers(0, 4, 600)
    bad_n = rng.random(600) < 0.2
    scores_n = rng.standard_normal(600) - 4.0 * bad_n
    scores_n[0] = np.nan
    figure = draw_scores(scores_n, class_n, worker_n, "abc", "dice", bad_n, "with a flipped label", [2])
    assert_legible(figure)
    everything, classes, below_class, workers, below_worker = figure.axes
    title = everything.get_title(loc="left")
    known_n = np.isfinite(scores_n)
    assert f"{np.mean(scores_n[known_n] < 0):.0%} below zero" in title and "1 scores that are not finite" in title
    other, bad = [patch for patch in everything.patches if isinstance(patch, StepPatch)]
    for patch in other, bad:
        assert patch.get_data().values.sum() == pytest.approx(1)
    assert bad.get_edgecolor() == to_rgba(RED)
    assert f"flipped label ({(bad_n & known_n).sum()})" in bad.get_label()
    for axes, group_n in (below_class, class_n), (below_worker, worker_n):
        expected = [np.mean(scores_n[known_n & (group_n == g)] < 0) for g in range(group_n.max() + 1)]
        np.testing.assert_allclose([bar.get_width() for bar in axes.patches], expected)
    assert [line.get_ydata().tolist() for line in below_worker.lines] == [[1.6]], "worker 2 is marked"
    rows = [patch for patch in classes.patches if isinstance(patch, StepPatch)]
    assert len(rows) == 6 and [float(row.get_data().baseline) for row in rows] == [0, 0, 1, 1, 2, 2]
    for whole, part in zip(rows[::2], rows[1::2], strict=True):  # rows grow upwards from their baseline
        assert (part.get_data().values >= whole.get_data().values - 1e-12).all()
    assert [tick.get_text() for tick in classes.get_yticklabels()] == ["a", "b", "c"]
    assert len(workers.get_yticklabels()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("classes, workers, n, heavy", [(10, 8, 1200, True), (100, 100, 6000, False), (2, 1, 5, True)])
def test_scores_are_legible_at_every_size(classes, workers, n, heavy):
    rng = RNG(2)
    scores_n = 1e-5 * (rng.standard_t(1.5, n) if heavy else rng.standard_normal(n))
    names = [f"n{k:08d} with a long name" for k in range(classes)]
    figure = draw_scores(
        scores_n, np.arange(n) % classes, np.arange(n) % workers, names, "if",
        rng.random(n) < 0.3, "of workers with bad data", [0],
    )  # fmt: skip
    assert_legible(figure)
    assert figure.axes[1].get_xlim()[0] <= scores_n.min() and figure.axes[1].get_xlim()[1] >= scores_n.max()
    for axes in figure.axes[0], figure.axes[1]:  # whole numbers in a unit that the label names
        FigureCanvasAgg(figure).draw()
        labels = [float(text.get_text().replace("−", "-").replace(",", "")) for text in axes.get_xticklabels()]
        power = int(re.search(r"10\^\{(-?\d+)\}", axes.get_xlabel())[1])
        np.testing.assert_allclose(np.array(labels) * 10.0**power, axes.get_xticks(), atol=1e-12)


@pytest.mark.parametrize("scores_n", [np.zeros(0), np.zeros(20), np.full(20, 3.0)])
def test_degenerate_scores_are_drawn(scores_n):
    zeros_n = np.zeros(len(scores_n), int)
    assert_legible(draw_scores(scores_n, zeros_n, zeros_n, ["a", "b"]))


def test_plot_scores_finds_the_bad_samples_by_id(run_dir, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "visualization.score_plots.draw_scores",
        lambda *a, **k: drawn.update(k, classes=a[1]) or Figure(),
    )
    scores, stage1 = run_dir / "influence" / "dice.zarr", tmp_path / "stage1"
    shutil.copytree(run_dir / "stage1", stage1)
    assert plots.plot_scores(stage1, scores, tmp_path / "s.png").exists()
    assert not drawn["bad_n"].any() and drawn["method"] == "dice"
    labels_n = np.load(stage1 / "labels.npz")["labels"]
    np.testing.assert_array_equal(drawn["classes"], labels_n[np.arange(400)[::-1]])
    write_json(stage1 / "corruption.json", {"flipped": [399, 0], "bad_workers": [3], "kind": "label_flip"})
    plots.plot_scores(stage1, scores, tmp_path / "s.png")
    assert np.flatnonzero(drawn["bad_n"]).tolist() == [0, 399]
    write_json(stage1 / "corruption.json", {"flipped": [], "bad_workers": [3], "kind": "noise"})
    plots.plot_scores(stage1, scores, tmp_path / "s.png")
    assert np.flatnonzero(drawn["bad_n"]).tolist() == list(range(3, 400, 8))
    write(tmp_path / "other.zarr", np.zeros(1), [10**6], [0])
    with pytest.raises(UsageError, match="samples that"):
        plots.plot_scores(stage1, tmp_path / "other.zarr", tmp_path / "s.png")


# ---- audit --------------------------------------------------------------------------------------


def audit_of(methods, actual_M):
    return {"target": "nodes", "groups": len(actual_M), "fraction": 0.05, "actual": list(actual_M),
            "methods": methods, "masked_vs_removed": None}  # fmt: skip


def test_audit_draws_predicted_against_actual(tmp_path):
    actual_M = 2e-3 * RNG(0).standard_normal(40)
    methods = {
        "cascade": {"lds": 0.987, "interval": [0.95, 0.99], "predicted": list(actual_M)},
        "dice": {"lds": -0.456, "interval": [-0.7, -0.2], "predicted": list(1 + 1e-3 * actual_M)},
        "random": {"lds": None, "interval": None, "predicted": [0.0] * 40},
        "mine": {"lds": 0.1, "interval": [-0.2, 0.4], "predicted": list(100 * actual_M[::-1])},
    }
    figure = plots.draw_audit(audit_of(methods, actual_M))
    assert_legible(figure)
    assert "40 retrainings, 5%" in figure.get_suptitle()
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:4] == [
        "cascade: LDS 0.99 [0.95, 0.99]",
        "dice: LDS −0.46 [−0.70, −0.20]",
        "random: LDS undefined",
        "mine: LDS 0.10 [−0.20, 0.40]",
    ]
    for axes, method in zip(figure.axes, methods.values(), strict=False):
        points = axes.collections[0].get_offsets()
        np.testing.assert_array_equal(points, np.stack([method["predicted"], actual_M], 1))
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert left < points[:, 0].min() and right > points[:, 0].max()
        assert bottom < actual_M.min() and top > actual_M.max()
    identity = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    np.testing.assert_array_equal(identity[0].get_xdata(), identity[0].get_ydata())
    assert not [line for line in figure.axes[1].lines if line.get_linestyle() == "--"], "out of view"
    write_json(tmp_path / "audit.json", audit_of({"cascade": methods["cascade"]}, actual_M))
    assert imread(plots.plot_audit(tmp_path, tmp_path / "a.png")).shape[1] > 600
    assert_legible(plots.draw_audit(audit_of({"cascade": methods["cascade"]}, actual_M)))
    write_json(tmp_path / "audit.json", {"target": "nodes"})
    with pytest.raises(UsageError, match="it has no 'methods'"):
        plots.plot_audit(tmp_path, tmp_path / "a.png")


# ---- contact sheet ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_contact_sheet_shows_the_extremes_in_order_and_frames_the_flipped(channels):
    rng = RNG(3)
    images = rng.integers(0, 256, (350, 8, 8, channels), dtype=np.uint8)
    labels, scores, ids = rng.integers(0, 3, 350), 1e-3 * rng.standard_normal(50), 7 * np.arange(50)
    scores[4] = np.nan
    order = [i for i in np.argsort(-scores) if i != 4]
    flipped = [int(ids[order[2]]), int(ids[order[-1]]), int(ids[order[25]])]  # the last is not shown
    names = ["a", "b", "a name that is long"]
    figure = plots.draw_contact_sheet(images, labels, scores, ids, names, flipped)
    expected = [*order[:16], *order[::-1][:16]]
    assert len(figure.axes) == 32
    for axes, i in zip(figure.axes, expected, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), images[ids[i]].squeeze())
        name, caption = axes.get_title().split("\n")
        assert caption.startswith(f"#{ids[i]} ") and name[:5] == names[labels[ids[i]]][:5]
        assert float(caption.split()[1].replace("−", "-")) == pytest.approx(1e3 * scores[i], abs=0.006)
        framed = any(isinstance(patch, Rectangle) for patch in axes.patches)
        assert framed == (ids[i] in flipped)
    assert "$10^{-3}$" in figure.texts[0].get_text()
    if channels == 1:
        assert_legible(figure)


def test_contact_sheet_names_the_method_and_the_files():
    images, labels, ids = np.zeros((40, 4, 4, 1), np.uint8), np.zeros(40, int), np.arange(40)
    sources = [f"train/a/deep folder of some camera {k}/picture {k}.png" for k in range(39)] + ["train 39"]
    figure = plots.draw_contact_sheet(images, labels, 1e-3 * ids, ids, ["a"], None, "cascade", sources)
    assert_legible(figure)
    assert [text.get_text().split("\n")[0] for text in figure.texts] == [
        "Most helpful samples, cascade", "Most harmful samples, cascade",
    ]  # fmt: skip
    captions = [axes.get_title().split("\n")[2:] for axes in figure.axes]
    assert captions[:2] == [["train 39"], ["…r of some camera 38/", "picture 38.png"]]
    assert captions[16] == ["…er of some camera 0/", "picture 0.png"]
    assert "sources.txt" in figure.texts[0].get_text()


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_contact_sheet_of_few_images_repeats_none(n, tmp_path):
    what = np.zeros((n, 4, 4, 1), np.uint8), np.zeros(n, int), np.zeros(n), np.arange(n), ["a"]
    figure = plots.draw_contact_sheet(*what)
    assert imread(plots.plot_contact_sheet(*what, tmp_path / "sheet.png", flipped={0})).shape[1] > 700
    assert_legible(figure)
    captions = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(captions) == len(set(captions)) == 2 * (n // 2)


# ---- sweep --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviations", [False, True])
def test_sweep_has_a_line_a_method_and_one_for_no_pruning(deviations, tmp_path):
    ratios = [0.9, 0.2, 0.6]
    methods = {
        name: {
            "test_accuracy": [0.95 - 0.01 * k, 0.8, 0.9],
            "test_accuracy_std": [0.01] * 3 if deviations else None,
        }
        for k, name in enumerate(("cascade", "dice", "random", "mine"))
    }
    sweep = {"ratios": ratios, "methods": methods, "stage1": {"test_accuracy": 0.957}}
    figure = plots.draw_sweep(sweep)
    assert_legible(figure)
    (axes,) = figure.axes
    assert len(axes.containers) == 4
    for k, container in enumerate(axes.containers):
        curve, _, bars = container.lines
        np.testing.assert_allclose(curve.get_xdata(), [0.2, 0.6, 0.9], atol=0.01)
        np.testing.assert_allclose(curve.get_ydata(), [0.8, 0.9, 0.95 - 0.01 * k])
        assert bool(bars) == deviations
        if deviations:
            ends = np.array(bars[0].get_segments())[..., 1]
            np.testing.assert_allclose(np.ptp(ends, axis=1), 0.02)
    (full,) = [line for line in axes.lines if line.get_label().startswith("no pruning")]
    assert set(full.get_ydata()) == {0.957} and full.get_label() == "no pruning (95.7%)"
    assert axes.get_title(loc="left").endswith("\nbars: ± standard deviation" if deviations else "retraining")
    write_json(tmp_path / "sweep.json", sweep)
    assert imread(plots.plot_sweep(tmp_path, tmp_path / "new" / "sweep.png")).shape[0] > 400


def test_sweep_over_seeds_says_how_many_and_shows_the_spread_of_both_stages(tmp_path):
    curve = {"test_accuracy": [0.95, 0.9], "test_accuracy_std": [0.01, 0.02]}
    methods = {"cascade": curve, "random": curve}
    stage1 = {"test_accuracy": 0.957, "test_accuracy_std": 0.004}
    sweep = {"ratios": [0.9, 0.5], "methods": methods, "stage1": stage1, "seeds": 5}
    figure = plots.draw_sweep(sweep)
    assert_legible(figure)
    (axes,) = figure.axes
    assert axes.get_title(loc="left").endswith("\nmean over 5 seeds; bars: ± standard deviation")
    assert "no pruning\n(95.7% ± 0.4%)" in axes.get_legend_handles_labels()[1]
    (band,) = axes.patches
    np.testing.assert_allclose([band.get_y(), band.get_height()], [0.953, 0.008])
    write_json(tmp_path / "sweep.json", sweep)
    assert imread(plots.plot_sweep(tmp_path, tmp_path / "sweep.png")).shape[0] > 400


# ---- node view ----------------------------------------------------------------------------------


def node_view(workers, bad=(), seed=0, share=1.0):
    rng = RNG(seed)
    table_NN = 1e-3 * (rng.random((workers, workers)) + 0.1) * (rng.random((workers, workers)) < share)
    table_NN[list(bad)] *= -0.5
    np.fill_diagonal(table_NN, 1.0)
    return {"algorithm": "dice", "worker_influence": (table_NN - np.eye(workers)).sum(1).tolist(),
            "bad_workers": list(bad), "table": table_NN.tolist(), "hops": 2}  # fmt: skip


def arrows_of(axes):
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


def test_ripples_are_the_strongest_effects_of_each_worker():
    view = node_view(24, bad=[3, 20])
    figure = draw_node_view(view, build_topology("exponential", 24).to_json())
    assert_legible(figure)
    bars, graph = figure.axes
    influence_N = np.array(view["worker_influence"])
    order_N = np.argsort(influence_N)
    assert set(order_N[:2]) == {3, 20}, "this test's bad workers are the lowest"
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], influence_N[order_N])
    assert [tick.get_text() for tick in bars.get_yticklabels()] == [str(k) for k in order_N]
    assert [bool(bar.get_hatch()) for bar in bars.patches] == [True] * 2 + [False] * 22

    nodes = [line for line in graph.lines if line.get_marker() in "os"]
    assert [k for k, node in enumerate(nodes) if node.get_marker() == "s"] == [3, 20]
    for k, node in enumerate(nodes):  # the bars are the key to the nodes' colours
        bar = bars.patches[order_N.tolist().index(k)]
        np.testing.assert_allclose(to_rgba(node.get_color()), bar.get_facecolor())

    table_NN = np.array(view["table"]) * (1 - np.eye(24))
    places = [np.array([node.get_xdata()[0], node.get_ydata()[0]]) for node in nodes]
    drawn = {}
    for arrow in arrows_of(graph):
        ends = [min(range(24), key=lambda k: np.linalg.norm(places[k] - end)) for end in arrow._posA_posB]
        drawn[tuple(ends)] = arrow
    expected = {(j, int(k)) for j in range(24) for k in np.argsort(-np.abs(table_NN[j]))[:3]}
    assert set(drawn) == expected
    widths = [drawn[pair].get_linewidth() for pair in sorted(drawn, key=lambda pair: abs(table_NN[pair]))]
    assert (np.diff(widths) >= 0).all() and widths[-1] > 1.5 * widths[0]
    for pair, arrow in drawn.items():
        assert arrow.get_edgecolor()[:3] == (HELPED if table_NN[pair] > 0 else HARMED)[:3]
    said = graph.get_legend().get_title().get_text()
    assert "3 strongest" in said and f"{table_NN.max():.2g}" in said
    assert "2 hops" in graph.get_title(loc="left")


@pytest.mark.parametrize("mode, workers", [("ring", 1), ("ring", 2), ("grid", 16), ("random", 32)])
def test_graphs_are_legible(mode, workers):
    figure = draw_node_view(node_view(workers, bad=[0]), build_topology(mode, workers).to_json())
    assert_legible(figure)
    assert bool(arrows_of(figure.axes[1])) == (workers > 1)


def test_few_effects_are_all_drawn():
    view = node_view(8, share=0.3)
    effects = np.count_nonzero(np.array(view["table"]) * (1 - np.eye(8)))
    graph = draw_node_view(view, build_topology("ring", 8).to_json()).axes[1]
    assert len(arrows_of(graph)) == effects > 4
    assert "strongest" not in graph.get_legend().get_title().get_text()


def test_bad_workers_that_hold_no_scored_sample_are_not_marked():
    figure = draw_scores(np.arange(4.0), np.zeros(4, int), np.arange(4) % 2, "a", bad_workers=[1, 7, 10**9])
    assert_legible(figure)
    assert [line.get_ydata().tolist() for line in figure.axes[-1].lines] == [[0.6]]


@pytest.mark.slow
def test_every_picture_takes_any_name(run_dir):
    zeros = np.zeros(len(NASTY), int)
    lines = [{"round": 0, "epoch": 0, "val_loss": 1.0, "val_accuracy": 0.5}]
    method = {"lds": 0.5, "interval": None, "predicted": [0.1]}
    end = Final(np.array([0.5]))
    curve = {"test_accuracy": [0.5]}
    labels = np.arange(len(NASTY))
    images = np.zeros((len(NASTY), 4, 4, 1), np.uint8)
    for figure in (
        draw_scores(np.linspace(-1, 1, len(NASTY)), labels, zeros, NASTY, method=NASTY[0]),
        plots.draw_contact_sheet(images, labels, np.linspace(-1, 1, len(NASTY)), labels, NASTY, None, NASTY[0], NASTY),
        draw_comparison([Stage(name, [lines], end, {"color": RED}) for name in NASTY], True, NASTY[0]),
        draw_all_comparisons([Pruning(name, end, None, None, {"color": RED}) for name in NASTY]),
        plots.draw_audit(audit_of(dict.fromkeys(NASTY, method), [0.1]) | {"target": "$\\frac{$"}),
        plots.draw_sweep({"ratios": [0.5], "methods": dict.fromkeys(NASTY, curve), "stage1": {"test_accuracy": 0.5}}),
        draw_node_view(node_view(4) | {"algorithm": "$\\frac{$"}, build_topology("ring", 4).to_json()),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # letters that the font lacks
            FigureCanvasAgg(figure).draw()
        for text in figure.findobj(Text):
            if "10^" not in text.get_text():  # a scale of ours
                shown(text)


def test_many_workers_get_a_heat_map_and_no_table_gets_the_plain_graph():
    topology, view = build_topology("exponential", 64).to_json(), node_view(64, bad=[5, 9])
    figure = draw_node_view(view, topology)
    assert_legible(figure)
    bars, heat, _ = figure.axes
    np.testing.assert_array_equal(heat.images[0].get_array(), view["table"])
    low, high = heat.images[0].get_clim()
    assert low == -high < 0, "white is zero"
    assert sorted(heat.lines[0].get_ydata()) == [5.5, 9.5] and list(bars.lines[0].get_ydata()) == [0, 1]
    graph = draw_node_view(view | {"table": None}, topology).axes[1]
    assert not graph.images and "topology" in graph.get_title(loc="left") and len(graph.lines) == 64


def test_plot_node_view_reads_its_records(run_dir, tmp_path):
    path = tmp_path / "node_view_dice.json"
    write_json(path, node_view(8, bad=[3]))
    assert imread(plots.plot_node_view(run_dir / "stage1", path, tmp_path / "n.png")).shape[0] > 600
    write_json(path, {"algorithm": "dice"})
    with pytest.raises(UsageError, match="it has no 'worker_influence'"):
        plots.plot_node_view(run_dir / "stage1", path, tmp_path / "n.png")
    write_json(path, node_view(9))
    with pytest.raises(UsageError, match="9 workers.*8"):
        plots.plot_node_view(run_dir / "stage1", path, tmp_path / "n.png")
