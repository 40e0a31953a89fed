"""What a pruning was worth: the random control, the verdict, one seed and several."""

from __future__ import annotations

import shutil
import sys

import command
import numpy as np
import pytest
from command import arguments, prune, refused
from scipy import stats
from test_pruned import stamps

import main_pruned
from training.comparison import verdict
from utils.influence.statistics import paired_interval
from utils.records import ACCURACY, read_predictions

HALF = ("--train_ratio", "0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stage 1, ``delete`` at a half, and its control."""
    return prune(tmp_path_factory.mktemp("compared"), "--pruning_algorithm", "delete", *HALF)


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path


def test_the_interval_is_that_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.random(5000) < 0.9, rng.random(5000) < 0.87
    expected = stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval(0.95)
    mean, low, high = paired_interval(a, b)
    assert mean == pytest.approx(a.mean() - b.mean())
    np.testing.assert_allclose((low, high), expected, atol=2e-5)


@pytest.mark.parametrize(
    "interval, words",
    [((0.02, 0.01, 0.03), "is better than"), ((-0.02, -0.03, -0.01), "is worse than"),
     ((0.01, -0.01, 0.03), "cannot be told from"), ((0.01, float("nan"), float("nan")), "cannot be told from")],
)  # fmt: skip
def test_the_verdict_follows_the_interval(interval, words):
    text = verdict("dice", ACCURACY, None, interval, "of the test samples")
    assert text.startswith(f"dice {words} random pruning of the same size ({100 * interval[0]:+.1f} points")
    assert "nan" not in text


def test_the_control_is_shared_by_prunings_of_its_size(copy, capsys):
    before = stamps(copy / "run" / "stage2_random_0.5")
    capsys.readouterr()
    folder = prune(copy, "--pruning_algorithm", "if", *HALF)
    assert stamps(folder / "stage2_random_0.5") == before
    named = {method: command.load(folder / f"comparison_{method}_0.5.json") for method in ("if", "delete")}
    assert named["if"]["control"] == named["delete"]["control"]
    assert command.load(folder / "comparison.json") == named["if"]  # the last one
    assert named["if"]["verdict"] in capsys.readouterr().out


def test_the_record_is_what_the_predictions_say(folder):
    record = command.load(folder / "comparison.json")
    right = {}
    for name in ("stage1", "stage2_delete_0.5", "stage2_random_0.5"):
        targets_m, predicted_m = read_predictions(folder / name)
        right[name] = targets_m == predicted_m
        assert right[name].mean() == pytest.approx(command.load(folder / name / "summary.json")["test_accuracy"])
    over = paired_interval(right["stage2_delete_0.5"], right["stage2_random_0.5"])
    assert record["over_random"] == pytest.approx(list(over))
    assert record["runs"] == {"stage1": ["stage1"], "stage2": ["stage2_delete_0.5"], "control": ["stage2_random_0.5"]}


def test_without_control_and_without_plots(tmp_path, monkeypatch):
    for module in "plot_utils", "influence_plots":  # an import of them now fails
        monkeypatch.setitem(sys.modules, f"visualization.{module}", None)
    above = prune(tmp_path, "--pruning_algorithm", "if", *HALF, "--no-control", "--seeds", "2", "--no-plots")
    folder = above / "seed-0"
    assert not list(above.rglob("*.png")) and not (folder / "stage2_random_0.5").exists()
    record = command.load(folder / "comparison.json")
    assert record["control"] is record["over_random"] is None and "random" not in record["verdict"]


def test_a_control_of_other_settings_is_refused_before_stage_2_is_trained(copy, capsys):
    words = arguments(copy, "--pruning_algorithm", "if", *HALF, "--stage2_epochs", "1")
    line = refused(capsys, main_pruned.main(words))
    assert "stage2_random_0.5" in line and "--no-control" in line
    assert not (copy / "run" / "stage2_if_0.5").exists()
    assert main_pruned.main([*words, "--no-control"]) == 0


def test_a_run_without_predictions_is_compared_without_interval(copy):
    (copy / "run" / "stage1" / "predictions.npz").unlink()
    folder = prune(copy, "--pruning_algorithm", "if", *HALF)
    record = command.load(folder / "comparison.json")
    assert record["over_stage1"] is None and record["over_random"] is not None


@pytest.mark.slow
def test_over_seeds_it_is_the_t_interval_over_seeds(tmp_path, capsys):
    folder = prune(tmp_path, "--pruning_algorithm", "delete", *HALF, "--seeds", "3", "--plots")
    assert {"comparison.png", "comparison_delete_0.5.png"} <= {path.name for path in folder.glob("*.png")}
    record = command.load(folder / "comparison_delete_0.5.json")
    assert record == command.load(folder / "comparison.json")
    each = [command.load(folder / f"seed-{s}" / "comparison.json") for s in range(3)]
    gains = [r["stage2"]["test_accuracy"] - r["control"]["test_accuracy"] for r in each]
    low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert record["over_random"] == pytest.approx([np.mean(gains), low, high])
    assert record["control_test_accuracy"]["values"] == [r["control"]["test_accuracy"] for r in each]
    assert record["runs"]["control"] == [f"seed-{s}/stage2_random_0.5" for s in range(3)]
    assert record["verdict"] in capsys.readouterr().out and "over 3 seeds" in record["verdict"]
