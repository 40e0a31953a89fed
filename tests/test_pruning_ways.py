"""Pruning in steps, and by folds of the validation set, from the command line to its files."""

from __future__ import annotations

import shutil

import command
import numpy as np
import pytest
from command import arguments, prune, refused, summary

import main_pruned
from utils.records import read_partition
from utils.scores import read_scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished stage 1."""
    folder = tmp_path_factory.mktemp("ways")
    assert main_pruned.main(arguments(folder, "--stage", "1")) == 0
    return folder / "run"


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path


# ---- pruning in steps -----------------------------------------------------------------------------------------


def test_pruning_in_steps_is_scoring_what_is_left_again(copy):
    """By hand: half of the way by the first scores, then by those of a run on what is left."""
    folder = prune(copy, "--pruning_algorithm", "delete", "--train_ratio", "0.49", "--prune_steps", "2")
    kept = [int(line) for line in (folder / "stage2_delete_0.49_steps2/kept_samples.txt").read_text().split("\n")[1:-1]]
    prune(copy, "--pruning_algorithm", "delete", "--train_ratio", "0.7")
    first, second = folder / "stage2_delete_0.7", copy / "by_hand"
    words = ("--config", str(first / "config.json"), "--results_dir", str(second), "--run_name", "run")
    assert main_pruned.main(arguments(second, "--stage", "1", *words)) == 0
    prune(second, *words, "--pruning_algorithm", "delete")
    record = read_scores(second / "run/influence/delete.zarr")
    expected = []
    for worker, shard in enumerate(read_partition(folder / "stage1")):
        mine = record["worker"] == worker
        best = np.argsort(-record["scores"][mine], kind="stable")[: round(0.49 * len(shard))]
        expected += record["sample_id"][mine][best].tolist()
    assert sorted(expected) == kept
    comparison = command.load(folder / "comparison_delete_0.49_steps2.json")
    assert comparison["steps"] == 2 and comparison["runs"]["control"] == ["stage2_random_0.49"]


def test_steps_that_are_done_are_not_done_again(copy, monkeypatch):
    words = ("--pruning_algorithm", "delete", "--train_ratio", "0.5", "--prune_steps", "3")
    folder = prune(copy, *words)
    assert len(list((folder / "influence").glob("delete*.zarr"))) == 3
    monkeypatch.setattr("training.scores.score", None)
    shutil.rmtree(folder / "stage2_delete_0.5_steps3")
    prune(copy, *words)
    assert summary(folder / "stage2_delete_0.5_steps3")["rounds"] == summary(folder / "stage1")["rounds"]


# ---- scores in units of their own noise -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_folds(tmp_path_factory):
    """A pruning by three parts of the validation set."""
    words = ("--pruning_algorithm", "delete", "--train_ratio", "0.8", "--val_folds", "3")
    return prune(tmp_path_factory.mktemp("folds"), *words)


def scores_by_fold(folder) -> np.ndarray:
    """[3, m], of the fixture."""
    records = [read_scores(path) for path in (folder / "influence").glob("delete-*.zarr")]
    found = {record["settings"]["fold"][0]: record["scores"] for record in records}
    return np.stack([found[f] for f in range(3)])


def test_folds_are_parts_of_the_validation_set(by_folds):
    """The mean over parts of equal size is the score by all of it (143 samples: 48, 48, 47)."""
    by_fold = scores_by_fold(by_folds)
    assert not np.allclose(by_fold[0], by_fold[1])
    folder = prune(by_folds.parent, "--pruning_algorithm", "delete", "--train_ratio", "0.8")
    whole = read_scores(folder / "influence/delete.zarr")["scores"]
    weights = np.array([48, 48, 47]) / 143
    np.testing.assert_allclose(weights @ by_fold, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_what_the_folds_agree_on_is_pruned(by_folds):
    by_fold = scores_by_fold(by_folds)
    t = by_fold.mean(0) / (by_fold.std(0, ddof=1) / 3**0.5)
    stage2 = by_folds / "stage2_delete_0.8_folds3"
    kept = {int(line) for line in (stage2 / "kept_samples.txt").read_text().split("\n")[1:-1]}
    record = read_scores(next((by_folds / "influence").glob("delete-*.zarr")))
    for worker in range(8):
        mine = record["worker"] == worker
        best = np.argsort(-t[mine], kind="stable")[: round(0.8 * mine.sum())]
        assert set(record["sample_id"][mine][best].tolist()) == kept & set(record["sample_id"][mine].tolist())
    assert command.load(by_folds / "comparison_delete_0.8_folds3.json")["folds"] == 3


def test_more_folds_than_pairs_of_validation_samples_are_refused(copy, capsys):
    words = ("--pruning_algorithm", "delete", "--val_folds", "100")
    assert "too few" in refused(capsys, main_pruned.main(arguments(copy, *words)))
