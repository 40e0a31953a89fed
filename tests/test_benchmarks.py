"""The speed benchmark: its arithmetic, that it trains what it says, and one tiny run of the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import training.trainer
from benchmarks import gpu, gpu_probes
from benchmarks.bars import check_bars, describe, judged
from benchmarks.common import Probe, Stopwatch, median_ratio, repeat_for, take_turns
from benchmarks.gpu_checks import CHECKS, Check, Task, figure, finish, pair_figure, reason
from benchmarks.influence import PARTS, ratios
from benchmarks.influence import describe as describe_influence
from benchmarks.influence import main as influence_main
from benchmarks.influence_probes import Case, ScoredRun, naive_dice
from benchmarks.rule import main as rule_main
from benchmarks.training import main
from benchmarks.training_probes import Setting, bare_loop, build_model, fleet_rounds
from networks import load_model
from utils.influence.cascade import cascade
from utils.influence.dice import dice
from workers.tuning import rule

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def a_row(model, workers, execution="threads channels_last", **figures):
    row = {"model": model, "workers": workers, "execution": execution, "amp": "bf16" in execution}
    row |= {"channels_last": "channels_last" in execution, "node_steps_per_second": 100.0}
    row |= {"ratio_limit": 1.0, "ratio_plain": 1.0, "gossip_share": 0.01, "gossip_us_per_worker": 10.0}
    return row | figures


def verdicts(rows):
    return {(c["model"], c["workers"], c["figure"], c["bound"]): c["ok"] for c in check_bars(rows)}


def test_bars_are_for_the_fastest_execution():
    slow = a_row("cnn", 16, "threads nchw", node_steps_per_second=90.0, ratio_plain=1.0, gossip_share=0.9)
    fast = a_row("cnn", 16, node_steps_per_second=110.0, ratio_plain=1.2, ratio_limit=0.9)
    assert verdicts([slow, fast]) == {
        ("cnn", "16", "ratio_plain", 1.15): True,
        ("cnn", "16", "ratio_limit", 0.95): False,
        ("cnn", "16", "gossip_share", 0.05): True,
    }
    assert not verdicts([slow | {"node_steps_per_second": 200.0}, fast])["cnn", "16", "gossip_share", 0.05]


def test_bars_of_the_mlp_and_flat_gossip():
    rows = [a_row("mlp", n, "vmap nchw", gossip_us_per_worker=us) for n, us in ((4, 90), (16, 10), (256, 14))]
    assert verdicts(rows) == {
        ("mlp", "256", "ratio_limit", 2.0): False,
        ("mlp", "16-256", "gossip_flatness", 1.5): True,
    }
    rows[-1] |= {"ratio_limit": 2.1, "gossip_us_per_worker": 16.0}
    assert list(verdicts(rows).values()) == [True, False]
    assert describe(check_bars(rows)[1]).startswith("missed  mlp N=16-256 (vmap nchw): 1.6 <= 1.5")


def test_turns_alternate_and_ratios_are_within_a_turn():
    order = []
    sides = {"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}
    turns = take_turns(sides, 4)
    assert order == ["a", "b"] * 4 and turns == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert len(take_turns(sides, 10, enough=0.0, at_least=2)["a"]) == 2
    # The machine slows down threefold; the ratio within each turn does not.
    assert median_ratio([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == 2.0


def test_repeat_for_counts_calls_and_reads_the_clock_in_lots():
    calls = []
    count, seconds = repeat_for(0.01, lambda: calls.append(0), CPU, at_once=7)
    assert count == len(calls) and count % 7 == 0 and seconds >= 0.01
    assert repeat_for(0.0, lambda: None, CPU)[0] == 1
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch:
            repeat_for(0.005, lambda: None, CPU)
    assert 0.01 <= stopwatch.seconds() < 1.0


def failing_build():
    def measure(text):
        raise ValueError(text)

    return measure


def test_a_failing_process_says_why():
    with Probe(failing_build) as probe, pytest.raises(RuntimeError, match="ValueError: too bad"):
        probe("too bad")


def test_figures_are_consistent():
    figures = fleet_rounds(Setting("mlp", "cpu", "vmap"), 4, threads=1)(0.02)
    floats = 64 * 64 + 64 + 64 * 10 + 10
    assert figures["copy_bytes"] == 2 * 4 * floats * 4
    assert figures["gossip_bytes"] == (4 * 3 + 4) * floats * 4  # three rows read and one written a worker
    assert 0 < figures["gossip_seconds"] < figures["round_seconds"]
    assert figures["rate"] == pytest.approx(4 / figures["round_seconds"])
    loop = bare_loop(Setting("mlp", "cpu"), num_models=3)
    assert loop(0.0)["rate"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "cnm"], "Did you mean 'cnn'?"),
        (["--executions", "threads/nhwc"], "unknown execution"),
        (["--seconds", "0"], "must be positive"),
        (["--device", "cuda:99"], "not there"),
        (["--device", "tpu"], "unknown device"),
    ],
)
def test_bad_flags(flags, message, capsys):
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.slow
def test_the_command(tmp_path):
    out = tmp_path / "training.json"
    command = [sys.executable, "-m", "benchmarks.training", "--quick", "--models", "mlp", "--threads", "1"]
    command += ["--executions", "vmap/nchw", "--out", str(out)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    (row,) = record["rows"]
    assert row["model"] == "mlp" and row["workers"] == 4 and row["execution"] == "vmap nchw"
    assert row["ratio_limit"] == pytest.approx(median_ratio(row["turns"]["fleet"], row["turns"]["limit"]))
    assert 0 < row["gossip_share"] < 1 and row["peak_memory_mib"] > row["matrix_mib"]
    assert f"{row['node_steps_per_second']:.1f}" in done.stdout and record["machine"]["cores"] >= 1


def test_influence_ratios_are_over_the_unavoidable_work():
    turns = {part: [1.0, 2.0, 10.0] for part in PARTS}  # the machine slows down; ratios within a turn do not
    turns["cascade"], turns["cascade_replayed"] = [2.6, 5.2, 26.0], [3.0, 6.0, 30.0]
    checks = {c["part"]: c for c in ratios(turns, convolutional=False)}
    assert checks["dice_1"]["value"] == pytest.approx(1 / 3) and checks["dice_3"]["value"] == pytest.approx(1 / 7)
    assert checks["cascade"]["value"] == pytest.approx(2.6) and not checks["cascade"]["ok"]
    assert checks["cascade_replayed"]["value"] == pytest.approx(0.4) and checks["cascade_replayed"]["ok"]
    assert {c["part"]: c["ok"] for c in ratios(turns, convolutional=True)}["cascade"]
    assert describe_influence("mlp", checks["cascade"]) == "missed  mlp: cascade, states kept: 2.6 <= 2.5 of training"


@pytest.fixture(scope="module")
def scored():
    return ScoredRun(Case("mlp", "digits", 4, 16, 150, 2, 0.05, "vmap", False), threads=1, seconds=0.0)


def test_what_the_influence_benchmark_compares_agrees(scored):
    """Kept and replayed states give the same scores, and naive dice is dice."""
    assert len(list(Path(scored.folder.name).rglob("round-*"))) >= 2
    assert torch.equal(cascade(scored.kept), cascade(scored.run))
    scores_n, steps = dice(scored.kept, 1, 1), scored.run.num_steps
    for i in scored.job.train_ids[:3].tolist():
        size = len(scored.job.shards[scored.run.worker_of_n[i]])
        naive = naive_dice(scored.kept, scored.states, scored.t, i) * steps / size
        assert naive == pytest.approx(scores_n[i].item(), rel=1e-3)


def test_parts_of_influence_are_measured(scored):
    samples = len(scored.job.train_ids)
    assert set(scored.parts) == set(PARTS) and scored.describe()["samples"] == samples
    assert scored.one_pass.share == pytest.approx(samples / (3 * 4 * 16))
    for part in ("pass", "dice_2"):
        answer = scored.measure(part)
        assert answer["seconds"] > 0 and answer["peak_mib"] > 100


@pytest.mark.slow
def test_parts_of_a_colour_case_run():
    scored = ScoredRun(Case("resnet18", "3x32x32", 2, 2, 12, 1, 0.01, "threads", True), threads=1, seconds=0.0)
    assert scored.run.num_steps == 3 and scored.kept.states[0].shape == (2, scored.describe()["floats"])
    assert cascade(scored.kept).isfinite().all()


@pytest.mark.slow
def test_the_influence_command(tmp_path, capsys):
    out = tmp_path / "influence.json"
    assert influence_main(["--quick", "--models", "mlp", "--threads", "1", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["steps"] == 3 and set(row["seconds"]) == set(PARTS)
    assert "naive dice costs" in (printed := capsys.readouterr().out) and printed.count("mlp digits N=8 (vmap): ") == 7
    assert influence_main(["--models", "mpl"]) == 2 and "Did you mean 'mlp'?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rule_command(tmp_path, capsys):
    out = tmp_path / "rule.json"
    assert rule_main(["--quick", "--threads", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["model"]: row["rule"] for row in rows} == {"mlp": "threads nchw", "cnn": "threads channels_last"}
    assert all(row["fastest"] in row["rates"] and row["ratio"] > 0 for row in rows)
    assert "of 2 choices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "workers", "device", "engine"),
    [
        ("mlp", 8, "cpu", "vmap"),
        ("mlp", 7, "cpu", "threads"),
        ("mlp_wide", 64, "cpu", "threads"),
        ("cnn", 64, "cpu", "threads"),
        ("resnet18", 8, "cuda", "graph"),
        ("mlp", 64, "cuda", "vmap"),
    ],
)
def test_the_rule(model, workers, device, engine):
    assert rule(build_model(model), workers, device) == engine


@pytest.mark.parametrize(
    ("workers", "device", "batch_size", "engine"),
    [
        (8, "cpu", 32, "vmap"),
        (7, "cpu", 32, "threads"),
        (8, "cpu", 128, "threads"),  # PyTorch's fused kernel
        (8, "cuda", 128, "vmap"),  # where the fused kernel is not used
    ],
)
def test_the_rule_for_recurrent_networks(workers, device, batch_size, engine):
    assert rule(load_model("lstm", 3, (14, 5), seed=0), workers, device, None, batch_size) == engine


# ---- benchmarks.gpu, without one --------------------------------------------------------------------------------


def certify(tmp_path, *flags):
    """The command at its small sizes on the CPU, and its record."""
    out = tmp_path / "gpu.json"
    code = gpu.main(["--device", "cpu", "--quick", "--out", str(out), *flags])
    return code, json.loads(out.read_text())


@pytest.mark.slow
def test_the_gpu_command_runs_without_a_gpu(tmp_path, capsys):
    code, record = certify(tmp_path, "--only", "correctness-mlp", "speed-gossip")
    assert code == 0 and record["ok"] and record["complete"]
    assert list(record["checks"]) == ["correctness-mlp", "speed-gossip"]
    figures = [f for check in record["checks"].values() for f in check["figures"]]
    assert all(f["ok"] for f in figures) and [f["same_bits"] for f in figures[:2]] == [list(gpu_probes.DATA)] * 2
    names = {"graph = loop, at first", "graph that outlived eight fleets = loop", "vmap = loop, after eight fleets"}
    assert {f["what"] for f in figures} > names
    printed = capsys.readouterr().out
    assert printed.count("\nok  ") == len(figures) == 11 and "all met" in printed
    assert "ok      correctness-mlp: 0 <= 1e-09  graph = loop, at first" in printed


@pytest.mark.slow
def test_all_of_the_gpu_command_that_a_cpu_can_do(tmp_path):
    code, record = certify(tmp_path)
    assert code == 0 and list(record["checks"]) == [c.name for c in CHECKS if c.on_cpu]


def failing_check(task):
    yield figure("kept", 1.0)
    Probe(failing_build)("too bad")


def hanging_build():
    return lambda: time.sleep(600)


def hanging_check(task):
    yield figure("kept", 2.0)
    Probe(hanging_build)()


def killed_build():
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


def killed_check(task):
    yield figure("too much", 2.0, "scores")
    Probe(killed_build)()


@pytest.mark.slow
def test_a_check_that_fails_hangs_or_dies_leaves_the_others_alone(tmp_path, capsys, monkeypatch):
    checks = [failing_check, hanging_check, killed_check, lambda task: iter([figure("a figure", 3.0)])]
    names = ("fails", "hangs", "dies", "works")
    monkeypatch.setattr(gpu, "CHECKS", [
        Check(name, check, 2.0 if name == "hangs" else 60.0, on_cpu=True)
        for name, check in zip(names, checks, strict=True)
    ])  # fmt: skip
    code, record = certify(tmp_path)
    results = record["checks"]
    assert code == 1 and not record["ok"] and record["complete"]
    assert [results[name]["ok"] for name in names] == [False, False, False, True]
    assert results["fails"]["failure"] == "ValueError: too bad" and "Traceback" in results["fails"]["traceback"]
    assert results["hangs"]["failure"].startswith("not done after 2 s: a measuring process ended with code -9")
    assert results["hangs"]["seconds"] < 30 and "code -9" in results["dies"]["failure"]
    assert [results[name]["figures"][0]["value"] for name in names] == [1.0, 2.0, 2.0, 3.0]
    printed = capsys.readouterr().out
    assert "failed  fails: ValueError: too bad" in printed and "not met: fails, hangs, dies;" in printed
    assert "missed  dies: 2 <= 1e-06  too much" in printed and "ok      works: 3  a figure" in printed


def test_a_killed_command_keeps_what_was_done(tmp_path, monkeypatch):
    def interrupted(task):
        yield figure("done", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "CHECKS", [Check("interrupted", interrupted, 60.0, on_cpu=True)])
    with pytest.raises(KeyboardInterrupt):
        certify(tmp_path)
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["checks"]["interrupted"]["figures"][0]["value"] == 1.0 and not record["complete"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda:99"], "not there" if torch.cuda.is_available() else "there is no GPU here to certify"),
        (["--device", "tpu"], "unknown device"),
        (["--device", "cpu"], "add --quick"),
        (["--device", "cpu", "--quick", "--only", "cascad", "spede"], "unknown check (--only) 'spede'"),
        (["--device", "cpu", "--quick", "--only", "busy"], "nothing to check"),
    ],
)
def test_bad_flags_of_the_gpu_command(flags, message, capsys):
    assert gpu.main(flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_figures_are_held_against_their_bars():
    assert figure("x", 0.8, "one_model")["ok"] and not figure("x", 0.79, "one_model")["ok"]
    assert not figure("x", float("nan"), "distance")["ok"] and figure("x", float("nan"))["ok"]
    pairs = {"plain": {"distance": 0.0, "same_bits": True}, "ragged": {"distance": float("nan"), "same_bits": False}}
    assert not (worst := pair_figure("x", pairs))["ok"] and worst["same_bits"] == ["plain"]
    assert judged(figure("x", 1.0, "waits"), "who", "what") == "missed  who: 1 <= 0  what"


def test_the_reason_is_one_line():
    advice = "CUDA error: an illegal memory access\nCUDA kernel errors might be reported later.\n\n"
    assert reason(f"failed:\nTraceback:\n  File x\n    y()\nRuntimeError: {advice}") == f"RuntimeError: {advice[:36]}"
    assert reason("warning: a\nerror: b\n") == "error: b" and reason("") == "it said nothing"


def test_time_of_the_gpu_counts_overlaps_once():
    assert gpu_probes.covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 4.0 and gpu_probes.covered([]) == 0
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=1e6, end=3e6), is_user_annotation=note)
        for kind, note in ((cuda, False), (cpu, False), (cuda, True))
    ]
    assert list(gpu_probes.kernels(SimpleNamespace(events=lambda: events))) == [(1.0, 3.0)]


def test_waits_are_counted_by_place():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at x)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    [(place, count)] = gpu_probes.places(caught).items()
    assert place.startswith("test_benchmarks.py:") and count == 2


def test_a_command_is_timed_in_process(tmp_path, monkeypatch):
    monkeypatch.setattr("training.trainer.Trainer", training.trainer.Trainer)  # it is replaced: put it back
    flags = ["--model", "mlp", "--max_train", "200", "--epochs", "1", "--no-plots", "--quiet", "--device", "cpu"]
    answer = gpu_probes.command_times([*flags, "--results_dir", str(tmp_path)])("run", False)
    assert 0 < answer["training"] < answer["command"] and answer["busy"] == 0
    assert (tmp_path / "run" / "stage1" / "summary.json").exists()


def test_a_command_that_fails_says_why(tmp_path):
    task = Task("cpu", True, tmp_path, time.monotonic() + 60)
    with pytest.raises(RuntimeError, match="code 2: error: .*--lr"):
        finish(task, [sys.executable, "main.py", "--lr", "-1"])


def test_bytes_of_a_gossip():
    moved = [gpu_probes.bytes_moved(mode, 16, 10) for mode in ("copy", "ring", "exponential", "all")]
    assert moved == [320, 640, 960, 320]
