"""The pictures of a run: drawn from synthetic records, checked on the figure objects and the files."""

from __future__ import annotations

import itertools
import shutil
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from scipy import stats

from utils.records import (
    MetricsLog,
    Run,
    write_confusion,
    write_json,
    write_labels,
    write_partition,
    write_predictions,
)
from utils.topology import build_topology
from visualization import plot_utils as plots
from visualization.checked import load_lines, load_summary, was_pruned
from visualization.class_plots import count_classes, draw_confusion
from visualization.finals import Final, load_final
from visualization.measures import LOSS
from visualization.several_runs import draw_compare
from visualization.style import plain, style

CLASSES = 10


def metrics_line(round: int, workers: int, rng: np.random.Generator, per_round: float = 1.0) -> dict:
    """A line as the trainer writes it: learning curves with worker-to-worker spread."""
    progress = 1 - np.exp(-round / 12)
    accuracy_N = np.clip(0.1 + 0.85 * progress + 0.06 * rng.standard_normal(workers), 0, 1)
    loss_N = 2.3 - 2.0 * progress + 0.15 * np.abs(rng.standard_normal(workers))
    return {
        "round": round,
        "epoch": round / 6,
        "lr": 0.1,
        "train_loss": 2.2 - 2.1 * progress,
        "val_loss": loss_N.mean(),
        "val_accuracy": accuracy_N.mean(),
        "worker_val_loss": loss_N.tolist(),
        "worker_val_accuracy": accuracy_N.tolist(),
        "consensus_val_loss": 2.25 - 2.05 * progress,
        "consensus_val_accuracy": 0.1 + 0.87 * progress,
        "consensus_distance": (3 * np.exp(-round / 10) + 0.02) if workers > 1 else 0.0,
        "seconds": 0.1 * round,
        "virtual_seconds": per_round * round,
        "bytes": 2_000_000 * workers * round,
    }


def make_run(path: Path, workers: int, mode: str = "ring", rounds: int = 40, seed: int = 0, pace: float = 1.0):
    """A complete synthetic stage directory."""
    rng = np.random.default_rng(seed)
    log = MetricsLog(path / "metrics.jsonl")
    for round in range(0, rounds, 2):
        log.append(metrics_line(round, workers, rng, pace))
    labels_n = rng.integers(0, CLASSES, 24 * max(workers, 50))
    owner_n = np.array([rng.choice(workers, p=p) for p in rng.dirichlet([0.4] * workers, CLASSES)[labels_n]])
    write_partition(path, [np.flatnonzero(owner_n == k) for k in range(workers)])
    write_labels(path, labels_n, [f"class {c}" for c in range(CLASSES)])
    write_json(path / "topology.json", build_topology(mode, workers).to_json())
    write_json(path / "summary.json", {"worker_test_accuracy": rng.uniform(0.85, 0.97, workers)})
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("results")
    modes = {1: "ring", 8: "exponential", 64: "random", 1024: "grid"}
    return {n: make_run(root / f"{mode}{n}" / "stage1", n, mode, rounds=16) for n, mode in modes.items()}


NONE = np.array([np.nan])


def compare(runs: dict, test_accuracy: float = np.nan) -> Figure:
    """Runs on one sheet, each with the same figure at the end."""
    return draw_compare(runs, dict.fromkeys(runs, Final(np.array([test_accuracy]))))


def figures_of(path: Path) -> dict[str, Figure]:
    run = Run(path)
    labels_n, names = run.labels
    return {
        "training": plots.draw_training(run.metrics),
        "consensus_distance": plots.draw_consensus_distance(run.metrics),
        "class_mix": plots.draw_class_mix(count_classes(run.partition, labels_n, CLASSES), names),
        "topology": plots.draw_topology(run.topology, *plots.worker_figures(run.metrics, load_summary(path))),
    }


def assert_legible(figure: Figure) -> None:
    """Every text drawn lies inside the sheet, is 9 points or more, and overlaps no other upright text."""
    drawn: list[Text] = []
    draw = Text.draw

    def record(text: Text, renderer) -> None:
        drawn.append(text)
        draw(text, renderer)

    with style(), mock.patch.object(Text, "draw", record):
        FigureCanvasAgg(figure).draw()
    drawn = [text for text in drawn if text.get_visible() and text.get_text().strip()]
    sheet = figure.bbox.padded(1)
    for text in drawn:
        box = text.get_window_extent()
        assert text.get_fontsize() >= 9, text
        assert sheet.contains(box.x0, box.y0) and sheet.contains(box.x1, box.y1), f"{text} is clipped"
    upright = [text for text in dict.fromkeys(drawn) if text.get_rotation() in (0, 90)]
    boxes = [text.get_window_extent().shrunk(0.9, 0.8) for text in upright]
    for (a, box_a), (b, box_b) in itertools.combinations(zip(upright, boxes, strict=True), 2):
        assert not box_a.overlaps(box_b), f"{a} overlaps {b}"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 8, 64, 1024])
def test_pictures_are_legible_and_labelled(runs, workers):
    for name, figure in figures_of(runs[workers]).items():
        assert_legible(figure)
        for axes in figure.axes:
            if axes.axison and axes.get_label() != "<colorbar>":
                assert axes.get_title(loc="left") and axes.get_xlabel(), name


def test_plot_run_writes_four_pictures(runs):
    paths = plots.plot_run(runs[8])
    assert {path.name for path in paths} == {
        "training.png", "consensus_distance.png", "class_mix.png", "topology.png",
    }  # fmt: skip
    for path in paths:
        assert path.parent == runs[8] / "plots"
        pixels = imread(path)
        assert min(pixels.shape[:2]) >= 400 and pixels[..., :3].std() > 0.02
    assert not list((runs[8] / "plots").glob(".*")), "temporary files stay behind"


def test_run_without_optional_records_still_gets_its_curves(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").append(metrics_line(0, 4, np.random.default_rng(0)))
    assert [path.stem for path in plots.plot_run(tmp_path)] == ["training", "consensus_distance"]


def test_drawing_leaves_the_users_matplotlib_alone(runs):
    import matplotlib
    from matplotlib import pyplot

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    figures_of(runs[8])
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend and pyplot.get_fignums() == []


def test_training_shows_each_worker_the_mean_and_the_consensus(runs):
    metrics = Run(runs[8]).metrics
    loss, accuracy = plots.draw_training(metrics).axes
    for axes, what, curves in (loss, "loss", 3), (accuracy, "accuracy", 2):
        (workers,) = axes.collections
        recorded_NT = np.array([row[f"worker_val_{what}"] for row in metrics]).T
        np.testing.assert_array_equal([segment[:, 1] for segment in workers.get_segments()], recorded_NT)
        assert len(axes.lines) == curves
        by_label = {curve.get_label(): curve for curve in axes.lines}
        for label, key in (("mean of workers", f"val_{what}"), ("consensus model", f"consensus_val_{what}")):
            curve = by_label[f"validation, {label}"]
            np.testing.assert_array_equal(curve.get_xdata(), [row["round"] for row in metrics])
            np.testing.assert_array_equal(curve.get_ydata(), [row[key] for row in metrics])
            assert curve.get_linewidth() > 2 * workers.get_linewidth()[0]
    assert loss.get_ylim()[0] == 0 and "nats" in loss.get_ylabel()


@pytest.mark.slow
def test_missing_values_are_left_out_and_divergence_gets_a_log_scale():
    lines = [metrics_line(round, 3, np.random.default_rng(0)) for round in range(6)]
    for key in ("val_loss", "worker_val_loss", "consensus_val_loss", "consensus_val_accuracy"):
        lines[2][key] = None
    lines[3]["worker_val_accuracy"][1] = None
    lines[5]["val_loss"] = 1e4
    loss, accuracy = plots.draw_training(lines).axes
    by_label = {curve.get_label(): curve for curve in loss.lines}
    assert list(by_label["validation, mean of workers"].get_xdata()) == [0, 1, 3, 4, 5]
    assert loss.get_yscale() == "log"
    empty = [{key: None for key in line} | {"round": k} for k, line in enumerate(lines)]
    for nothing in (empty, []):
        figures = [plots.draw_training(nothing), plots.draw_consensus_distance(nothing)]
        figures += [compare({"a": [nothing]}), plots.draw_seeds([nothing, nothing])]
        for figure in figures:
            FigureCanvasAgg(figure).draw()


def test_consensus_distance_is_logarithmic_unless_the_workers_agree():
    lines = [{"round": k, "consensus_distance": d} for k, d in enumerate([0.0, 0.5, 0.25, None])]
    (axes,) = plots.draw_consensus_distance(lines).axes
    assert axes.get_yscale() == "log" and list(axes.lines[0].get_ydata()) == [0.5, 0.25]
    lines[0]["consensus_distance"] = 1e-7  # the rounding of a common start would squash the curve
    (axes,) = plots.draw_consensus_distance(lines).axes
    assert list(axes.lines[0].get_xdata()) == [1, 2]
    lines[0]["consensus_distance"] = 0.0
    (axes,) = plots.draw_consensus_distance(lines[:1]).axes
    assert axes.get_yscale() == "linear" and list(axes.lines[0].get_ydata()) == [0.0]


def test_class_mix_counts_and_draws_every_shard():
    labels_n = np.array([0, 2, 2, 1, 0, 2])
    shards = [np.array([0, 4, 1]), np.array([], dtype=int), np.array([5, 2, 3])]
    counts_NC = count_classes(shards, labels_n, 3)
    assert counts_NC.tolist() == [[2, 0, 1], [0, 0, 0], [0, 1, 2]]
    heat, bars, _ = plots.draw_class_mix(counts_NC, ["ant", "bee", "cat"]).axes
    drawn = heat.collections[0].get_array().reshape(3, 3)
    np.testing.assert_allclose(drawn, 100 * np.array([[2, 0, 1], [0, 0, 0], [0, 1, 2]]) / 3)
    assert [bar.get_width() for bar in bars.patches] == [3, 0, 3]
    assert [tick.get_text() for tick in heat.get_xticklabels()] == ["ant", "bee", "cat"]


def test_class_mix_of_many_classes_and_long_names_stays_legible():
    counts_NC = np.random.default_rng(0).multinomial(300, np.ones(200) / 200, size=100)
    figure = plots.draw_class_mix(counts_NC, [f"n{k:08d} or so" * 2 for k in range(200)])
    assert_legible(figure)
    assert len(figure.axes[0].get_xticks()) <= 25 and "sorted" in figure.axes[0].get_ylabel()


def test_worker_figures_prefer_the_test_and_falls_back_to_the_last_evaluation(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for round, values in enumerate([[0.1, 0.2], [0.3, 0.4], None]):
        log.append({"round": round, "worker_val_accuracy": values})
    lines = load_lines(tmp_path)
    accuracy_N, what = plots.worker_figures(lines, {})
    assert accuracy_N.tolist() == [0.3, 0.4] and what == "validation accuracy"
    write_json(tmp_path / "summary.json", {"worker_test_accuracy": [0.5, float("nan")]})
    accuracy_N, what = plots.worker_figures(lines, load_summary(tmp_path))
    assert accuracy_N[0] == 0.5 and np.isnan(accuracy_N[1]) and what == "test accuracy"


def test_a_sheet_of_losses_shows_losses_and_a_pruned_run_says_what_chose_its_samples(runs, tmp_path):
    lines = [[metrics_line(r, 4, np.random.default_rng(0)) for r in range(0, 8, 2)]]
    final, epochs, *_ = draw_compare({"a": lines}, {"a": Final(np.array([0.321]))}, LOSS, chosen=True).axes
    assert final.get_title(loc="left") == "Test loss" and final.texts[0].get_text() == "0.321"
    np.testing.assert_array_equal(epochs.lines[0].get_ydata(), [row["consensus_val_loss"] for row in lines[0]])
    assert "its samples chose what is kept" in epochs.get_ylabel()
    assert not was_pruned(runs[8])
    for algorithm, chosen in ("if", True), ("random", False), ("noprune", False):
        write_json(tmp_path / "config.json", {"pruning": {"algorithm": algorithm}})
        assert was_pruned(tmp_path) == chosen


def test_the_test_accuracy_of_one_run_has_the_interval_of_its_predictions(tmp_path):
    write_json(tmp_path / "summary.json", {"test_accuracy": 0.9, "test_loss": 0.3})
    assert load_final([tmp_path]).ends is None, "no predictions"
    write_predictions(tmp_path, np.zeros(200, int), np.arange(200) < 20)
    low, high = stats.binomtest(180, 200).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(load_final([tmp_path]).ends, (low, high))
    assert load_final([tmp_path], LOSS) == Final(np.array([0.3]), None)
    assert load_final([tmp_path / "unfinished"]).ends is None


@pytest.mark.parametrize("low, high", [(0.003, 0.9), (1e-4, 80.0), (0.3, 0.6), (0.5, 40.0)])
def test_logarithmic_ticks_are_plain_numbers(low, high):
    lines = [{"round": r, "epoch": r, "val_loss": y} for r, y in enumerate((low, high, low))]
    lines += [{"round": 9, "epoch": 9, "train_loss": 21 * high}]
    loss = plots.draw_training(lines).axes[0]
    distance = plots.draw_consensus_distance([{"round": r, "consensus_distance": y} for r, y in ((0, high), (1, low))])
    for axes in loss, distance.axes[0]:
        assert axes.get_yscale() == "log"
        FigureCanvasAgg(axes.figure).draw()
        labels = [text.get_text() for text in axes.get_yticklabels() + axes.get_yticklabels(minor=True)]
        labels = [label for label in labels if label]
        assert len(labels) >= 2 and all(float(label) > 0 for label in labels)


def test_plot_run_draws_the_confusion_where_it_is_recorded(runs, tmp_path):
    shutil.copytree(runs[8], tmp_path / "stage1")
    write_confusion(tmp_path / "stage1", np.diag(np.full(CLASSES, 9)), [str(c) for c in range(CLASSES)])
    paths = plots.plot_run(tmp_path / "stage1")
    assert paths[-1].name == "confusion.png" and imread(paths[-1]).shape[0] > 600


# ---- names that users give ----------------------------------------------------------------------


NASTY = ["$\\frac{$", "$", "$a$", "a_b^c", "\\$", "_hidden", "new\nline\ttab", "\ufffd\ufffd", "half \ud800 a pair",
         "😀🐱", "שלום", "مرحبا", "\u202ereversed", "猫と犬", "\x00\x07", "%s {}", "a long name " * 40, ""]  # fmt: skip


def shown(text: Text) -> str:
    """What is drawn of a text; fails where matplotlib takes it for a formula."""
    words, formula = text._preprocess_math(text.get_text())
    assert not formula, words
    return words


@pytest.mark.parametrize("name", NASTY)
def test_any_name_is_drawn_as_it_is(name):
    figure = Figure()
    text = figure.text(0, 0.5, plain(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that the font lacks
        FigureCanvasAgg(figure).draw()
    drawn = shown(text).strip(" \u2068\u2069")
    assert len(drawn) <= 14 and "\n" not in drawn
    if name.isascii() and name.isprintable() and 0 < len(name) <= 14:
        assert drawn == name


def test_what_is_drawn_of_names():
    names = ["half \ud800 a pair", "猫", "new\nline", "\u202eab", "_x", "n01443537 goldfish, Carassius auratus"]
    expected = ["half \ufffd a pair", "U+732B", "new line", "ab", " _x", "n01443537 …tus"]
    assert [plain(name) for name in names] == expected
    assert plain("x" * 100, 60) == "x" * 44 + "…" + "x" * 15


def test_every_picture_takes_any_name():
    counts_CC = np.random.default_rng(0).integers(0, 40, (len(NASTY), len(NASTY)))
    lines = [metrics_line(round, 4, np.random.default_rng(0)) for round in range(4)]
    figures = [
        plots.draw_class_mix(counts_CC, NASTY),
        draw_confusion(counts_CC, NASTY),
        draw_confusion(counts_CC[:10, :10], NASTY[:10]),
        compare({name: [lines] for name in NASTY}, 0.5),
        plots.draw_topology(build_topology("ring", 3).to_json() | {"mode": "$\\frac{$"}),
    ]
    for figure in figures:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_legible(figure)
    assert len(figures[3].legends[0].get_texts()) == len(set(NASTY)), "none is left out of the legend"


# ---- small and odd runs -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_smallest_runs_are_drawn(tmp_path, workers, rounds):
    path = make_run(tmp_path / "stage1", workers, rounds=2 * rounds)
    write_labels(path, np.zeros(24 * 300, int), ["the only class"])
    write_confusion(path, [[4]], ["the only class"])
    assert len(plots.plot_run(path)) == 5
    assert plots.plot_seeds([path], tmp_path / "seeds.png").exists()
    assert plots.plot_compare([path], tmp_path / "compare.png").exists()


@pytest.mark.parametrize("workers", [1, 2, 40, 1024])
def test_fine_tuning_is_legible_and_survives_unknown_accuracies(workers):
    rng = np.random.default_rng(0)
    before_N, after_N = rng.uniform(0.2, 0.6, (2, workers)) + [[0], [0.3]]
    record = {"epochs": 2, "head_only": False, "before": before_N, "after": after_N}
    figure = plots.draw_finetune(record)
    assert_legible(figure)
    assert f"mean {before_N.mean():.1%} before, {after_N.mean():.1%} after" in figure.axes[0].get_title(loc="left")
    after_N[0] = np.nan
    assert "nan" not in plots.draw_finetune(record).axes[0].get_title(loc="left")
