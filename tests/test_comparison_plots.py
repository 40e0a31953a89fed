"""The pictures of what pruning was worth: one each, all on one sheet, and over seeds; from records."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from tests.test_plots import assert_legible, make_run
from utils.records import UsageError, read_metrics, write_json, write_predictions
from visualization import plot_utils
from visualization.checked import load_comparison
from visualization.comparison_plots import (
    Stage,
    comparisons_of,
    draw_all_comparisons,
    draw_comparison,
    plot_all_comparisons,
    plot_comparison,
    prunings,
)
from visualization.finals import Final, load_final, wilson_interval
from visualization.style import BLUE, GREY, RED

SAMPLES = 400  # of the test set


def make_stage(path, right: int, seed: int = 0):
    """A finished stage whose model is right on so many test samples."""
    make_run(path, 4, rounds=12, seed=seed)
    write_json(path / "summary.json", {"test_accuracy": right / SAMPLES, "test_loss": 0.3})
    write_predictions(path, np.zeros(SAMPLES, int), np.arange(SAMPLES) >= right)
    return path


def record(algorithm="if", ratio=0.8, control="stage2_random_0.8", **changes):
    """A comparison as training/comparison.py writes it; accuracies are those of ``folder``."""
    return {
        "algorithm": algorithm, "ratio": ratio, "seed": 0,
        "runs": {"stage1": ["stage1"], "stage2": [f"stage2_{algorithm}_{ratio:g}"], "control": control and [control]},
        "stage1": {"test_accuracy": 0.9}, "stage2": {"test_accuracy": 0.925},
        "control": {"test_accuracy": 0.875} if control else None,
        "over_stage1": [0.025, -0.01, 0.06], "over_random": [0.05, 0.01, 0.09] if control else None,
        "verdict": "if is better than random pruning of the same size (+5.0 points [-1.0, +9.0])", **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A run with three prunings, two of them of one size."""
    for k, (name, right) in enumerate({"stage1": 360, "stage2_if_0.8": 370, "stage2_random_0.8": 350}.items()):
        make_stage(tmp_path / name, right, k)
    write_json(tmp_path / "comparison_if_0.8.json", record())
    write_json(tmp_path / "comparison_cascade_0.8.json", record("cascade"))
    write_json(tmp_path / "comparison_dice_0.95.json", record("dice", 0.95, None))
    return tmp_path


def test_a_pruning_shows_test_accuracies_with_intervals_and_says_what_its_curves_are(folder):
    assert imread(plot_comparison(folder / "comparison_if_0.8.json")).shape[0] > 400
    assert (folder / "comparison_if_0.8.png").exists()
    names = {"stage1": BLUE, "stage2_random_0.8": GREY, "stage2_if_0.8": RED}
    lines = {name: read_metrics(folder / name) for name in names}
    stages = [Stage(n, [lines[n]], load_final([folder / n]), {"color": color}) for n, color in names.items()]
    figure = draw_comparison(stages, chosen=True, verdict=record()["verdict"])
    assert_legible(figure)
    final, accuracy, loss = figure.axes
    assert [text.get_text() for text in final.texts] == ["90.00%", "87.50%", "92.50%"]
    for bar, right in zip(final.collections, (360, 350, 370), strict=True):
        np.testing.assert_allclose(bar.get_segments()[0][:, 0], wilson_interval(right, SAMPLES))
    assert "95 % interval over the test samples" in final.get_xlabel()
    assert "[−1.0, +9.0]" in figure.get_suptitle()
    for axes, what in (accuracy, "accuracy"), (loss, "loss"):
        assert axes.get_title(loc="left") == f"Validation {what}\n(its samples chose what is kept)"
        thick = [curve for curve in axes.lines if curve.get_linewidth() > 2]
        for curve, rows in zip(thick, lines.values(), strict=True):
            np.testing.assert_array_equal(curve.get_xdata(), [row["epoch"] for row in rows])
            np.testing.assert_array_equal(curve.get_ydata(), [row[f"consensus_val_{what}"] for row in rows])
        assert len(axes.collections) == 2, "bands of the two stages, none of the control"
        band = axes.collections[0].get_paths()[0].vertices
        for row in lines["stage1"]:
            at_epoch = band[band[:, 0] == row["epoch"], 1]
            values_N = row[f"worker_val_{what}"]
            assert (at_epoch.min(), at_epoch.max()) == (min(values_N), max(values_N))
    assert "chose" not in draw_comparison(stages, chosen=False).axes[1].get_title(loc="left")


def test_equal_stages_are_not_blown_up():
    lines = [{"round": 0, "epoch": 0, "val_loss": 1.0, "val_accuracy": 0.5}]
    end = Final(np.array([0.9]))
    stages = [Stage(name, [lines], end, {"color": color}) for name, color in (("a", BLUE), ("b", RED))]
    figure = draw_comparison(stages)
    assert_legible(figure)
    assert np.ptp(figure.axes[0].get_xlim()) >= 0.0199


def test_all_prunings_stand_by_share_kept_with_their_control(folder):
    rows = prunings([load_comparison(path) for path in comparisons_of(folder)])
    assert [row.name for row in rows] == [
        "stage 1, all samples", "dice, 95% kept", "cascade, 80% kept", "if, 80% kept", "random, 80% kept",
    ]  # fmt: skip
    assert [row.starts_group for row in rows] == [False, True, True, False, False]
    assert rows[0].final.interval == wilson_interval(360, SAMPLES)
    assert rows[2].final.interval is None, "its stage 2 has been deleted; its record has not"
    figure = draw_all_comparisons(rows)
    assert_legible(figure)
    final, over_random, over_stage1 = figure.axes
    assert [text.get_text() for text in final.texts] == ["90.00%", "92.50%", "92.50%", "92.50%", "87.50%"]
    marks = {axes: axes.lines[1:] for axes in (over_random, over_stage1)}  # the first line of each is zero
    assert [mark.get_ydata()[0] for mark in over_random.lines[1:3]] == [2, 3]
    filled = {axes: [m.get_markerfacecolor() != "white" for m in lines if m.get_marker() != "None"]
              for axes, lines in marks.items()}  # fmt: skip
    assert filled == {over_random: [True] * 2, over_stage1: [False] * 3}
    np.testing.assert_allclose(over_random.collections[0].get_segments()[0][:, 0], [1, 9])
    assert plot_all_comparisons(folder).name == "comparison.png"


def test_a_control_that_was_asked_for_itself_stands_once(folder):
    write_json(folder / "comparison_random_0.8.json", record("random", control=None))
    rows = prunings([load_comparison(path) for path in comparisons_of(folder)])
    assert [row.name for row in rows].count("random, 80% kept") == 1


def test_over_seeds_there_is_a_mean_with_a_deviation_and_a_dot_a_seed(tmp_path):
    runs = {"stage1": [], "stage2": [], "control": []}
    for seed in range(3):
        for key, name, right in (("stage1", "stage1", 360), ("stage2", "stage2_if_0.8", 370)):
            make_stage(tmp_path / f"seed-{seed}" / name, right + 4 * seed, seed)
            runs[key].append(f"seed-{seed}/{name}")
    values = [0.925, 0.935, 0.945]
    record_over_seeds = {
        "seeds": 3, "algorithm": "if", "ratio": 0.8, "runs": {**runs, "control": None},
        "stage1_test_accuracy": {"values": [0.90, 0.91, 0.92]}, "stage2_test_accuracy": {"values": values},
        "control_test_accuracy": None, "over_stage1": [0.025, 0.025, 0.025], "over_random": None, "verdict": None,
    }  # fmt: skip
    write_json(tmp_path / "comparison_if_0.8.json", record_over_seeds)
    assert [path.name for path in plot_utils.plot_folder(tmp_path)] == ["comparison_if_0.8.png", "comparison.png"]
    figure = draw_all_comparisons(prunings([load_comparison(tmp_path / "comparison_if_0.8.json")]))
    assert_legible(figure)
    final = figure.axes[0]
    dots = final.collections[3].get_offsets()
    np.testing.assert_allclose(dots[:, 0], values)
    np.testing.assert_allclose(final.collections[2].get_segments()[0][:, 0], [0.925, 0.945])
    assert "± standard deviation over 3 seeds" in final.get_xlabel()
    assert "over seeds" in figure.axes[2].get_xlabel()
    damaged = {**record_over_seeds, "runs": {**runs, "stage2": runs["stage2"][:2], "control": None}}
    write_json(tmp_path / "comparison_if_0.8.json", damaged)
    with pytest.raises(UsageError, match="runs.stage2 is not of length 3"):
        plot_all_comparisons(tmp_path)


@pytest.mark.slow
def test_the_command_draws_them_all_again_and_passes_over_old_records(folder, capsys):
    for path in "comparison_cascade_0.8.json", "comparison_dice_0.95.json":
        (folder / path).unlink()
    old = record("delete")
    del old["runs"]
    write_json(folder / "comparison_delete_0.5.json", old)
    assert plot_utils.main([str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition("/")[2] for line in said][-2:] == ["comparison_if_0.8.png", "comparison.png"]
