"""Retraining in other processes: workers that are killed, schedulers that go away, files that name one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import pytest
from command import arguments, prune, refused

import main_pruned
from federated.processes import descendants
from utils.parser import parse
from utils.pruning_args import PruningConfig

ROOT = Path(main_pruned.__file__).parent
AUDIT = ("--epochs", "6", "--audit", "--audit_groups", "12", "--methods", "random", "--engine", "threads",
         "--memory_gb", "1e-9")  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def finished(folder: Path) -> int:
    """Retrainings that the audit has kept."""
    return sum(len(command.load(path)["values"]) for path in (folder / "run").glob("retrainings-*.json"))


def wait_for(condition, seconds: float = 800) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """main_pruned.py in a process of its own, once it has kept a retraining."""
    words = [sys.executable, str(ROOT / "main_pruned.py"), *arguments(folder, *AUDIT, *flags)]
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for(lambda: finished(folder) > 0 or process.poll() is not None)
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The audit in this process."""
    return command.load(prune(tmp_path_factory.mktemp("whole"), *AUDIT) / "audit.json")


@pytest.mark.slow
def test_a_killed_worker_is_replaced(tmp_path, undisturbed):
    process = start(tmp_path, "--cluster", "local:2")
    children = [p for p in descendants(process.pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(children[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=800)
    assert process.returncode == 0, errors
    assert command.load(tmp_path / "run" / "audit.json") == undisturbed


@pytest.mark.slow
def test_a_scheduler_that_goes_away_costs_nothing_that_had_ended(tmp_path, undisturbed):
    from federated.processes import free_port

    port = free_port()
    dask = [sys.executable, "-m", "dask"]
    quiet = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    address = f"tcp://127.0.0.1:{port}"
    scheduler = subprocess.Popen(
        [*dask, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"], **quiet
    )
    worker = subprocess.Popen([*dask, "worker", address, "--nthreads", "1", "--no-dashboard", "--no-nanny"], **quiet)
    try:
        process = start(tmp_path, "--cluster", address)
        scheduler.kill()
        _, errors = process.communicate(timeout=800)
        [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2 and address in line and "Traceback" not in errors
    finally:
        for other in (scheduler, worker):
            other.kill()
            other.wait()
    kept = finished(tmp_path)
    assert kept > 0
    prune(tmp_path, *AUDIT)
    assert command.load(tmp_path / "run" / "audit.json") == undisturbed


def test_a_record_does_not_say_where_to_connect(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"config": {"cluster": "tcp://10.1.2.3:8786", "model": "mlp"}}))
    assert parse(PruningConfig, ["--config", str(config)], "").cluster is None
    assert parse(PruningConfig, ["--config", str(config), "--cluster", "local:2"], "").cluster == "local:2"


@pytest.mark.slow  # Dask tries for ten seconds
def test_no_cluster_there(tmp_path, capsys):
    code = main_pruned.main(arguments(tmp_path, *AUDIT, "--cluster", "tcp://127.0.0.1:9"))
    assert "tcp://127.0.0.1:9" in refused(capsys, code)


def test_a_machine_with_other_data_is_refused(tmp_path):
    import dataclasses

    from training.pruning import open_stage1
    from training.recipe import Recipe, done

    prune(tmp_path, "--stage", "1")
    config = parse(PruningConfig, arguments(tmp_path), "")
    stage1 = open_stage1(config)
    recipe = Recipe.of("retrainings", stage1.job, {"rounds": stage1.run.rounds, "target": "nodes", "removed": [[]]})
    [value] = recipe.value_of(done(json.dumps(recipe.to_json())), "there")
    assert value == pytest.approx(stage1.summary["test_loss"], rel=0.5)  # that of the validation set
    with pytest.raises(ValueError, match="data, files or settings"):
        done(json.dumps(dataclasses.replace(recipe, run="0" * 64).to_json()))
