"""main.py as users type it."""

from __future__ import annotations

import dataclasses
import json
import re

import command
import numpy as np
import pytest
import safetensors.torch
import torch
from command import arguments, metrics, refused, same_tensors, summary, train

import main
import networks
import training.execution
from data.batches import Samples
from data.dataset_loader import load_dataset
from utils import args, registry
from utils.args import Config
from utils.influence.method import Method
from utils.parser import parse
from utils.pruning_args import PruningConfig
from utils.records import read_labels, read_partition, read_topology
from utils.scheduler import SCHEDULERS
from workers.engine import ENGINES

BOOLEANS = [f.name for f in dataclasses.fields(PruningConfig) if "bool" in f.type]

METRICS = {
    "round", "epoch", "lr", "train_loss", "val_loss", "val_accuracy", "worker_val_loss", "worker_val_accuracy",
    "consensus_val_loss", "consensus_val_accuracy", "consensus_distance", "seconds",
}  # fmt: skip
SUMMARY = {
    "test_accuracy", "test_loss", "worker_test_accuracy", "consensus_distance", "epochs", "rounds",
    "samples_per_second", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, not to be changed."""
    return train(tmp_path_factory.mktemp("finished"))


# ---- the parser -------------------------------------------------------------------------------------


def test_no_flags_are_the_defaults():
    assert parse(Config, [], "") == Config()
    assert parse(PruningConfig, [], "") == PruningConfig()
    assert Config().partition_kind == "dirichlet"


@pytest.mark.parametrize("kind", [Config, PruningConfig])
def test_every_flag_is_in_help_with_a_text(kind, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(kind, ["--help"], "what it is for")
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(kind):
        assert f"--{f.name}" in shown
        words = f.metadata["help"].replace("%%", "%").split()
        assert len(words) >= 1 and " ".join(words) in shown, f.name


@pytest.mark.parametrize("name", BOOLEANS)
def test_boolean_flags(name):
    for words, value in (
        ([f"--{name}"], True), ([f"--no-{name}"], False), ([f"--{name}", "True"], True),
        ([f"--{name}", "False"], False), ([f"--{name}", "true"], True), ([f"--{name}=False"], False),
    ):  # fmt: skip
        assert getattr(parse(PruningConfig, words, ""), name) is value


def test_partition_flags_work_together():
    def kind(*words: str) -> str:
        return parse(Config, words, "").partition_kind

    assert kind("--dirichlet", "True") == "dirichlet"
    with pytest.warns(UserWarning, match="--nonIID has no effect here: --dirichlet"):
        assert kind("--nonIID", "True", "--dirichlet", "True") == "dirichlet"
    assert kind("--nonIID") == kind("--nonIID", "--no-dirichlet") == "preference"
    assert kind("--no-dirichlet") == kind("--no-nonIID") == "iid"
    assert kind("--partition", "shards") == "shards"


def test_numbers_and_lists_are_parsed():
    config = parse(PruningConfig, ["--lr", "1e-3", "--milestones", "3", "4.5", "--seed", "7", "--sweep", "0.9", "0.5",
                                   "--methods", "if", "dice"], "")  # fmt: skip
    assert (config.lr, config.milestones, config.seed) == (1e-3, (3.0, 4.5), 7)
    assert (config.sweep, config.methods) == ((0.9, 0.5), ("if", "dice"))


@pytest.mark.parametrize(
    ("choices", "registry"),
    [
        (args.SCHEDULES, SCHEDULERS),
        (next(f for f in dataclasses.fields(Config) if f.name == "engine").metadata["choices"], ENGINES),
    ],
)
def test_choices_of_the_command_line_are_the_registries(choices, registry):
    assert sorted(choices) == sorted(registry)


REGISTRIES = [(name, entry) for kind in (registry.DATASETS, registry.TASKS, registry.NETWORKS, registry.PARTITIONS,
              registry.TOPOLOGIES, registry.PROTOCOLS, registry.INFLUENCE) for name, entry in kind.items()]  # fmt: skip


@pytest.mark.parametrize(("name", "place"), REGISTRIES)
def test_every_name_of_the_command_line_leads_somewhere(name, place):
    assert callable(registry.load({name: place}, name, "name")) or isinstance(
        registry.load({name: place}, name, "name"), Method
    )


# ---- the run directory ------------------------------------------------------------------------------


def test_run_directory_keeps_the_contract(finished):
    for name in (
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "partition.npz",
        "topology.json",
        "model.safetensors",
    ):
        assert (finished / name).is_file(), name
    assert list((finished / "checkpoints").glob("*.safetensors"))
    assert not [p for p in finished.rglob("*") if "tmp" in p.name]

    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all(line.keys() >= METRICS for line in lines)
    assert [line["round"] for line in lines] == sorted({line["round"] for line in lines})
    assert lines[0]["round"] == 0 and lines[-1]["epoch"] == 2
    assert all(len(line["worker_val_loss"]) == len(line["worker_val_accuracy"]) == 4 for line in lines)
    assert lines[-1]["val_loss"] == pytest.approx(np.mean(lines[-1]["worker_val_loss"]))

    record = command.load(finished / "summary.json")
    assert record.keys() >= SUMMARY
    assert record["rounds"] == lines[-1]["round"] and record["epochs"] == 2
    assert len(record["worker_test_accuracy"]) == 4

    recorded = command.load(finished / "config.json")
    assert recorded.keys() >= {"config", "execution", "versions", "git_revision"}
    assert recorded["config"].keys() == {f.name for f in dataclasses.fields(Config)}
    assert {"torch", "numpy", "python"} <= recorded["versions"].keys()
    assert recorded["execution"]["engine"] == "vmap"

    shards = read_partition(finished)
    held = np.concatenate(shards)
    assert len(shards) == 4 and len(np.unique(held)) == len(held)
    labels_n, names = read_labels(finished)
    assert len(names) == 10 and held.max() < len(labels_n)
    assert read_topology(finished).keys()


def test_final_model_reproduces_the_test_accuracy(finished):
    model = networks.load_model(finished / "model.safetensors")
    dataset = load_dataset("digits")
    test = Samples(
        dataset.test_inputs_m, dataset.test_targets_m, dataset.mean_C, dataset.std_C, "none", torch.float32
    )
    images, labels_n = test.plain(torch.arange(len(dataset.test_targets_m)))
    with torch.no_grad():
        logits = model.eval()(images)
    accuracy = (logits.argmax(1) == labels_n).float().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, labels_n).item()
    record = summary(finished)
    assert record["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert record["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_an_existing_run_is_refused(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    line = refused(capsys, main.main(arguments(finished.parent.parent)))
    assert "--resume" in line and "--overwrite" in line and str(finished) in line
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_resume_of_a_finished_run_changes_nothing(finished, capsys):
    files = [p for p in finished.rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    assert main.main(arguments(finished.parent.parent, "--resume")) == 0
    assert f"{summary(finished)['test_accuracy']:.4f}" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in files}


def test_resume_starts_where_nothing_is(tmp_path, finished):
    assert summary(train(tmp_path, "--resume")) == summary(finished)


def test_resume_of_another_configuration_is_refused(finished, capsys):
    line = refused(capsys, main.main(arguments(finished.parent.parent, "--resume", "--lr", "0.01", "--seed", "3")))
    assert "--lr" in line and "--seed" in line and "--momentum" not in line


def test_overwrite_replaces(tmp_path):
    run_dir = train(tmp_path)
    old = summary(run_dir)
    (run_dir / "leftover").write_text("of the old run")
    assert train(tmp_path, "--overwrite", "--seed", "1") == run_dir
    assert summary(run_dir) != old and not (run_dir / "leftover").exists()


def test_a_folder_that_is_no_run_is_not_touched(tmp_path, capsys):
    run_dir = tmp_path / "run" / "stage1"
    run_dir.mkdir(parents=True)
    (run_dir / "thesis.tex").write_text("years of work")
    refused(capsys, main.main(arguments(tmp_path)))
    assert [p.name for p in run_dir.iterdir()] == ["thesis.tex"]


def test_config_file_replays_the_run_to_the_bit(finished, tmp_path):
    assert main.main(["--config", str(finished / "config.json"), "--results_dir", str(tmp_path)]) == 0
    [again] = tmp_path.glob("*/stage1")
    assert metrics(again) == metrics(finished) and summary(again) == summary(finished)
    assert same_tensors(again / "model.safetensors", finished / "model.safetensors")


def test_flags_override_the_config_file(finished):
    config = parse(Config, ["--config", str(finished / "config.json"), "--epochs", "5"], "")
    assert config.epochs == 5 and config.model == "mlp" and config.num_workers == 4
    assert not config.resume and not config.overwrite and config.run_name is None


def test_replay_takes_the_recorded_execution(finished, tmp_path, monkeypatch):
    """What 'auto' chose at the first start is part of the record: measuring anew could change the bits."""
    run_dir = train(tmp_path, "--engine", "auto", name="first")
    chosen = command.load(run_dir / "config.json")["execution"]
    other = "threads" if chosen["engine"] == "vmap" else "vmap"
    measured = training.execution.choose_execution

    def choose(model, samples, batches, engine, *rest):
        return measured(model, samples, batches, other if engine == "auto" else engine, *rest)

    monkeypatch.setattr(training.execution, "choose_execution", choose)
    assert (
        main.main(["--config", str(run_dir / "config.json"), "--results_dir", str(tmp_path), "--run_name", "again"])
        == 0
    )
    assert command.load(tmp_path / "again" / "stage1" / "config.json")["execution"] == chosen


# ---- what a run can do --------------------------------------------------------------------------------


def test_several_seeds_report_mean_and_deviation(tmp_path, finished, capsys):
    assert main.main(arguments(tmp_path, "--seeds", "2")) == 0
    both = [summary(tmp_path / "run" / f"seed-{s}" / "stage1") for s in (0, 1)]
    assert both[0] == summary(finished) and both[0] != both[1]
    record = command.load(tmp_path / "run" / "summary.json")
    values = [s["test_accuracy"] for s in both]
    assert record["seeds"] == 2
    assert record["test_accuracy"] == pytest.approx(np.mean(values))
    assert record["test_accuracy_std"] == pytest.approx(np.std(values, ddof=1))
    assert "2 seeds" in capsys.readouterr().out


def test_early_stopping_stops_and_says_so(tmp_path):
    flags = ("--epochs", "20", "--lr", "1e-6", "--patience", "2", "--min_delta", "0.5", "--eval_every", "1")
    run_dir = train(tmp_path, *flags)
    record, lines = summary(run_dir), metrics(run_dir)
    assert record["stopped_early"] is True
    assert record["rounds"] == lines[-1]["round"] == 3  # the first evaluation is the best, then two without a better
    assert 0 < record["epochs"] < 20
    assert command.load(run_dir / "config.json")["config"]["patience"] == 2
    again = train(tmp_path, *flags, "--resume")
    assert summary(again) == record


def test_no_early_stopping_by_default(finished):
    assert summary(finished)["stopped_early"] is False


def test_dropped_samples_change_the_result_and_nothing_else(tmp_path, finished):
    shards = read_partition(finished)
    ids = tmp_path / "ids.txt"
    ids.write_text("# the first worker's first five\n" + " ".join(map(str, shards[0][:5].tolist())) + "\n")
    run_dir = train(tmp_path, "--drop_samples", ids)
    for mine, theirs in zip(read_partition(run_dir), shards, strict=True):
        assert np.array_equal(mine, theirs)
    assert metrics(run_dir)[0] == metrics(finished)[0]
    assert metrics(run_dir)[-1] != metrics(finished)[-1]

    ids.write_text("# nothing\n")
    nothing = train(tmp_path, "--drop_samples", ids, name="nothing")
    assert metrics(nothing) == metrics(finished)


def test_flipped_labels_are_recorded(tmp_path, finished):
    run_dir = train(tmp_path, "--flip_labels", "0.1")
    record = command.load(run_dir / "corruption.json")
    train_ids = np.concatenate(read_partition(run_dir))
    clean_n, flipped_n = read_labels(finished)[0], read_labels(run_dir)[0]
    assert set(record["flipped"]) <= set(train_ids.tolist())
    assert (clean_n != flipped_n).nonzero()[0].tolist() == sorted(record["flipped"])
    assert len(record["flipped"]) == round(0.1 * len(train_ids))
    assert not (finished / "corruption.json").exists()


@pytest.mark.parametrize("kind", ["label_flip", "noise"])
def test_bad_workers_are_recorded(tmp_path, finished, kind):
    run_dir = train(tmp_path, "--bad_data", f"2:{kind}")
    record = command.load(run_dir / "corruption.json")
    assert record["kind"] == kind and len(set(record["bad_workers"])) == 2
    shards = read_partition(run_dir)
    bad = sorted(np.concatenate([shards[k] for k in record["bad_workers"]]).tolist())
    changed = (read_labels(run_dir)[0] != read_labels(finished)[0]).nonzero()[0].tolist()
    assert changed == (bad if kind == "label_flip" else [])
    assert metrics(run_dir)[-1] != metrics(finished)[-1]


def test_a_diverging_worker_is_named_with_its_round(tmp_path, capsys):
    line = refused(capsys, main.main(arguments(tmp_path, "--lr", "1e12", "--epochs", "20")))
    words = line.split()
    assert words[words.index("worker") + 1].rstrip(",:").isdigit()
    assert words[words.index("round") + 1].rstrip(",:").isdigit()
    assert "--lr" in line


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "words", "what"),
    [
        ("training.run.build", "", "before the training began; the same command starts it"),
        ("training.trainer.Trainer.run", "", "run/stage1 has no checkpoint yet: the same command with --resume starts"),
        ("training.trainer.Trainer.finish", "", "with --resume goes on with .*run/stage1 from .* round 6"),
        ("training.trainer.Trainer.finish", "--resume", "the same command goes on with .* round 6"),
        ("training.trainer.Trainer.finish", "--overwrite", "with --resume instead of --overwrite goes on .* round 6"),
        ("training.trainer.Trainer.finish", "--seeds 2", "goes on with .*run/seed-0/stage1 from .* round 6"),
        ("visualization.report.draw_run", "--plots", "had ended and is kept: the same command with --resume"),
    ],
)
def test_an_interrupt_says_what_is_there(where, words, what, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(where, interrupt)
        assert main.main(arguments(tmp_path, *words.split())) == 130
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interrupted")]
    assert re.search(what, line)
    again = [word for word in words.split() if word != "--overwrite"]
    assert main.main(arguments(tmp_path, *again, *(["--resume"] if "--resume" in line else []))) == 0  # as it says


def test_plots_are_drawn_unless_told_otherwise(tmp_path, finished):
    assert not (finished / "plots").exists()
    run_dir = train(tmp_path, "--plots", "--epochs", "1")
    drawn = [p.name for p in (run_dir / "plots").glob("*.png")]
    assert len(drawn) >= 3 and all((run_dir / "plots" / name).stat().st_size > 1000 for name in drawn)


def test_final_rows_are_in_the_checkpoint(finished):
    [last] = (finished / "checkpoints").glob("round-00000006.safetensors")
    rows_ND = safetensors.torch.load_file(last)["rows"]
    model = safetensors.torch.load_file(finished / "model.safetensors")
    assert rows_ND.shape == (4, sum(t.numel() for t in model.values()))
    mean = torch.cat([t.flatten() for t in model.values()]).sort().values
    assert torch.allclose(rows_ND.mean(0).sort().values, mean, atol=1e-7)
