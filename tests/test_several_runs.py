"""Several runs, or the seeds of one, on one sheet."""

from __future__ import annotations

import numpy as np
import pytest

from tests.test_plots import NONE, assert_legible, compare, metrics_line
from utils.records import UsageError
from visualization import plot_utils as plots
from visualization.finals import Final
from visualization.several_runs import draw_compare, run_names


def test_comparison_has_one_colour_a_run_and_only_the_panels_that_were_logged():
    rng = np.random.default_rng(0)
    several = {f"run{k}": [metrics_line(r, 4, rng, 1 + k) for r in range(0, 20, 2)] for k in range(3)}
    for row in several["run1"]:
        del row["bytes"]
    figure = compare({name: [lines] for name, lines in several.items()}, 0.9)
    assert_legible(figure)
    final, *panels = figure.axes
    assert [axes.get_xlabel() for axes in panels] == ["epoch", "simulated time (s)", "bytes sent"]
    assert final.get_xlabel().startswith("test accuracy at the end")
    assert [tick.get_text() for tick in final.get_yticklabels()] == list(several)
    for k, name in enumerate(several):
        curves = [axes.lines[k] for axes in panels]
        assert {curve.get_label() for curve in curves} == {name}
        assert {curve.get_color() for curve in curves} == {final.lines[k].get_color()}
    assert panels[2].lines[0].get_xdata()[-1] == several["run0"][-1]["bytes"], "cumulative already"
    assert panels[0].lines[0].get_xdata()[-1] == several["run0"][-1]["epoch"]
    assert "not logged: 1 of 3 runs" in panels[2].texts[0].get_text()
    assert len({axes_line.get_color() for axes_line in panels[0].lines}) == 3
    for row in several["run2"]:  # no consensus model in one of them: all are shown by the workers' mean
        row |= {"consensus_val_accuracy": None, "bytes": None, "virtual_seconds": None}
    for row in several["run0"] + several["run1"]:
        row |= {"bytes": None, "virtual_seconds": None}
    _, axes = compare({name: [lines] for name, lines in several.items()}).axes
    assert "mean of workers" in axes.get_ylabel()
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [row["val_accuracy"] for row in several["run0"]])


def test_a_run_of_several_seeds_is_a_mean_with_its_deviation_on_a_sheet_of_several():
    seeds = [[metrics_line(r, 4, np.random.default_rng(s), 1 + s) for r in range(0, 20, 2)] for s in range(3)]
    figure = draw_compare({"a": seeds, "b": seeds[:1]}, {"a": Final(np.array([0.8, 0.9, 0.7])), "b": Final(NONE)})
    assert_legible(figure)
    final, epochs, seconds, _ = figure.axes
    np.testing.assert_allclose(seconds.lines[0].get_xdata(), 2 * np.arange(0, 20, 2), err_msg="the mean pace is 2")
    of_seeds_ST = np.array([[row["consensus_val_accuracy"] for row in lines] for lines in seeds])
    np.testing.assert_allclose(epochs.lines[0].get_ydata(), of_seeds_ST.mean(0))
    assert len(epochs.collections) == 1, "a single run has no deviation"
    (bar,) = final.collections[0].get_segments()
    np.testing.assert_allclose(bar[:, 0], [0.7, 0.9])
    assert [text.get_text() for text in final.texts] == ["80.00%", "no figure"]
    assert final.get_xlabel().endswith("bar: ± standard deviation over 3 seeds")


def test_runs_that_send_little_keep_their_place_on_the_axis_of_bytes():
    def run(sent):
        return [[{"round": r, "epoch": r, "bytes": sent * r, "consensus_val_accuracy": 0.1 * r} for r in range(6)]]

    figure = compare({"local": run(0), "cheap": run(10_000), "dear": run(50_000_000)})
    assert_legible(figure)
    axes = figure.axes[-1]
    x = axes.transData.transform([(0, 0), (10_000, 0), (50_000, 0), (250_000_000, 0)])[:, 0]
    assert (np.diff((x - x[0]) / (x[-1] - x[0])) > 0.08).all()
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels[:2] == ["0 B", "10 kB"] and len(labels) <= 6


def test_seeds_show_mean_and_sample_deviation_over_common_rounds():
    curves = {0: [1.0, 0.8, 0.5], 1: [2.0, 1.0, 0.7], 2: [3.0, 1.5]}  # the third seed stopped early
    several = [[{"round": r, "epoch": r, "consensus_val_loss": y, "val_accuracy": y / 4} for r, y in enumerate(ys)]
               for ys in curves.values()]  # fmt: skip
    loss, accuracy = plots.draw_seeds(several).axes
    mean = loss.lines[-1]
    np.testing.assert_allclose(mean.get_xdata(), [0, 1])
    np.testing.assert_allclose(mean.get_ydata(), [2.0, 1.1])
    band = loss.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[band[:, 0] == 0, 1].min(), band[band[:, 0] == 0, 1].max()], [1.0, 3.0])
    assert len(loss.lines) == 4 and "mean of workers" in accuracy.get_ylabel()
    assert loss.get_xlabel() == "epoch"
    figure = plots.draw_seeds(several, Final(np.array([0.90, 0.92, 0.94])))
    assert figure.get_suptitle() == "Test accuracy at the end: 92.00% ± 2.00%"
    assert not plots.draw_seeds(several[:1]).axes[0].collections, "one seed has no deviation"


def test_names_are_the_parts_of_the_paths_that_differ(tmp_path):
    assert run_names([tmp_path / "a/stage1", tmp_path / "b/stage1"]) == ["a", "b"]
    assert run_names([tmp_path / "a/stage1", tmp_path / "a/stage2_if_0.8"]) == [
        "stage1",
        "stage2_if_0.8",
    ]
    assert len(set(run_names([tmp_path / "x", tmp_path / "x/x", tmp_path / "x/x/x"]))) == 3
    with pytest.raises(UsageError, match="twice"):
        run_names([tmp_path, tmp_path / "."])
