"""Batches cut into parts, for cores that would idle: the same step, and the same bits wherever a run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import command
import pytest
import torch
from command import arguments, metrics, refused, same_tensors, train

import main
import main_pruned
import training.build
from benchmarks.training_probes import IMAGE_SHAPES, build_model
from networks import load_model
from tests.helpers import run_steps, small_fleet
from training import checkpoint
from training.build import build
from training.protocols import load_protocol
from training.recipe import Recipe
from training.retrain import retrain
from training.trajectory import RecordedRun
from utils.args import Config
from utils.parser import parse
from workers.engine import Engine
from workers.tuning import batch_parts, products
from workers.worker_vision import Fleet

ROOT = Path(main_pruned.__file__).parent
# The digits' CNN is large enough to be cut only with large batches: two parts of 64.
CHAINED = ("--model", "cnn", "--engine", "auto", "--threads", "2", "--protocol", "chained", "--batch_size", "128",
           "--max_train", "600", "--partition", "iid", "--num_workers", "3", "--epochs", "3", "--quiet")  # fmt: skip


def in_parts(parts: int, threads: int = 1, **options) -> Fleet:
    """A fleet whose batches are cut."""
    fleet = small_fleet(engine="threads", threads=threads, **options)
    old = fleet.engine
    fleet.engine = Engine(old.model, old.layout, "threads", threads, parts=parts)
    return fleet


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_batch_in_parts_is_the_whole_batch(model, dtype, tolerance):
    weights_Mn = torch.linspace(0, 2, 120).view(2, 60)
    options = dict(model=model, lengths=(13, 5, 20), batch_size=7, dtype=dtype, weights_Mn=weights_Mn)
    whole, cut = run_steps(small_fleet(**options), 4), run_steps(in_parts(3, **options), 4)
    torch.testing.assert_close(cut.rows_RD, whole.rows_RD, rtol=0, atol=tolerance)
    losses = [fleet.step(torch.tensor([4, 4, 4]), 0.1) for fleet in (whole, cut)]
    torch.testing.assert_close(losses[1], losses[0], rtol=10 * tolerance, atol=0)
    assert not torch.equal(cut.rows_RD, whole.rows_RD)  # or nothing was cut


@pytest.mark.parametrize("channels_last", [False, True])
def test_parts_give_the_same_bits_on_any_number_of_threads(channels_last):
    """Fewer rows than threads: parts side by side. More: one after the other."""
    ends = []
    for threads in (1, 2, 3, 8):
        fleet = in_parts(2, threads, model="cnn", channels_last=channels_last, dtype=torch.float32)
        run_steps(fleet, 2)
        for workers in ([1], [0, 2], [0, 1, 3]):
            fleet.step(torch.tensor([5, 6, 7, 8]), 0.1, workers)
        ends.append(torch.cat([fleet.rows_RD, fleet.state_RS], 1))
    assert all(torch.equal(end, ends[0]) for end in ends)


def rule(model: str, at_once: int, threads: int, batch_size: int = 32, engine: str = "threads") -> int:
    return batch_parts(build_model(model), IMAGE_SHAPES[model], batch_size, at_once, threads, engine)


def test_the_rule_reads_shapes_and_counts():
    assert rule("cnn", 1, 2) == 2 and rule("cnn", 2, 4) == 2 and rule("cnn", 1, 4) == 4
    assert rule("cnn", 2, 2) == rule("cnn", 16, 2) == rule("cnn", 1, 1) == rule("cnn", 3, 4) == 1
    assert rule("cnn", 1, 64) == 9 and rule("cnn", 1, 64, batch_size=8) == 2  # parts that are worth a thread
    assert rule("resnet18", 1, 2) == 1  # BatchNorm
    assert rule("mlp", 1, 2) == 1 and rule("mlp_wide", 1, 2) == 1 and rule("mlp_wide", 1, 2, batch_size=256) == 2
    assert rule("cnn", 1, 2, engine="vmap") == rule("cnn", 1, 2, engine="graph") == 1


def test_multiplications_of_a_sample():
    assert products(load_model("cnn", 10, (1, 8, 8), seed=0), (1, 8, 8)) == (
        64 * 32 * 9 + 16 * 64 * 32 * 9 + 256 * 64 + 64 * 10
    )


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (dict(num_workers=1), 4),
        (dict(num_workers=2), 2),
        (dict(num_workers=4), 1),
        (dict(num_workers=8, protocol="chained"), 4),
        (dict(num_workers=8, protocol="fedavg", fraction_fit=0.25), 2),
        (dict(num_workers=8, protocol="fedavg"), 1),
        (dict(num_workers=8, protocol="fedasync"), 4),
        (dict(num_workers=8, protocol="fedasync", buffer_size=2), 2),
        (dict(num_workers=1, batch_parts=3), 3),
        (dict(num_workers=8, batch_parts=2), 2),
        (dict(num_workers=1, engine="vmap", model="mlp"), 1),
    ],
)
def test_who_trains_at_a_time_is_the_protocols_word(settings, parts, monkeypatch):
    monkeypatch.setattr("workers.tuning.PART_PRODUCTS", 1)
    monkeypatch.setattr("workers.tuning.PART_PRODUCTS_A_WEIGHT", 0)
    config = Config(**(dict(model="cnn", threads=4, partition="iid", quiet=True) | settings))
    assert build(config).execution.batch_parts == parts


# ---- a run in parts goes on in parts ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A chained run whose batches are cut by rule."""
    run_dir = train(tmp_path_factory.mktemp("whole"), *CHAINED, "--checkpoint_every", "4")
    assert command.load(run_dir / "config.json")["execution"]["batch_parts"] == 2
    return run_dir


def test_resume_gives_the_same_bits_whatever_the_threads(tmp_path, whole, monkeypatch):
    protocol = type(load_protocol("chained"))
    plan = protocol.plan

    def killed(self, job, r):
        if r == 5:
            raise KeyboardInterrupt
        return plan(self, job, r)

    with monkeypatch.context() as patch:  # after five rounds of nine
        patch.setattr(protocol, "plan", killed)
        assert main.main(arguments(tmp_path, *CHAINED, "--checkpoint_every", "4")) == 130
    again = train(tmp_path, *CHAINED, "--threads", "1", "--batch_parts", "1", "--resume")
    assert metrics(again) == metrics(whole)
    assert same_tensors(again / "model.safetensors", whole / "model.safetensors")


def test_replay_takes_the_recorded_parts(tmp_path, whole):
    flags = ("--config", str(whole / "config.json"), "--results_dir", str(tmp_path), "--threads", "1")
    assert main.main([*flags, "--run_name", "again"]) == 0
    again = tmp_path / "again" / "stage1"
    assert command.load(again / "config.json")["execution"]["batch_parts"] == 2
    assert same_tensors(again / "model.safetensors", whole / "model.safetensors")


def test_a_record_without_parts_is_replayed_and_resumed_without(tmp_path, whole):
    run_dir = train(tmp_path, *CHAINED, "--batch_parts", "1")
    assert not same_tensors(run_dir / "model.safetensors", whole / "model.safetensors")
    record = command.load(run_dir / "config.json")
    del record["execution"]["batch_parts"], record["config"]["batch_parts"]
    (run_dir / "config.json").write_text(json.dumps(record))
    flags = ("--config", str(run_dir / "config.json"), "--results_dir", str(tmp_path), "--run_name", "again")
    assert main.main([*flags, "--no-plots"]) == 0
    assert same_tensors(tmp_path / "again" / "stage1" / "model.safetensors", run_dir / "model.safetensors")
    (run_dir / "summary.json").unlink()
    before = (run_dir / "metrics.jsonl").read_text()
    for path in checkpoint.stored(run_dir / "checkpoints"):
        path.unlink()
    train(tmp_path, *CHAINED, "--resume")
    assert [{**json.loads(line), "seconds": 0} for line in before.splitlines()] == [
        {**line, "seconds": 0} for line in metrics(run_dir)
    ]


def test_scores_and_retraining_go_the_same_way(whole):
    """The replayed run, and a retraining of several replicas that leaves nothing out, end where the run ended."""
    record = command.load(whole / "config.json")
    config = parse(Config, ["--config", str(whole / "config.json")], "")
    execution = training.execution.Execution(**record["execution"])
    rounds = command.load(whole / "summary.json")["rounds"]
    job = build(config, execution)
    end = checkpoint.latest(whole / "checkpoints").tensors["rows"]
    final = RecordedRun(job, rounds).final()
    assert torch.equal(job.engine.layout.canonical(final), end)
    elsewhere = Recipe.of("retrainings", job, {}).job()
    everything_Mn = torch.ones(5, len(job.dataset.targets_n))
    values = [retrain(j, rounds, everything_Mn[:m], "nodes") for j, m in ((job, 1), (job, 5), (elsewhere, 2))]
    assert len({value for values_M in values for value in values_M.tolist()}) == 1


@pytest.mark.slow
def test_several_processes_give_the_bits_of_one(tmp_path, whole):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = ("--config", str(whole / "config.json"), "--results_dir", str(tmp_path), "--run_name", "many", "--no-plots")
    subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(ROOT / "main.py"), *flags],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=800, capture_output=True,
    )  # fmt: skip
    assert same_tensors(tmp_path / "many" / "stage1" / "model.safetensors", whole / "model.safetensors")


def test_stage_2_cuts_as_stage_1(tmp_path):
    folder = command.prune(tmp_path, *CHAINED, "--pruning_algorithm", "random", "--train_ratio", "0.8", "--no-control")
    [stage2] = folder.glob("stage2_*")
    assert [command.load(f / "config.json")["execution"]["batch_parts"] for f in (folder / "stage1", stage2)] == [2, 2]


@pytest.mark.parametrize(
    "flags", [("--model", "resnet18", "--engine", "threads"), ("--model", "mlp", "--engine", "vmap")]
)
def test_what_cannot_be_cut_is_refused(tmp_path, capsys, flags):
    line = refused(capsys, main.main(arguments(tmp_path, *flags, "--batch_parts", "2")))
    assert "batch" in line
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("stage1/*"))
