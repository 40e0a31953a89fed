"""A run is bound to its data, seeds and records: replays, neighbours in a folder, damage to what was written last."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import arguments, load, prune, refused, summary, train
from test_identity import delete_some, picture_flags, pictures

import main
import main_pruned
from training import checkpoint
from utils.lock import locked

ROOT = Path(main.__file__).parent
PRUNE = ("--pruning_algorithm", "random", "--train_ratio", "0.5")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "pictures")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A run of the digits with a stage 2, which tests copy."""
    return prune(tmp_path_factory.mktemp("pruned"), *PRUNE)


@pytest.fixture
def copy(pruned, tmp_path):
    """The folder of a copy of it."""
    return shutil.copytree(pruned, tmp_path / "run")


# ---- replays ----------------------------------------------------------------------------------------------


def test_a_replay_on_data_that_changed_is_refused(tmp_path, folder, capsys):
    run = prune(tmp_path, *picture_flags(folder), *PRUNE)
    words = ["--results_dir", str(tmp_path), "--run_name", "again"]
    stage2 = str(run / "stage2_random_0.5" / "config.json")
    (folder / "train" / "dark" / "000.png").rename(folder / "train" / "dark" / "zzz.png")  # as many: ids shift
    assert "--keep_samples would name other" in refused(capsys, main.main(["--config", stage2, *words]))
    delete_some(folder)
    assert "80 training samples then, 70 now" in refused(capsys, main.main(["--config", stage2, *words]))
    for program in (main, main_pruned):
        line = refused(capsys, program.main(["--config", str(run / "stage1" / "config.json"), *words]))
        assert "80 training samples then, 70 now" in line
    assert not (tmp_path / "again").exists()


def test_a_replay_on_other_data_that_were_asked_for_says_so(tmp_path, folder, capsys):
    run = prune(tmp_path, *picture_flags(folder), *PRUNE)
    other = pictures(tmp_path / "other", seed=1)
    words = ["--results_dir", str(tmp_path), "--dataset_path", str(other), "--run_name"]
    capsys.readouterr()
    assert main.main(["--config", str(run / "stage1" / "config.json"), *words, "again"]) == 0
    assert "no replay" in capsys.readouterr().err
    stage2 = str(run / "stage2_random_0.5" / "config.json")
    assert "--keep_samples" in refused(capsys, main.main(["--config", stage2, *words, "pruned"]))


# ---- what lies in one folder ------------------------------------------------------------------------------


def test_seeds_and_other_runs_do_not_meet_in_a_folder(tmp_path, capsys):
    train(tmp_path, "--flip_labels", "0.2")
    assert "--flip_labels" in refused(capsys, main.main(arguments(tmp_path, "--seeds", "2")))
    assert not list((tmp_path / "run").glob("seed-*"))
    train(tmp_path, "--flip_labels", "0.2", "--seed", "0", "--seeds", "2")  # the same settings may

    more = arguments(tmp_path, "--seeds", "2", "--seed", "2", "--lr", "0.3", name="run")
    line = refused(capsys, main.main(more))
    assert "--flip_labels" in line and "--lr" in line and not (tmp_path / "run" / "seed-2").exists()
    single = arguments(tmp_path, "--stage", "1", "--lr", "0.3", "--overwrite")
    assert "--lr" in refused(capsys, main_pruned.main(single))


def test_seeds_that_replace_all_there_are_need_not_agree_with_them(tmp_path):
    train(tmp_path, "--seeds", "2", "--epochs", "1")
    train(tmp_path, "--seeds", "2", "--lr", "0.3", "--epochs", "1", "--overwrite")
    assert load(tmp_path / "run" / "seed-1" / "stage1" / "config.json")["config"]["lr"] == 0.3


def test_overwriting_seeds_removes_what_was_summed_up(tmp_path):
    words = ("--seeds", "2", "--epochs", "1", "--methods", "random")
    run = prune(tmp_path, *words, "--audit", "--audit_groups", "3", "--sweep", "0.5")
    assert {"audit.json", "sweep.json"} <= {p.name for p in run.iterdir()}
    train(tmp_path, "--seeds", "2", "--epochs", "1", "--overwrite")
    assert {p.name for p in run.iterdir()} == {"seed-0", "seed-1", "summary.json"}


def test_a_loss_that_is_not_finite_is_summed_up_as_unknown(tmp_path, monkeypatch):
    summary = {"test_accuracy": 0.5, "consensus_distance": 0.1, "epochs": 1.0, "rounds": 3, "seconds": 1.0}
    losses = iter([float("nan"), 1.0])
    monkeypatch.setattr("training.run.train", lambda *_: {**summary, "test_loss": next(losses)})
    train(tmp_path, "--seeds", "2", "--epochs", "1")
    record = load(tmp_path / "run" / "summary.json")
    assert record["test_loss"] is None and record["test_accuracy"] == 0.5


def test_stage1_dir_from_inside(copy, monkeypatch):
    monkeypatch.chdir(copy / "stage1")
    words = [*arguments(copy.parent, *PRUNE, "--resume"), "--stage1_dir", "."]
    assert main_pruned.main(words) == 0
    assert not (copy / "stage1" / "influence").exists()


# ---- damage -------------------------------------------------------------------------------------------------


DAMAGES = {"test_accuracy": ["x", None], "rounds": [1.5], "stopped_early": [0], "seconds": ["1"]}
SUMMARIES = [{}, *({name: value} for name, values in DAMAGES.items() for value in values)]


@pytest.mark.parametrize("damage", SUMMARIES, ids=str)
@pytest.mark.parametrize("stage", ["stage1", "stage2_random_0.5"])
def test_damaged_summaries_are_refused(copy, stage, damage, capsys):
    path = copy / stage / "summary.json"
    path.write_text(json.dumps(load(path) | damage if damage else damage))
    words = arguments(copy.parent, "--resume")
    tries = [(main_pruned, PRUNE), (main_pruned, ("--sweep", "0.5", "--methods", "random"))]
    tries += [(main, ()), (main_pruned, ("--stage", "1"))] if stage == "stage1" else []
    for program, flags in tries:
        assert "summary.json is damaged" in refused(capsys, program.main([*words, *flags]))


ODD_VALUES = {
    "execution": {"device": [None, 1.5, [], 10**30], "threads": [None, "x", {}, 0], "channels_last": [None, 1]},
    "data": {"samples": [None, "x", []], "classes": ["1"], "test_samples": ["x"], "shape": [None]},
}


@pytest.mark.parametrize("part", ODD_VALUES)
def test_damaged_records_of_execution_and_data_are_refused(copy, part, capsys):
    path = copy / "stage1" / "config.json"
    sound = load(path)
    for name, values in ODD_VALUES[part].items():
        for value in values:
            record = json.loads(json.dumps(sound))
            record["identity"]["digest"] = "0" * 64
            (record if part == "execution" else record["identity"])[part][name] = value
            path.write_text(json.dumps(record))
            refused(capsys, main.main(arguments(copy.parent, "--resume")))


def test_a_state_under_the_name_of_another_round_is_passed_over(copy, tmp_path, capsys):
    words = ("--audit", "--audit_groups", "3", "--methods", "delete", "--epochs", "6")
    sound = load(prune(tmp_path, *words, name="sound") / "audit.json")["methods"]
    run = prune(tmp_path, *words, "--stage", "1", name="other")
    states = checkpoint.stored(run / "stage1" / "trajectory")
    shutil.copy(states[0], states[-1])
    with pytest.raises(ValueError, match="another round"):
        checkpoint.read(states[-1])
    prune(tmp_path, *words, name="other")
    assert load(run / "audit.json")["methods"] == sound


def test_a_pipe_in_the_place_of_a_checkpoint_is_passed_over(tmp_path):
    (tmp_path / "round-00000002.safetensors").touch()
    os.mkfifo(tmp_path / "round-00000003.safetensors")
    assert [checkpoint.round_of(path) for path in checkpoint.stored(tmp_path)] == [2]


@pytest.mark.parametrize("damage", ["cut", "no list", "floats", "another run's"])
def test_damaged_predictions_give_no_verdict(copy, damage, capsys):
    path = copy / "stage1" / "predictions.npz"
    with np.load(path) as arrays:
        targets_m, predicted_m = arrays["targets"], arrays["predicted"]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "no list":
        np.savez(path, targets=np.array(1), predicted=np.array(1))
    elif damage == "floats":
        np.savez(path, targets=targets_m, predicted=predicted_m * np.nan)
    else:
        np.savez(path, targets=targets_m, predicted=np.roll(predicted_m, 1))
    capsys.readouterr()
    assert main_pruned.main(arguments(copy.parent, *PRUNE, "--resume")) == 0
    assert "no interval" in capsys.readouterr().err
    assert load(copy / "comparison.json")["verdict"] is None


def test_a_lock_file_of_deep_json(tmp_path, capsys):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / ".lock").write_text("[" * 4000)
        assert "another process" in refused(capsys, main.main(arguments(tmp_path)))


# ---- said in one line -----------------------------------------------------------------------------------------


def test_tensorboard_is_asked_for_before_a_pruning_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flags in (("--stage", "1"), PRUNE, ("--audit",)):
        line = refused(capsys, main_pruned.main(arguments(tmp_path, *flags, "--tensorboard")))
        assert "pip install -r requirements-log.txt" in line and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output(copy):
    words = [sys.executable, str(ROOT / "main.py"), *arguments(copy.parent, "--resume")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_the_accuracy_of_a_finished_run_is_told_again(copy, capsys):
    capsys.readouterr()
    assert main.main(arguments(copy.parent, "--resume")) == 0
    assert f"{summary(copy / 'stage1')['test_accuracy']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--train_ratio", "0.001"), ("--sweep", "0.9", "0.001")])
def test_a_pruning_that_would_empty_a_worker_is_refused_before_anything_is_scored(copy, flags, capsys, monkeypatch):
    monkeypatch.setattr("training.scores.score", lambda *_: pytest.fail("scored"))
    words = arguments(copy.parent, "--pruning_algorithm", "cascade", *flags)
    assert "with nothing" in refused(capsys, main_pruned.main(words))
    assert [path.name for path in copy.glob("stage2_*")] == ["stage2_random_0.5"]
