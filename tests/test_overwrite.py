"""What may be deleted, and by whom: a run is replaced only by one that can begin, and by one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import arguments, load, prune, refused, summary, train

import main
import main_pruned
from training.run import each_seed, own_folder
from utils.args import Config
from utils.lock import locked
from utils.parser import parse


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file and its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- a run is there until another one can begin ------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--dataset_name", "cifar10", "--dataset_path", "nowhere"),
        ("--num_workers", "300"),
        pytest.param(("--model", "resnet18", "--batch_size", "1"), marks=pytest.mark.slow),
        pytest.param(("--val_fraction", "0.999"), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_cannot_begin_replaces_nothing(tmp_path, flags, capsys):
    prune(tmp_path, "--audit", "--audit_groups", "3", "--methods", "random")
    before = files_of(tmp_path)
    refused(capsys, main.main(arguments(tmp_path, *flags, "--overwrite")))
    refused(capsys, main_pruned.main(arguments(tmp_path, *flags, "--overwrite", "--stage", "1")))
    assert files_of(tmp_path) == before


def test_an_overwritten_stage_2_that_cannot_begin_replaces_nothing(tmp_path, capsys):
    words = ("--pruning_algorithm", "random", "--train_ratio", "0.5")
    prune(tmp_path, *words)
    before = files_of(tmp_path)
    refused(capsys, main_pruned.main(arguments(tmp_path, *words, "--model_B", "resnett18", "--overwrite")))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["config", "keep_samples", "drop_samples"])
def test_a_run_does_not_delete_what_it_reads(tmp_path, name, capsys):
    run_dir = train(tmp_path)
    (run_dir / "ids.txt").write_text(" ".join(map(str, range(400))))
    path = run_dir / ("config.json" if name == "config" else "ids.txt")
    before = files_of(tmp_path)
    assert f"--{name}" in refused(capsys, main.main(arguments(tmp_path, f"--{name}", str(path), "--overwrite")))
    assert files_of(tmp_path) == before


def test_overwriting_replaces(tmp_path):
    before = summary(train(tmp_path))
    after = summary(train(tmp_path, "--lr", "0.3", "--overwrite"))
    assert after["test_loss"] != before["test_loss"]


def test_a_killed_stage_2_is_resumed(tmp_path, capsys, monkeypatch):
    """Killed after its list of samples was written and before its record was: --resume starts it."""
    words = ("--pruning_algorithm", "random", "--train_ratio", "0.5")

    def killed(*_, **__):
        raise KeyboardInterrupt

    prune(tmp_path, "--stage", "1")
    with monkeypatch.context() as patch:
        patch.setattr("training.pruning.train", killed)
        assert main_pruned.main(arguments(tmp_path, *words, "--stage", "2")) == 130
    assert [p.name for p in (tmp_path / "run" / "stage2_random_0.5").iterdir()] == ["kept_samples.txt"]
    assert "--resume" in refused(capsys, main_pruned.main(arguments(tmp_path, *words)))
    run = prune(tmp_path, *words, "--resume")
    assert "summary.json" in os.listdir(run / "stage2_random_0.5")
    assert not list(run.glob("*.tmp"))


def test_a_stage_2_that_is_there_is_found_before_stage_1_is_trained(tmp_path, capsys):
    words = ("--pruning_algorithm", "random", "--train_ratio", "0.5")
    run = prune(tmp_path, *words)
    for file in sorted((run / "stage1").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    assert "stage2_random_0.5 exists" in refused(capsys, main_pruned.main(arguments(tmp_path, *words)))
    assert not list((run / "stage1").iterdir())


# ---- a finished run, met again -------------------------------------------------------------------------------


def test_a_finished_run_of_other_data_is_not_shown_as_this_one(tmp_path, capsys):
    run_dir = train(tmp_path)
    record = load(run_dir / "config.json")
    record["identity"]["data"]["inputs"] = "0" * 64
    record["identity"]["digest"] = "0" * 64
    (run_dir / "config.json").write_text(json.dumps(record))
    for program, flags in ((main, ()), (main_pruned, ("--stage", "1"))):
        line = refused(capsys, program.main(arguments(tmp_path, *flags, "--resume")))
        assert "the data are not those" in line


def test_a_damaged_digest_is_called_damaged(tmp_path, capsys):
    run_dir = train(tmp_path)
    record = load(run_dir / "config.json")
    record["identity"]["digest"] = "0" * 64
    (run_dir / "config.json").write_text(json.dumps(record))
    assert "damaged" in refused(capsys, main.main(arguments(tmp_path, "--resume")))


def test_keeping_nothing_names_the_flag(tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("# none\n")
    words = arguments(tmp_path, "--keep_samples", str(tmp_path / "ids.txt"))
    assert "--keep_samples" in refused(capsys, main.main(words))


def test_equal_runs_leave_equal_models(tmp_path):
    one, two = (train(tmp_path, name=name) / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


# ---- locks ------------------------------------------------------------------------------------------------------


def test_the_folders_of_the_seeds_are_locked_too(tmp_path, capsys):
    with locked(tmp_path / "run" / "seed-1"):
        assert "seed-1 is in use" in refused(capsys, main.main(arguments(tmp_path, "--seeds", "2")))
    assert summary(tmp_path / "run" / "seed-0" / "stage1")  # what is finished stays

    words = ", ".join(map(repr, arguments(tmp_path, "--run_name", "run/seed-5", name="")))
    other = f"import sys, main\nsys.exit(main.main([{words}]))\n"  # another process, while the seed is trained here
    config = parse(Config, arguments(tmp_path, "--seeds", "10000", "--seed", "5"), "")
    with own_folder(tmp_path / "run"):
        seeds = each_seed(config)
        next(seeds)
        done = subprocess.run([sys.executable, "-c", other], cwd=Path(main.__file__).parent, capture_output=True,
                              text=True, check=False)  # fmt: skip
        seeds.close()
    assert done.returncode == 2 and "is in use by process" in done.stderr


def test_the_lock_neither_follows_links_nor_waits(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (run / ".lock").symlink_to(precious)
    refused(capsys, main.main(arguments(tmp_path)))
    assert precious.read_text() == "keep me"

    (run / ".lock").unlink(missing_ok=True)
    run.mkdir(exist_ok=True)
    os.mkfifo(run / ".lock")
    assert "not a regular file" in refused(capsys, main.main(arguments(tmp_path)))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    for folder in ("/proc/there/is/none", str(tmp_path / "dangling")):
        words = [*arguments(tmp_path), "--results_dir", folder]
        refused(capsys, main.main(words))
