"""The comparison with Flower: both sides train the same job, turns, memory of a family of processes, bars."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from benchmarks.peers import FLOWER, OURS, OURS_AMP, check_bars, main, same_job
from benchmarks.peers_jobs import BATCH, JOBS, SEED
from benchmarks.peers_process import Side, family, memory_mib
from data.batches import Batches


@pytest.mark.parametrize("job", JOBS.values(), ids=list(JOBS))
def test_a_client_of_flower_gets_the_batches_of_the_fleet(job):
    nodes = torch.arange(3)
    batches = Batches([job.shard(k) for k in nodes.tolist()], BATCH, SEED)
    for number in range(2):
        steps = [batches.ids(torch.full((3,), number * job.steps + s)) for s in range(job.steps)]
        for k in nodes.tolist():
            assert torch.equal(job.epoch(k, number), torch.cat([ids_NB[k] for ids_NB in steps]))
    assert len(job.shard(0).unique()) == job.samples and not torch.equal(job.shard(0), job.shard(1))


@pytest.mark.slow
def test_a_side_trains_in_turns_and_learns(capfd):
    side = Side([sys.executable, "-m", "benchmarks.peers_fleet", "overhead", "1"])
    try:
        first, long = side.turn(1e-9), side.turn(0.5)
    finally:
        side.close()
    assert side._process.returncode == 0
    assert first["rounds"] == 1 == len(first["losses"])
    assert long["seconds"] >= 0.5 and long["rounds"] == len(long["losses"]) > 1
    assert side.about["losses"][0] > first["losses"][0] > long["losses"][-1]
    assert side.startup_seconds > 0 and side.peak_memory_mib > 50


def test_a_side_that_fails_says_why():
    with pytest.raises(RuntimeError, match="ended with code 1:(.|\n)*ValueError: too bad"):
        Side([sys.executable, "-c", "raise ValueError('too bad')"])


def hold(statements: str) -> subprocess.Popen:
    """A process that has run these statements, until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{statements}\nprint(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    process.stdout.readline()
    return process


@pytest.mark.skipif(memory_mib([os.getpid()]) is None, reason="the system does not tell")
def test_memory_counts_descendants_and_what_is_shared_once(tmp_path):
    file, imports = tmp_path / "shared", "import mmap, os, subprocess, sys"
    file.write_bytes(b"1" * (32 << 20))
    mapping = f"{imports}\nx = mmap.mmap(os.open({str(file)!r}, os.O_RDWR), 0); x[::4096]"
    big = "x = b'1' * (64 << 20); print(flush=True); input()"
    start = f"y = subprocess.Popen([sys.executable, '-c', {big!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)"
    processes = [
        hold(imports),
        hold(f"{imports}\n{start}; y.stdout.readline()"),
        hold(mapping),
        hold(mapping),
    ]
    plain, parent, one, other = (process.pid for process in processes)
    try:
        base = memory_mib([plain])
        assert len(family(parent)) == 2 and family(plain) == [plain]
        assert memory_mib(family(parent)) - base == pytest.approx(64, abs=16)  # and a second interpreter
        assert memory_mib([one]) - base == pytest.approx(32, abs=8)
        assert memory_mib([one, other]) - memory_mib([one]) == pytest.approx(0, abs=16)
    finally:
        for process in processes:
            process.communicate()
    assert memory_mib([plain]) is None


def a_row(side, ratio=1.0, loss=2.0):
    return {"side": side, "ratio": ratio, "second_loss": loss}


def test_bars():
    rows = [a_row(FLOWER), a_row(OURS, 1.9), a_row(OURS_AMP, 2.9)]
    checks = check_bars(JOBS["compute"], rows, fast_bf16=True)
    assert [(c["side"], c["bound"], c["ok"]) for c in checks] == [(OURS, 1.8, True), (OURS_AMP, 3.0, False)]
    assert [c["side"] for c in check_bars(JOBS["compute"], rows, fast_bf16=False)] == [OURS]
    assert not check_bars(JOBS["overhead"], [a_row(OURS, 79.9)], False)[0]["ok"]
    assert check_bars(JOBS["overhead"], [a_row(OURS, None)], False) == []


def test_the_same_job_has_the_same_loss():
    assert same_job([a_row(FLOWER, loss=2.0), a_row(OURS, loss=2.001), a_row(OURS_AMP, loss=2.1)])
    assert not same_job([a_row(FLOWER, loss=2.0), a_row(OURS, loss=2.003)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs", "computer"], "Did you mean 'compute'?"),
        (["--repeats", "0"], "must be positive"),
        (["--flower-python", "/nowhere/python"], "not a Python that runs"),
    ],
)
def test_bad_flags(flags, message, capsys):
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is not None, reason="this Python has Flower's simulation")
def test_without_flower_ours_is_timed_alone(tmp_path, capsys):
    assert main(["--flower-python", sys.executable]) == 2
    assert "lacks flwr, ray" in capsys.readouterr().err
    out = tmp_path / "peers.json"
    flags = ["--jobs", "overhead", "--seconds", "0.1", "--repeats", "1", "--threads", "1", "--out", str(out)]
    assert main(flags) == 0
    printed, record = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.count("--flower-python") == 1
    (row,) = record["rows"]
    assert row["side"] == OURS and row["ratio"] is None and record["bars"] == []
    assert f"{row['node_steps_per_second']:.1f}" in printed
    job = JOBS["overhead"]
    assert row["node_steps_per_second"] * row["round_seconds"] == pytest.approx(job.nodes * job.steps)
