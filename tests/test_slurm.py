"""Coalitions as jobs of a real SLURM of one node: the same bits as here, also where a job is killed in the middle."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.command import refused
from tests.slurm_node import missing, run, slurm, wait_for
from tests.test_architecture import ROOT
from utils.awaited import AWAITS
from valuation.__main__ import main

pytestmark = pytest.mark.slurm

FLAGS = ("--quiet", "--no-plots", "--engine", "threads", "--threads", "1", "--num_workers", "4", "--epochs", "12",
         "--valuations", "equal", "--partition", "dirichlet")  # fmt: skip


@pytest.fixture(scope="module")
def node():
    if missing():
        pytest.skip(f"not installed: {', '.join(missing())}")
    pytest.importorskip("dask_jobqueue")
    with tempfile.TemporaryDirectory(prefix="sl") as folder, slurm(Path(folder)):
        yield Path(folder)


def coalitions(folder: Path) -> list:
    lines = [json.loads(line) for line in folder.joinpath("valuation/coalitions.jsonl").read_text().splitlines()]
    return sorted((line["members"], line["utility"], line["by_test"], line["rounds"]) for line in lines)


def test_a_job_that_is_killed_is_made_again_and_the_bits_are_those_of_here(node, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("queue: here\nmemory: 1GB\n")
    flags = [*FLAGS, "--results_dir", str(tmp_path)]
    killed = []

    def kill() -> None:
        path = tmp_path / "there/valuation/coalitions.jsonl"
        while not killed:
            running = run("squeue", "-h", "-t", "R", "-o", "%i").split()
            if running and path.exists() and path.read_text().count("\n") >= 2:
                run("scancel", running[0])
                killed.append(running[0])
            time.sleep(0.1)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    elsewhere = ["--cluster", "slurm:2", "--cluster_options", str(options)]
    assert main([*flags, "--run_name", "there", *elsewhere]) == 0
    assert killed
    assert main([*flags, "--run_name", "here"]) == 0
    assert coalitions(tmp_path / "there") == coalitions(tmp_path / "here") and len(coalitions(tmp_path / "here")) == 15
    wait_for(lambda: not run("squeue", "-h").split())  # nothing is left in the queue


def test_recipes_as_an_array_that_is_cancelled_and_started_again(node, tmp_path, capsys):
    """The line that is printed, as it is."""
    flags = [*FLAGS, "--num_workers", "2", "--results_dir", str(tmp_path)]
    there = [*flags, "--run_name", "there", "--cluster", "recipes"]
    assert main(there) == AWAITS
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  sbatch ")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    jobs = tmp_path / "there/valuation/jobs"

    def start() -> None:
        subprocess.run(line, shell=True, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)

    start()
    wait_for(lambda: list(jobs.glob("*.result.json")), 300)
    run("scancel", *run("squeue", "-h", "-o", "%i").split())
    wait_for(lambda: not run("squeue", "-h").split())
    first = {path: path.read_bytes() for path in jobs.glob("*.result.json")}
    assert 0 < len(first) < 3 and main([*there, "--resume"]) == AWAITS
    start()
    wait_for(lambda: not run("squeue", "-h").split(), 300)
    assert first.items() <= {path: path.read_bytes() for path in jobs.glob("*.result.json")}.items()
    assert main([*there, "--resume"]) == main([*flags, "--run_name", "here"]) == 0
    assert coalitions(tmp_path / "there") == coalitions(tmp_path / "here") and len(coalitions(tmp_path / "here")) == 3


@pytest.mark.parametrize("text,words", [("queue: [", "no YAML"), ("- a\n", "NAME: VALUE"), ("colour: red\n", "colour")])
def test_options_that_are_none_are_refused(node, tmp_path, capsys, text, words):
    options = tmp_path / "options.yaml"
    options.write_text(text)
    flags = [*FLAGS, "--results_dir", str(tmp_path), "--cluster", "slurm:1", "--cluster_options", str(options)]
    assert words in refused(capsys, main(flags))
