"""A run is bound to its data, its settings, its checkpoints and its folder: what else is met is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import command
import numpy as np
import pytest
import torch
from command import arguments, metrics, prune, refused, same_tensors, summary, train
from PIL import Image

import main
import main_pruned
from training import checkpoint
from training.run import run_name
from utils.args import Config
from utils.digest import digest_json


def pictures(folder: Path, seed: int = 0, train_count: int = 40) -> Path:
    """Two classes of noise pictures, 8 x 8: bright and dark."""
    draw = np.random.default_rng(seed)
    for part, count in (("train", train_count), ("test", 10)):
        for label, name in enumerate(("bright", "dark")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (8, 8), dtype=np.uint8) + 120 * (1 - label)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{i:03d}.png")
    return folder


def picture_flags(folder: Path, *more: str) -> tuple[str, ...]:
    return ("--dataset_name", "imagefolder", "--dataset_path", str(folder), "--batch_size", "4", "--min_shard", "2",
            "--max_train", "1000", *more)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "pictures")


def delete_some(folder: Path) -> None:
    """What users do next: the worst pictures go."""
    for i in range(0, 40, 4):
        (folder / "train" / "bright" / f"{i:03d}.png").unlink()


# ---- data that changed --------------------------------------------------------------------------------


def test_deleted_pictures_are_noticed_before_anything_is_scored(tmp_path, folder, capsys):
    flags = picture_flags(folder)
    prune(tmp_path, *flags, "--pruning_algorithm", "random")
    delete_some(folder)
    for method in ("random", "if"):  # with cached scores, and without
        words = arguments(tmp_path, *flags, "--pruning_algorithm", method, "--train_ratio", "0.5")
        line = refused(capsys, main_pruned.main(words))
        assert "80 training samples then, 70 now" in line and "--run_name" in line
    assert not list((tmp_path / "run").glob("stage2_*_0.5"))


def test_a_run_is_not_resumed_on_other_data(tmp_path, folder, capsys):
    flags = picture_flags(folder, "--epochs", "4", "--checkpoint_every", "1")
    run_dir = train(tmp_path, *flags)
    (run_dir / "summary.json").unlink()
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    delete_some(folder)
    assert "then" in refused(capsys, main.main(arguments(tmp_path, *flags, "--resume")))
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


def test_another_folder_of_as_many_pictures_is_noticed(tmp_path, folder, capsys):
    prune(tmp_path, *picture_flags(folder), "--stage", "1")
    other = pictures(tmp_path / "other", seed=1)
    words = arguments(tmp_path, *picture_flags(other), "--audit", "--audit_groups", "3", "--methods", "if")
    assert "other" in refused(capsys, main_pruned.main(words))
    assert not (tmp_path / "run" / "audit.json").exists()


def test_labels_that_changed_are_noticed(tmp_path, folder, capsys):
    prune(tmp_path, *picture_flags(folder), "--stage", "1")
    (folder / "train" / "bright" / "000.png").rename(folder / "train" / "dark" / "000b.png")
    assert "then" not in refused(capsys, main_pruned.main(arguments(tmp_path, *picture_flags(folder))))


def test_data_that_only_moved_are_the_same(tmp_path, folder):
    run_dir = train(tmp_path, *picture_flags(folder))
    (run_dir / "summary.json").unlink()
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert summary(train(tmp_path, *picture_flags(moved), "--resume"))["rounds"] > 0


# ---- checkpoints, snapshots, scores ---------------------------------------------------------------------


def test_another_seeds_checkpoint_is_passed_over(tmp_path, capsys):
    flags = ("--epochs", "4", "--checkpoint_every", "2")
    whole, other = train(tmp_path, *flags, name="whole"), train(tmp_path, *flags, "--seed", "1", name="other")
    run_dir = train(tmp_path, *flags)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "checkpoints")
    shutil.copytree(other / "checkpoints", run_dir / "checkpoints")
    capsys.readouterr()
    train(tmp_path, *flags, "--resume")
    assert "belongs to another run" in capsys.readouterr().err
    assert metrics(run_dir) == metrics(whole)
    assert same_tensors(run_dir / "model.safetensors", whole / "model.safetensors")


def test_another_seeds_states_are_not_scored(tmp_path):
    methods = ("--audit", "--audit_groups", "3", "--methods", "cascade")
    other = prune(tmp_path, "--stage", "1", "--seed", "1", name="other") / "stage1"
    prune(tmp_path, *methods, name="sound")
    run = prune(tmp_path, "--stage", "1")
    shutil.rmtree(run / "stage1" / "trajectory")
    shutil.copytree(other / "trajectory", run / "stage1" / "trajectory")
    prune(tmp_path, *methods)
    one, sound = (command.load(tmp_path / name / "audit.json")["methods"] for name in ("run", "sound"))
    assert one == sound


def test_the_final_state_of_another_seed_is_refused(tmp_path, capsys):
    other = prune(tmp_path, "--stage", "1", "--seed", "1", name="other") / "stage1"
    run_dir = prune(tmp_path, "--stage", "1") / "stage1"
    shutil.rmtree(run_dir / "checkpoints")
    shutil.copytree(other / "checkpoints", run_dir / "checkpoints")
    assert "final checkpoint" in refused(capsys, main_pruned.main(arguments(tmp_path, "--pruning_algorithm", "if")))


@pytest.mark.slow
def test_delete_does_not_depend_on_the_files_that_are_there(tmp_path):
    """The steps that it looks at follow from the configuration; states that are missing are replayed."""
    words = ("--epochs", "40", "--pruning_algorithm", "delete", "--delete_checkpoints", "3")
    prune(tmp_path, *words, name="sound")
    run = prune(tmp_path, *words, "--stage", "1")
    states = sorted((run / "stage1" / "trajectory").iterdir())
    assert len(states) > 5
    for path in states[1::2]:
        path.unlink()
    prune(tmp_path, *words)
    sound = _scores(tmp_path / "sound")
    assert np.array_equal(_scores(run), sound)
    for path in (run / "stage1" / "trajectory").iterdir():
        path.unlink()
    shutil.rmtree(run / "influence")
    prune(tmp_path, *words, "--train_ratio", "0.5")
    assert np.array_equal(_scores(run), sound)


def _scores(run: Path) -> np.ndarray:
    from utils.scores import read_scores

    return read_scores(run / "influence" / "delete.zarr")["scores"]


# ---- a pruning is a run that can be replayed --------------------------------------------------------------


def test_the_record_of_a_stage_2_replays_it(tmp_path, capsys):
    run = prune(tmp_path, "--pruning_algorithm", "random", "--train_ratio", "0.3", "--epochs", "4")
    stage2 = run / "stage2_random_0.3"
    config = stage2 / "config.json"
    assert main.main(["--config", str(config), "--results_dir", str(tmp_path), "--run_name", "again"]) == 0
    again = tmp_path / "again" / "stage1"
    assert metrics(again) == metrics(stage2) and summary(again) == summary(stage2)
    assert same_tensors(again / "model.safetensors", stage2 / "model.safetensors")

    moved = tmp_path / "moved"
    shutil.copytree(stage2, moved)  # the list of samples is found beside the record
    shutil.rmtree(run)
    words = ["--config", str(moved / "config.json"), "--results_dir", str(tmp_path), "--run_name"]
    assert main.main([*words, "third"]) == 0
    assert metrics(tmp_path / "third" / "stage1") == metrics(again)

    run.mkdir()  # a file of that name where it was, with other contents, does not count
    (run / "stage2_random_0.3").mkdir()
    (run / "stage2_random_0.3" / "kept_samples.txt").write_text("1 2 3\n")
    assert main.main([*words, "another"]) == 0
    assert metrics(tmp_path / "another" / "stage1") == metrics(again)
    shutil.rmtree(run)

    (moved / "kept_samples.txt").write_text("1 2 3\n")
    assert "--keep_samples" in refused(capsys, main.main([*words, "fourth"]))
    (moved / "kept_samples.txt").unlink()
    assert "--keep_samples" in refused(capsys, main.main([*words, "fifth"]))


def test_a_replay_of_a_run_that_stopped_early_stops_there(tmp_path):
    flags = ("--epochs", "20", "--lr", "1e-6", "--patience", "2", "--min_delta", "0.5", "--eval_every", "1")
    run = prune(tmp_path, *flags, "--pruning_algorithm", "noprune")
    assert summary(run / "stage2_noprune")["rounds"] == summary(run / "stage1")["rounds"] == 3
    words = ["--config", str(run / "stage2_noprune" / "config.json"), "--results_dir", str(tmp_path), "--no-plots"]
    assert main.main([*words, "--run_name", "again"]) == 0
    assert summary(tmp_path / "again" / "stage1") == summary(run / "stage2_noprune")


@pytest.mark.parametrize("protocol", ["gossip", "local", "fedavg", "chained"])
def test_stage_2_makes_as_many_steps_as_stage_1(tmp_path, protocol):
    from training.build import build
    from training.protocols import load_protocol
    from utils.parser import parse

    run = prune(tmp_path, "--protocol", protocol, "--pruning_algorithm", "random", "--train_ratio", "0.3")

    def steps(stage: str) -> torch.Tensor:
        job = build(parse(Config, ["--config", str(run / stage / "config.json"), "--quiet"], ""))
        module = load_protocol(protocol)
        return torch.stack([module.plan(job, r).steps_N for r in range(module.rounds(job))])

    assert torch.equal(steps("stage1"), steps("stage2_random_0.3"))
    assert summary(run / "stage1")["rounds"] == summary(run / "stage2_random_0.3")["rounds"]


def test_the_replay_command_of_the_readme(tmp_path, capsys):
    words = ["--model", "mlp", "--epochs", "1", "--no-plots", "--quiet", "--results_dir", str(tmp_path)]
    assert main.main(words) == 0
    [run_dir] = tmp_path.glob("*/stage1")
    assert main.main(["--config", str(run_dir / "config.json")]) == 0
    again = run_dir.parent.with_name(run_dir.parent.name + "_replay") / "stage1"
    assert metrics(again) == metrics(run_dir)


# ---- names ------------------------------------------------------------------------------------------------


def test_different_runs_have_different_names(tmp_path):
    lists = [tmp_path / "a" / "ids.txt", tmp_path / "b" / "ids.txt"]
    for i, path in enumerate(lists):
        path.parent.mkdir()
        path.write_text(f"{i}\n")
    settings = [
        {}, {"flip_labels": 0.1}, {"lr": 0.1}, {"lr": 0.01}, {"epochs": 5.0}, {"seed": 1}, {"local_steps": 4},
        {"dataset_name": "imagefolder", "dataset_path": "x/cats"},
        {"dataset_name": "imagefolder", "dataset_path": "dogs"},
        {"drop_samples": str(lists[0])}, {"drop_samples": str(lists[1])}, {"protocol": "fedavg"}, {"alpha": 0.1},
        {"momentum": 0.5}, {"byzantine": "2:noise"}, {"milestones": (1.0, 2.0)}, {"config": "x/config.json"},
        {name: 0.31 for name in ("lr", "momentum", "wd", "gamma", "fraction_fit", "async_alpha", "speed_spread")},
        {name: 0.32 for name in ("lr", "momentum", "wd", "gamma", "fraction_fit", "async_alpha", "speed_spread")},
    ]  # fmt: skip
    names = [run_name(Config(**s)) for s in settings]
    assert len(set(names)) == len(names)
    assert all(len(name) < 200 and not set(name) & set("/: \\") for name in names)
    assert names[0] == "digits_cnn_ring8_dirichlet0.8_seed0"


# ---- small things that went wrong ---------------------------------------------------------------------------


def test_overwriting_stage_1_removes_what_stood_on_it(tmp_path):
    words = ("--audit", "--audit_groups", "3", "--methods", "if", "random")
    run = prune(tmp_path, *words)
    assert {"audit.json", "influence"} <= {p.name for p in run.iterdir()}
    prune(tmp_path, "--stage", "1", "--overwrite")
    assert [p.name for p in run.iterdir()] == ["stage1"]


def test_an_audit_alone_prunes_nothing(tmp_path, capsys):
    run = prune(tmp_path, "--audit", "--audit_groups", "3", "--methods", "random")
    assert not list(run.glob("stage2_*")) and not (run / "comparison.json").exists()
    prune(tmp_path, "--sweep", "0.9", "0.5", "--methods", "random")
    assert sorted(p.name for p in run.glob("stage2_*")) == ["stage2_random_0.5", "stage2_random_0.9"]


@pytest.mark.slow
def test_sweeps_and_audits_of_several_seeds_are_summed_up(tmp_path, capsys):
    words = ("--seeds", "2", "--epochs", "1", "--methods", "random", "if", "--plots")
    run = prune(tmp_path, *words, "--sweep", "0.9", "0.5", "--audit", "--audit_groups", "3")
    each = [command.load(run / f"seed-{s}" / "sweep.json")["methods"]["random"]["test_accuracy"] for s in (0, 1)]
    record = command.load(run / "sweep.json")
    assert record["seeds"] == 2 and record["ratios"] == [0.9, 0.5]
    assert record["methods"]["random"]["test_accuracy"] == pytest.approx(np.mean(each, 0).tolist())
    assert record["methods"]["random"]["test_accuracy_std"] == pytest.approx(np.std(each, 0, ddof=1).tolist())
    assert (run / "sweep.png").stat().st_size > 1000
    lds = [command.load(run / f"seed-{s}" / "audit.json")["methods"]["if"]["lds"] for s in (0, 1)]
    assert command.load(run / "audit.json")["methods"]["if"]["lds"]["values"] == lds


def test_an_interrupted_audit_goes_on(tmp_path, monkeypatch):
    """Every finished retraining is kept."""
    import training.audit

    words = ("--engine", "threads", "--threads", "1", "--audit", "--audit_groups", "6", "--methods", "random",
             "--memory_gb", "1e-9")  # fmt: skip
    whole = prune(tmp_path, *words, name="whole")
    original, calls = training.audit.retrain, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.audit, "retrain", dies)
        assert main_pruned.main(arguments(tmp_path, *words)) == 130
        run = prune(tmp_path, *words)
    assert len(calls) == 4 + 7 - 3 + 1  # three were finished; at the end one group is really removed
    assert command.load(run / "audit.json")["actual"] == command.load(whole / "audit.json")["actual"]


DAMAGES = "{", {"0": None}, '{"settings": 1}', {"x": 1.0}, [1.0]
SLOW_DAMAGE = [pytest.param(damage, marks=pytest.mark.slow) for damage in DAMAGES]


@pytest.mark.parametrize("damage", ["flip", *SLOW_DAMAGE])
def test_damaged_retrainings_are_made_again(tmp_path, damage, capsys):
    words = ("--audit", "--audit_groups", "3", "--methods", "random")
    run = prune(tmp_path, *words)
    [kept] = run.glob("retrainings-*.json")
    before, text = command.load(run / "audit.json"), kept.read_text()
    if damage == "flip":
        digit = text.index('"0": ') + 8
        damage = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
    if not isinstance(damage, str):  # its digest is right, but nothing else
        damage = json.dumps(json.loads(text) | {"values": damage, "digest": digest_json(damage)})
    kept.write_text(damage)
    capsys.readouterr()
    prune(tmp_path, *words)
    assert "retraining anew" in capsys.readouterr().err
    assert command.load(run / "audit.json") == before


def test_an_audit_of_tiny_shards(tmp_path):
    """A removed group may leave a worker with nothing: then no group is really removed, and the audit says so."""
    words = ("--max_train", "40", "--num_workers", "20", "--min_shard", "0", "--partition", "iid", "--batch_size", "2")
    run = prune(tmp_path, *words, "--audit", "--audit_groups", "3", "--audit_fraction", "0.7", "--methods", "random")
    assert command.load(run / "audit.json")["masked_vs_removed"] is None


def test_dropping_samples_that_count_for_nothing_is_said(tmp_path, capsys):
    from utils.records import read_partition

    held = np.concatenate(read_partition(train(tmp_path, name="first")))
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(str(i) for i in range(20)))
    capsys.readouterr()
    train(tmp_path, "--drop_samples", ids)
    outside = len(set(range(20)) - set(held.tolist()))
    assert f"{outside} of 20 ids are no training samples" in capsys.readouterr().err
    ids.write_text(" ".join(map(str, held)))
    assert "--drop_samples" in refused(capsys, main.main(arguments(tmp_path, "--drop_samples", ids, name="none")))


@pytest.mark.parametrize("model", ["resnet18", "shufflenet"])
def test_batch_norm_on_a_batch_of_one(model, tmp_path, capsys):
    flags = ("--model", model, "--batch_size", "1", "--engine", "loop")
    line = refused(capsys, main.main(arguments(tmp_path, *flags)))
    assert model in line and "--batch_size" in line


def test_every_run_begins_and_ends_with_what_it_is(tmp_path, capsys):
    flags = [flag for flag in arguments(tmp_path) if flag != "--quiet"]
    assert main.main(flags) == 0
    first = capsys.readouterr().err.splitlines()[0]
    for words in ("300 training", "10 classes", "1 x 8 x 8", "4 workers", "6 rounds", "mlp", "vmap", "ring"):
        assert words in first
    record = summary(tmp_path / "run" / "stage1")
    by_class = record["test_accuracy_by_class"]
    assert list(by_class) == list("0123456789")
    counts_CC, names = command.confusion(tmp_path / "run" / "stage1")
    assert names == list("0123456789") and counts_CC.sum() == 359
    assert counts_CC.trace() / counts_CC.sum() == pytest.approx(record["test_accuracy"])
    assert [counts_CC[c, c] / counts_CC[c].sum() for c in range(10)] == pytest.approx(list(by_class.values()))


def test_tensorboard_that_is_not_there_is_said_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(capsys, main.main(arguments(tmp_path, "--tensorboard")))
    assert "pip install -r requirements-log.txt" in line and list(tmp_path.iterdir()) == []


def test_nothing_that_decides_numbers_depends_on_a_clock(tmp_path, monkeypatch):
    """Two starts of one command choose the same execution, however slow the machine is meanwhile."""
    import workers.tuning

    def measured(*_):
        raise AssertionError("timed")

    monkeypatch.setattr(workers.tuning, "time_step", measured)
    for name, model in (("one", "mlp"), ("two", "cnn")):
        train(tmp_path, "--engine", "auto", "--model", model, "--epochs", "1", name=name)
    with pytest.raises(AssertionError, match="timed"):
        train(tmp_path, "--engine", "measure", name="three")


def test_checkpoints_name_their_run(tmp_path):
    run_dir = train(tmp_path)
    found = checkpoint.latest(run_dir / "checkpoints")
    assert found.run == json.loads((run_dir / "config.json").read_text())["identity"]["digest"]
    assert checkpoint.latest(run_dir / "checkpoints", found.run) is not None
    with pytest.warns(UserWarning, match="another run"):
        assert checkpoint.latest(run_dir / "checkpoints", "0" * 64) is None
