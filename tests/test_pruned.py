"""main_pruned.py from the command line to its files."""

from __future__ import annotations

import json
import shutil

import command
import numpy as np
import pytest
from command import arguments, metrics, prune, refused, same_tensors, summary, train

import main_pruned
from utils.pruning_args import METHODS
from utils.records import read_partition
from utils.scores import read_scores, write_scores

SMOOTH = ("--model", "mlp_smooth", "--epochs", "4", "--lr", "0.1", "--engine", "threads")
AUDIT = ("--audit", "--audit_groups", "12", "--methods", "cascade", "--pruning_algorithm", "random")
NOISY = (*SMOOTH, "--max_train", "600", "--epochs", "6", "--num_workers", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished stage 1, with stage 2 of ``random``."""
    return prune(tmp_path_factory.mktemp("pruned"), "--pruning_algorithm", "random")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path


def stamps(path) -> dict:
    """When each file was written last."""
    return {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}


# ---- the flow -----------------------------------------------------------------------------------------


def test_the_command_alone_trains_stage_1_first_and_says_so(tmp_path, capsys):
    assert main_pruned.main(arguments(tmp_path, "--pruning_algorithm", "random", "--stage", "2")) == 0
    shown = capsys.readouterr()
    assert "training it first" in shown.err and "stage 2" in shown.out
    assert (tmp_path / "run" / "stage1" / "summary.json").exists()


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) if m == "dice" else m for m in METHODS])
def test_every_method_end_to_end(copy, method):
    stage1 = copy / "run" / "stage1"
    before = stamps(stage1)
    drawn = ("--plots",) if method == "dice" else ()  # its table is made for the plot
    folder = prune(copy, "--pruning_algorithm", method, "--train_ratio", "0.5", *drawn)
    after = stamps(stage1)
    assert {path: after[path] for path in before} == before  # trained once, reused

    stage2 = folder / ("stage2_noprune" if method == "noprune" else f"stage2_{method}_0.5")
    record = command.load(folder / "comparison.json")
    assert record.keys() >= {"algorithm", "ratio", "stage1", "stage2", "difference"}
    assert record["algorithm"] == method and record["ratio"] == (1 if method == "noprune" else 0.5)
    for one, run_dir in (("stage1", stage1), ("stage2", stage2)):
        assert record[one] == command.load(run_dir / "summary.json")
    for key in ("test_accuracy", "test_loss"):
        assert record["difference"][key] == record["stage2"][key] - record["stage1"][key]
    assert record == command.load(folder / f"{stage2.name.replace('stage2', 'comparison')}.json")
    control = folder / "stage2_random_0.5"
    assert record["over_stage1"][0] == pytest.approx(record["difference"]["test_accuracy"])
    if method in ("noprune", "random"):
        assert record["control"] is record["over_random"] is None and "random" not in record["verdict"]
    else:  # as large in every worker, trained as long
        assert record["control"] == command.load(control / "summary.json")
        assert [len(s) for s in read_partition(control)] == [len(s) for s in read_partition(stage2)]
        over = record["stage2"]["test_accuracy"] - record["control"]["test_accuracy"]
        assert record["over_random"][0] == pytest.approx(over) and "random pruning of the same" in record["verdict"]
    assert record["stage2"]["rounds"] == record["stage1"]["rounds"]  # as many steps, on less data

    held, kept = read_partition(stage1), read_partition(stage2)
    if method == "noprune":
        assert metrics(stage2) == metrics(stage1)
        assert same_tensors(stage2 / "model.safetensors", stage1 / "model.safetensors")
        assert not list(folder.glob("*noprune.zarr"))
        return
    scores = read_scores(folder / "influence" / f"{method}.zarr")
    score_of = dict(zip(scores["sample_id"].tolist(), scores["scores"].tolist(), strict=True))
    assert sorted(score_of) == sorted(np.concatenate(held).tolist()) and np.ptp(scores["scores"]) > 0
    for mine, shard in zip(kept, held, strict=True):
        assert set(mine) <= set(shard) and len(mine) == round(0.5 * len(shard))
        assert min(score_of[i] for i in mine) >= max(score_of[i] for i in set(shard) - set(mine))
    by_worker = [sum(score_of[i] for i in shard.tolist()) for shard in held]
    view = command.load(folder / f"node_view_{method}.json")
    assert view["worker_influence"] == pytest.approx(by_worker)
    if method == "dice":
        assert np.array(view["table"]).sum(1) == pytest.approx(by_worker, rel=1e-3)
    else:
        assert view["table"] is None


def test_stage_1_is_the_run_of_main(folder, tmp_path):
    run_dir = train(tmp_path)
    assert metrics(run_dir) == metrics(folder / "stage1")
    assert same_tensors(run_dir / "model.safetensors", folder / "stage1" / "model.safetensors")


def test_a_run_of_main_serves_as_stage_1(tmp_path):
    run_dir = train(tmp_path)
    before = stamps(run_dir)
    prune(tmp_path, "--pruning_algorithm", "dice")
    assert stamps(run_dir) == before


def test_stage_1_alone(tmp_path, capsys):
    prune(tmp_path, "--stage", "1")
    assert "stage 1" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["stage1"]
    assert list((tmp_path / "run" / "stage1" / "trajectory").glob("*.safetensors"))
    line = refused(capsys, main_pruned.main(arguments(tmp_path, "--stage", "1")))
    assert "--resume" in line and "--overwrite" in line


def test_a_finished_stage_2_is_refused_resumed_or_replaced(copy, capsys):
    words = ("--pruning_algorithm", "random")
    run_dir = copy / "run" / "stage2_random_0.95"
    line = refused(capsys, main_pruned.main(arguments(copy, *words)))
    assert "--resume" in line and "--overwrite" in line
    before, stage1 = stamps(run_dir), stamps(copy / "run" / "stage1")
    prune(copy, *words, "--resume")
    assert stamps(run_dir) == before
    prune(copy, *words, "--overwrite")
    assert stamps(run_dir) != before and stamps(copy / "run" / "stage1") == stage1


def test_model_a_scores_and_model_b_is_stage_2(tmp_path):
    folder = prune(
        tmp_path,
        "--model_A",
        "mlp_smooth",
        "--model_B",
        "mlp",
        "--model",
        "cnn",
        "--pruning_algorithm",
        "dice",
    )
    models = [
        command.load(folder / stage / "config.json")["config"]["model"] for stage in ("stage1", "stage2_dice_0.95")
    ]
    assert models == ["mlp_smooth", "mlp"]


def test_global_scope_keeps_the_best_of_all(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "run")
    prune(tmp_path, "--prune_scope", "global", "--train_ratio", "0.3", "--pruning_algorithm", "dice")
    scores = read_scores(tmp_path / "run" / "influence" / "dice.zarr")
    kept = np.concatenate(read_partition(tmp_path / "run" / "stage2_dice_0.3"))
    best = scores["sample_id"][np.argsort(-scores["scores"], kind="stable")][: len(kept)]
    assert len(set(kept.tolist()) ^ set(best.tolist())) <= 2 * 3 and len(kept) == round(0.3 * len(scores["scores"]))


def test_stage2_epochs(copy):
    prune(copy, "--stage2_epochs", "1", "--pruning_algorithm", "random", "--train_ratio", "0.5")
    assert summary(copy / "run" / "stage2_random_0.5")["epochs"] == 1


def test_several_seeds_have_a_folder_each(tmp_path):
    prune(tmp_path, "--seeds", "2", "--pruning_algorithm", "random", "--epochs", "1")
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["seed-0", "seed-1"]
    assert all((tmp_path / "run" / f"seed-{s}" / "comparison.json").exists() for s in (0, 1))


# ---- the cache of scores --------------------------------------------------------------------------------


def test_scores_are_reused_only_under_their_settings(copy, monkeypatch):
    import training.scores

    calls = []
    original = training.scores.score
    monkeypatch.setattr(training.scores, "score", lambda method, *rest: calls.append(method) or original(method, *rest))
    influence = copy / "run" / "influence"

    def names() -> set[str]:
        return {p.name for p in influence.iterdir() if p.name.startswith("dice")}

    prune(copy, "--pruning_algorithm", "dice")
    assert calls == ["dice"] and names() == {"dice.zarr"}
    first = stamps(influence / "dice.zarr")
    prune(copy, "--pruning_algorithm", "dice", "--train_ratio", "0.5", "--delete_checkpoints", "3")
    assert calls == ["dice"] and stamps(influence / "dice.zarr") == first
    prune(copy, "--pruning_algorithm", "dice", "--train_ratio", "0.4", "--dice_hops", "2")
    [other] = names() - {"dice.zarr"}
    assert calls == ["dice", "dice"] and other.startswith("dice-") and stamps(influence / "dice.zarr") == first
    assert read_scores(influence / other)["settings"]["options"]["dice_hops"] == 2
    assert not np.array_equal(read_scores(influence / other)["scores"], read_scores(influence / "dice.zarr")["scores"])
    prune(copy, "--pruning_algorithm", "dice", "--train_ratio", "0.3", "--dice_hops", "2")
    assert calls == ["dice", "dice"]


def test_damaged_scores_are_computed_again(copy, capsys):
    """A chunk that is gone reads as zeros, and scores of before the digests cannot be told from damaged ones."""
    influence = copy / "run" / "influence"
    path = influence / "random.zarr"
    before = read_scores(path)
    attributes = command.load(path / "zarr.json")
    del attributes["attributes"]["digest"]

    def without_digest():
        (path / "zarr.json").write_text(json.dumps(attributes))

    for share, damage in ("0.5", (path / "scores" / "c" / "0").unlink), ("0.4", without_digest):
        damage()
        prune(copy, "--pruning_algorithm", "random", "--train_ratio", share)
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 1 and str(path) in warnings[0] and "damaged" in warnings[0]
        assert [p.name for p in influence.iterdir() if p.name.startswith("random")] == ["random.zarr"]
        np.testing.assert_equal(read_scores(path), before)


def test_damaged_scores_of_other_settings_are_replaced_too(copy):
    """Only the settings in them tell whose they were."""
    path = copy / "run" / "influence" / "dice.zarr"
    write_scores(path, {"scores": [0.5], "sample_id": [0], "worker": [0]}, {"method": "of another run"})
    (path / "scores" / "zarr.json").unlink()
    prune(copy, "--pruning_algorithm", "dice", "--train_ratio", "0.5")
    assert read_scores(path)["settings"]["method"] == "dice"
    assert [p.name for p in path.parent.iterdir() if p.name.startswith("dice")] == ["dice.zarr"]


def test_stage_2_under_other_settings_is_refused(copy, capsys):
    line = refused(capsys, main_pruned.main(arguments(copy, "--pruning_algorithm", "random", "--resume",
                                                      "--prune_scope", "global")))  # fmt: skip
    assert "stage2_random_0.95" in line and "--overwrite" in line


# ---- errors -----------------------------------------------------------------------------------------------


def test_half_finished_stage_1_is_refused_and_finished_with_resume(copy, capsys):
    stage1 = copy / "run" / "stage1"
    (stage1 / "summary.json").unlink()
    words = ("--pruning_algorithm", "random", "--train_ratio", "0.5")
    line = refused(capsys, main_pruned.main(arguments(copy, *words)))
    assert "half finished" in line and "--resume" in line
    prune(copy, *words, "--resume")
    assert (stage1 / "summary.json").exists() and (copy / "run" / "stage2_random_0.5" / "summary.json").exists()


def test_half_finished_stage1_dir_is_finished_where_it_is(copy, capsys):
    stage1 = copy / "run" / "stage1"
    (stage1 / "summary.json").unlink()
    words = arguments(copy, "--pruning_algorithm", "random", "--train_ratio", "0.5", "--stage1_dir", stage1, "--resume",
                      name="another")  # fmt: skip
    assert main_pruned.main(words) == 0
    assert (stage1 / "summary.json").exists() and not (copy / "another").exists()


def test_stage1_dir(copy):
    before = stamps(copy / "run" / "stage1")
    prune(copy, "--pruning_algorithm", "dice", "--stage1_dir", str(copy / "run" / "stage1"), name="another")
    assert stamps(copy / "run" / "stage1") == before
    assert (copy / "run" / "stage2_dice_0.95" / "summary.json").exists() and not (copy / "another").exists()


@pytest.mark.parametrize("flags", [("--lr", "0.01"), ("--seed", "9"), ("--model_A", "mlp_smooth"), ("--epochs", "3")])
def test_stage_1_of_another_configuration_is_refused(copy, capsys, flags):
    line = refused(capsys, main_pruned.main(arguments(copy, "--pruning_algorithm", "dice", *flags)))
    assert ("--model" if "model" in flags[0] else flags[0]) in line
    assert not (copy / "run" / "stage2_dice_0.95").exists()


def test_a_pruning_that_would_empty_a_worker_is_refused(copy, capsys):
    line = refused(capsys, main_pruned.main(arguments(copy, "--pruning_algorithm", "random", "--train_ratio", "0.001")))
    assert "worker" in line and "--train_ratio" in line
    prune(copy, "--pruning_algorithm", "random", "--train_ratio", "0.001", "--prune_scope", "global")
    assert [len(s) for s in read_partition(copy / "run" / "stage2_random_0.001")] == [1, 1, 1, 1]


def test_a_damaged_final_checkpoint_of_stage_1_is_refused(copy, capsys):
    for path in (copy / "run" / "stage1" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    line = refused(capsys, main_pruned.main(arguments(copy, "--pruning_algorithm", "dice")))
    assert "checkpoint" in line and "--overwrite" in line


def test_damaged_snapshots_are_replayed(copy, folder):
    for path in (copy / "run" / "stage1" / "trajectory").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    prune(copy, "--pruning_algorithm", "cascade")
    shutil.copytree(folder, copy / "sound" / "run")
    prune(copy / "sound", "--pruning_algorithm", "cascade")
    one, other = (read_scores(f / "run" / "influence" / "cascade.zarr")["scores"] for f in (copy, copy / "sound"))
    assert np.array_equal(one, other)


# ---- proof --------------------------------------------------------------------------------------------------


def test_audit(tmp_path, capsys):
    folder = prune(tmp_path, *SMOOTH, "--audit", "--audit_groups", "16", "--methods", "cascade", "random",
                   "--pruning_algorithm", "random")  # fmt: skip
    record = command.load(folder / "audit.json")
    assert record["groups"] == len(record["actual"]) == 16 and record["target"] == "nodes"
    proven, chance = record["methods"]["cascade"], record["methods"]["random"]
    assert len(proven["predicted"]) == 16 and proven["interval"][0] <= proven["lds"] <= proven["interval"][1]
    assert proven["lds"] > 0.8 > chance["lds"]
    # One sign and one unit: the sum of a group's scores predicts the rise of F itself.
    slope = np.polyfit(proven["predicted"], record["actual"], 1)[0]
    assert 0.5 < slope < 2
    assert record["masked_vs_removed"].keys() == {"masked", "removed"}
    assert record["masked_vs_removed"]["masked"] == record["actual"][0]
    assert record["mislabel"] is None and "cascade" in capsys.readouterr().out


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """An audit in one batch of retrainings."""
    return prune(tmp_path_factory.mktemp("audited"), *SMOOTH, *AUDIT)


def forget_audit(folder) -> None:
    """Delete the audit and the figures of retrainings that it kept."""
    (folder / "audit.json").unlink()
    for what in ("retrainings", "smoothness"):
        [kept] = folder.glob(f"{what}-*.json")
        kept.unlink()


@pytest.mark.slow
def test_retraining_one_by_one_gives_the_same(audited, tmp_path):
    shutil.copytree(audited, tmp_path / "run")
    forget_audit(tmp_path / "run")
    prune(tmp_path, *SMOOTH, *AUDIT, "--memory_gb", "1e-9")
    assert command.load(tmp_path / "run" / "audit.json") == command.load(audited / "audit.json")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["threads", "vmap"])
def test_retraining_on_a_cluster_gives_the_same(tmp_path, engine):
    """To the bit where a worker is a chunk of its own; a batched product rounds by the size of the batch."""
    here = prune(tmp_path, *SMOOTH, *AUDIT, "--engine", engine)
    record = command.load(here / "audit.json")
    forget_audit(here)
    prune(tmp_path, *SMOOTH, *AUDIT, "--engine", engine, "--cluster", "local:2")
    again = command.load(here / "audit.json")
    if engine == "threads":
        assert again == record
    assert again["actual"] == pytest.approx(record["actual"], abs=1e-7)
    assert again["methods"].keys() == record["methods"].keys()


def test_cascade_finds_flipped_labels(tmp_path):
    folder = prune(tmp_path, *NOISY, "--flip_labels", "0.2", "--audit", "--audit_groups", "3", "--methods", "cascade",
                   "random", "--pruning_algorithm", "random")  # fmt: skip
    found = command.load(folder / "audit.json")["mislabel"]
    assert found["cascade"]["auroc"] > 0.7 and found["cascade"]["found_20"] > 0.35
    assert 0.3 < found["random"]["auroc"] < 0.7


def test_bad_workers_are_at_the_bottom_of_the_node_view(tmp_path):
    folder = prune(tmp_path, *NOISY, "--bad_data", "2:label_flip", "--pruning_algorithm", "cascade")
    view = command.load(folder / "node_view_cascade.json")
    bad = command.load(folder / "stage1" / "corruption.json")["bad_workers"]
    assert view["bad_workers"] == bad and len(bad) == 2
    assert sorted(np.argsort(view["worker_influence"])[:2].tolist()) == bad


def test_sweep(copy):
    words = (
        "--sweep",
        "0.8",
        "0.4",
        "--methods",
        "random",
        "delete",
        "--pruning_algorithm",
        "random",
        "--train_ratio",
        "0.8",
    )
    folder = prune(copy, *words)
    record = command.load(folder / "sweep.json")
    assert record["ratios"] == [0.8, 0.4] and list(record["methods"]) == ["random", "delete"]
    assert record["stage1"]["test_accuracy"] == summary(folder / "stage1")["test_accuracy"]
    for method, entry in record["methods"].items():
        stages = [folder / f"stage2_{method}_{ratio}" for ratio in ("0.8", "0.4")]
        assert entry["test_accuracy"] == [summary(s)["test_accuracy"] for s in stages]
    before = {s: stamps(s) for s in folder.glob("stage*")}
    prune(copy, *words)  # a sweep takes what it finds
    assert {s: stamps(s) for s in folder.glob("stage*")} == before


@pytest.mark.slow
def test_plots(copy):
    folder = prune(copy, "--pruning_algorithm", "dice", "--plots")
    assert (folder / "comparison_dice_0.95.png").stat().st_size > 1000
    assert list((folder / "stage2_dice_0.95" / "plots").glob("*.png"))
