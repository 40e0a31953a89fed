"""Pruning in steps, by folds of the validation set, and to a share that they choose: from the command line to files."""

from __future__ import annotations

import shutil

import command
import numpy as np
import pytest
import torch
from command import arguments, prune, refused, summary

import main_pruned
from training.pruning import open_stage1
from training.retrain import masks_without, trained
from training.scores import folds_of, keep_best, scores_for
from utils.parser import parse
from utils.pruning_args import PruningConfig
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


# ---- a share that held-out parts choose ---------------------------------------------------------------------------

CHOOSE = ("--pruning_algorithm", "delete", "--choose_ratio", "0.9", "0.5")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A choice between two shares, and all."""
    return prune(tmp_path_factory.mktemp("chosen"), *CHOOSE)


def test_parts_judge_what_the_others_propose(chosen):
    """One figure by hand: without what folds 1 to 4 score lowest, the loss on fold 0, minus that of the whole run."""
    stage1 = open_stage1(parse(PruningConfig, arguments(chosen.parent, *CHOOSE), "", varied=True))
    part = folds_of(stage1.run, 0, 5)
    job, worker_n = stage1.job, stage1.run.worker_of_n.cpu()
    where = stage1.folder / "influence", stage1.final_state
    scores = [scores_for("delete", stage1.run, stage1.config, *where, fold=(f, 5))[0] for f in range(1, 5)]
    off = job.train_ids[~torch.isin(job.train_ids, keep_best(torch.stack(scores).mean(0), worker_n, 0.5))]
    losses = []
    for removed in ([], off.tolist()):
        fleet = trained(job, stage1.run.rounds, masks_without(job.sample_weights_n, [removed]))
        losses.append(fleet.evaluate(job.samples, part)["loss"].mean().item())
    record = command.load(chosen / "comparison.json")["shares"]
    assert [row["share"] for row in record["shares"]] == [0.9, 0.5]
    assert record["shares"][1]["changes"][0] == pytest.approx(losses[1] - losses[0], rel=1e-4)


def judged(*changes: list[float]) -> np.ndarray:
    """Losses by part of the whole run, 0, and of what each part judges of each share; the others do not count."""
    losses = np.full((len(changes), 5, 5), -100.0)
    losses[:, range(5), range(5)] = changes
    return np.concatenate([np.zeros((1, 5)), losses.reshape(-1, 5)])


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ([[-1, -1.1, -0.9, -1, -1], [-2, -2.1, -1.9, -2, -2]], 0.5),  # both for sure: the better
        ([[-1, -1.1, -0.9, -1, -1], [-9, 6, -9, 6, -9]], 0.9),  # better on average, but who knows
        ([[1, 1.1, 0.9, 1, 1], [-1, 1, -1, 1, -1]], 1.0),
        ([[float("nan")] * 5, [float("inf")] * 5], 1.0),  # retrainings that diverge
    ],
)
def test_no_share_is_chosen_but_for_sure(chosen, monkeypatch, capsys, changes, share):
    monkeypatch.setattr("training.shares.losses_by_part", lambda *_: judged(*changes))
    for path in chosen.glob("comparison*.json"):
        path.unlink()  # of other choices
    folder = prune(chosen.parent, *CHOOSE, "--plots")
    record = command.load(folder / "comparison.json")
    assert record["shares"]["chosen"] == record["ratio"] == share
    replayed = command.load(folder / record["runs"]["stage2"][0] / "config.json")["config"]
    assert replayed["choose_ratio"] == [] and replayed["train_ratio"] == share
    assert f"share to keep: {'all' if share == 1 else share}" in capsys.readouterr().err
    page = (folder / "report.html").read_text()
    assert "Shares to keep by delete, judged by 5 parts" in page and ("all are kept" in page) == (share == 1)


def test_what_was_judged_is_not_judged_again(chosen, monkeypatch):
    monkeypatch.setattr("training.shares.trained", None)
    prune(chosen.parent, *CHOOSE)


def test_seeds_may_choose_differently(tmp_path, monkeypatch, capsys):
    """What keeps all is its own control, and a real comparison of the mean share is not overwritten."""

    def choice(stage1, removed, F):
        by_half = -2.0 if stage1.config.seed == 0 else 1.0
        return judged(np.ones(F), by_half + np.arange(F) / 100)

    monkeypatch.setattr("training.shares.losses_by_part", choice)
    folder = prune(tmp_path, *CHOOSE, "--seeds", "2", "--plots")
    record = command.load(folder / "comparison.json")
    assert record["ratios"] == [0.5, 1] and record["ratio"] == 0.75
    assert record == command.load(folder / "comparison_delete_chosen.json")
    assert record["runs"]["control"] == ["seed-0/stage2_random_0.5", "seed-1/stage1"]
    assert record["over_random"] is not None and (folder / "report.html").exists()


def test_a_share_that_is_given_wins_over_one_that_a_replay_chooses(chosen, capsys):
    words = ("--config", str(chosen / "stage1/config.json"), "--results_dir", str(chosen.parent), "--run_name", "run",
             "--pruning_algorithm", "delete", "--train_ratio", "0.8", "--quiet", "--no-plots")  # fmt: skip
    assert main_pruned.main(list(words)) == 0
    assert command.load(chosen / "comparison.json")["ratio"] == 0.8
    assert "no effect" not in capsys.readouterr().err


@pytest.mark.parametrize("method", ["random", "noprune"])
def test_what_has_no_scores_does_not_choose(copy, method):
    folder = prune(copy, "--pruning_algorithm", method, "--choose_ratio", "0.001", "--train_ratio", "0.5")
    assert command.load(folder / "comparison.json")["ratio"] == {"random": 0.5, "noprune": 1}[method]


def test_a_share_that_leaves_nothing_is_refused_by_its_flag(copy, capsys):
    words = (*CHOOSE[:2], "--choose_ratio", "0.9", "0.001")
    assert "--choose_ratio 0.001 would leave" in refused(capsys, main_pruned.main(arguments(copy, *words)))


def test_too_few_judges_are_refused(copy, capsys):
    assert "too few" in refused(capsys, main_pruned.main(arguments(copy, *CHOOSE, "--val_folds", "100")))
