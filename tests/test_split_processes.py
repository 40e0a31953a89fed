"""A network in stages over processes: the numbers of the whole network, kills, restarts, other commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from command import load, same_tensors, summary

from tests.split_jobs import CASES, config_of
from tests.test_distributed import ENVIRONMENT, ODD_RANK, ROOT, TORCHRUN
from tests.test_split import without_costs
from training import checkpoint
from training.run import run_folder, train_run

MESH = pytest.mark.mesh
SLOW = pytest.mark.slow


@pytest.mark.parametrize("processes", [pytest.param(2, marks=SLOW), *(pytest.param(p, marks=MESH) for p in (3, 4))])
def test_stages_over_processes_are_the_whole_network(tmp_path, processes):
    command = [*TORCHRUN, f"--nproc-per-node={processes}", str(ROOT / "tests/split_jobs.py"), str(tmp_path / "many")]
    (tmp_path / "many").mkdir()
    done = subprocess.run(command, env=ENVIRONMENT, timeout=800, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in [name for name, (_, wanted) in CASES.items() if wanted == processes]:
        unsplit = config_of(name, tmp_path / "one", stages=1, microbatches=1, schedule="gpipe", split_at=())
        train_run(unsplit, run_folder(unsplit) / "stage1")
        one, many = (tmp_path / folder / name / "stage1" for folder in ("one", "many"))
        tolerance = 1e-5 if "float32" in name else 1e-9
        left, right = (checkpoint.latest(d / "checkpoints").tensors for d in (one, many))
        torch.testing.assert_close(right, left, rtol=0, atol=tolerance, msg=name)
        lines, ends = zip(*map(without_costs, (one, many)), strict=True)
        assert len(lines[0]) == len(lines[1]) > 1, name
        for left, right in zip(*lines, strict=True):
            losses = [line.pop("train_loss") or 0.0 for line in (left, right)]  # none at the start
            assert losses[0] == pytest.approx(losses[1], rel=1e-5), name
            assert left == {k: pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in right.items()}, name
        assert ends[0]["rounds"] == ends[1]["rounds"] and ends[0]["stopped_early"] == ends[1]["stopped_early"]
        settings, end = config_of(name, ""), summary(many)
        if settings.batch_size % settings.microbatches == 0 and "ragged" not in name:  # else zeros are sent too
            assert end["bytes"] - summary(one)["bytes"] == load(tmp_path / "many" / f"{name}.json"), name
    assert ends[1]["stopped_early"] or processes != 3


def lines_of(process: subprocess.Popen) -> tuple[int, list[str]]:
    """How it ends, and the errors that it prints."""
    _, said = process.communicate(timeout=800)
    return process.returncode, [line for line in said.splitlines() if line.startswith("error: ")]


def started(script: Path, folder: Path, *flags: str, restarts: int = 0, processes: int = 2) -> subprocess.Popen:
    """Two stages that train, in one pipeline or more."""
    words = ["--model", "mlp", "--num_workers", "1", "--protocol", "local", "--stages", "2", "--schedule", "1f1b",
             "--microbatches", "4", "--max_train", "300", "--dtype", "float64", "--quiet", "--no-plots",
             "--results_dir", str(folder), "--run_name", "run", *flags]  # fmt: skip
    command = [*TORCHRUN, f"--nproc-per-node={processes}", f"--max-restarts={restarts}", str(script), *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def stage_process(process: subprocess.Popen, rank: int) -> int:
    """The process id of a stage."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError("no such stage")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("rank", "kind"),
    [
        pytest.param(0, signal.SIGKILL, marks=MESH),
        pytest.param(1, signal.SIGKILL, marks=SLOW),
        pytest.param(1, signal.SIGSTOP, marks=MESH),
    ],
)
def test_a_lost_stage_is_named(tmp_path, rank, kind):
    """One that is killed by those that wait for it, one that hangs after a time (here two seconds)."""
    script = tmp_path / "main.py"
    patch = "from datetime import timedelta\nfrom workers import distributed\ndistributed.STEP = timedelta(seconds=2)"
    script.write_text(ODD_RANK.format(root=str(ROOT), extra=[], patch=patch))
    process = started(script, tmp_path, "--epochs", "100000", "--eval_every", "50", "--checkpoint_every", "50")
    wait_for(tmp_path / "run" / "stage1" / "checkpoints" / "round-*", process)
    os.kill(stage_process(process, rank), kind)
    _, said = process.communicate(timeout=800)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0 and len(errors) <= 1 and "UNSHARD" not in said, said
    assert "pipeline.py" not in said, said  # torchrun prints a traceback of its own, a stage none
    for line in errors:
        assert f"stage {rank + 1} of 2 no longer answers" in line and "--resume" in line
    # On a busy machine torchrun may end the other process before it has said so, and names the rank itself.
    assert errors or f"rank      : {rank} " in said, said


@MESH
@pytest.mark.parametrize("pipelines", [1, 2])
def test_a_killed_stage_is_restarted_and_ends_the_same(tmp_path, pipelines):
    flags = ("--epochs", "40", "--checkpoint_every", "3")
    if pipelines == 2:
        flags += ("--num_workers", "3", "--protocol", "gossip", "--min_shard", "5")
    whole = started(ROOT / "main.py", tmp_path / "whole", *flags, processes=2 * pipelines)
    assert lines_of(whole)[0] == 0
    killed = started(ROOT / "main.py", tmp_path / "killed", *flags, restarts=1, processes=2 * pipelines)
    wait_for(tmp_path / "killed" / "run" / "stage1" / "checkpoints" / "round-*", killed)
    os.kill(stage_process(killed, 2 * pipelines - 1), signal.SIGKILL)
    assert lines_of(killed)[0] == 0
    ends = [tmp_path / name / "run/stage1/model.safetensors" for name in ("whole", "killed")]
    assert same_tensors(*ends)
    assert without_costs(tmp_path / "whole/run/stage1") == without_costs(tmp_path / "killed/run/stage1")


@pytest.mark.parametrize("flag", [pytest.param("--microbatches", marks=SLOW), pytest.param("--split_at", marks=MESH)])
def test_stages_of_other_commands_are_refused(tmp_path, flag):
    script = tmp_path / "odd.py"
    script.write_text(ODD_RANK.format(root=str(ROOT), extra=[flag, "3"], patch=""))
    code, errors = lines_of(started(script, tmp_path, "--epochs", "1"))
    assert code != 0 and errors and all("process 1" in line and flag in line for line in errors), errors
