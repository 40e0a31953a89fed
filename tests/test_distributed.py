"""The same run over several processes: the same bits, the bytes of the formula, and faults."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command import same_tensors

import main
import main_pruned
from tests.torchrun_jobs import ALGORITHMS, MEAN, MODES, config_of
from training import checkpoint
from training.build import find_device
from training.run import run_folder, train_run
from utils.lock import locked
from utils.topology import build_topology
from workers import distributed
from workers.distributed import block

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for mode in MODES:
        config = config_of(mode, folder)
        train_run(config, run_folder(config) / "stage1")
    config = config_of("ring", folder, protocol="fedavg", fraction_fit=0.5)
    train_run(config, run_folder(config).with_name("fedavg") / "stage1")
    for name, settings in ALGORITHMS.items():
        config = config_of(name, folder, **settings)
        train_run(config, run_folder(config) / "stage1")
    return folder


def final(run_dir):
    return checkpoint.latest(run_dir / "checkpoints").tensors


def boundary_rows(mode, processes):
    """Rows that cross process boundaries in the rounds of a period, by the mixing matrices."""
    total = []
    for matrix in build_topology(mode, 8, 0).matrices:
        crossing = set()
        for p in range(processes):
            mine = block(8, p, processes)
            needed = np.unique(matrix[mine.start : mine.stop].indices)
            crossing |= {(p, int(l)) for l in needed if l not in mine}
        total.append(len(crossing))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_run_is_the_same_over_processes(alone, tmp_path, processes):
    subprocess.run(
        [*TORCHRUN, f"--nproc-per-node={processes}", str(ROOT / "tests/torchrun_jobs.py"), str(tmp_path)],
        check=True,
        env=ENVIRONMENT,
        timeout=800,
        capture_output=True,
    )
    for name in ALGORITHMS:
        left, right = (final(folder / name / "stage1") for folder in (alone, tmp_path))
        assert left.keys() == right.keys()
        for tensor in left:
            if name in MEAN:
                torch.testing.assert_close(left[tensor], right[tensor], rtol=1e-5, atol=1e-6, msg=f"{name} {tensor}")
            else:
                assert torch.equal(left[tensor], right[tensor]), (name, tensor)
        summaries = [json.loads((f / name / "stage1/summary.json").read_text()) for f in (alone, tmp_path)]
        assert summaries[0]["bytes"] == summaries[1]["bytes"] > 0
    for mode in (*MODES, "fedavg"):
        one, many = alone / mode / "stage1", tmp_path / mode / "stage1"
        for name in ("rows", "momentum"):
            left, right = final(one)[name], final(many)[name]
            if mode in ("ring", "exponential_one_peer", "random", "grid", "star") or processes == 1:
                assert torch.equal(left, right), mode
            else:
                torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
        lines = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (one, many)]
        assert len(lines[0]) == len(lines[1])
        for left, right in zip(*lines, strict=True):
            assert left["round"] == right["round"] and left["bytes"] == right["bytes"]
            assert left["worker_val_loss"] == pytest.approx(right["worker_val_loss"], rel=1e-5)
            if left["round"] > 0:
                assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-5)
        summary = json.loads((many / "summary.json").read_text())
        if processes > 1:
            rounds, row = summary["rounds"], 4 * 4810
            if mode in ("ring", "exponential_one_peer", "grid", "star"):
                rows = boundary_rows(mode, processes)
                assert summary["crossed_bytes"] == sum(rows[r % len(rows)] for r in range(rounds)) * row
            elif mode in ("all", "fedavg"):
                assert summary["crossed_bytes"] == rounds * processes * (2 * (processes - 1) * row // processes)
        if mode in ("ring", "exponential_one_peer", "random", "grid", "star") or processes == 1:
            assert same_tensors(one / "model.safetensors", many / "model.safetensors")
            distances = [[line["consensus_distance"] for line in run] for run in lines]
            assert distances[0] == distances[1]
        assert (many / "model.safetensors").exists() and len(list((many / "checkpoints").iterdir())) == processes


@pytest.mark.slow
def test_pruning_works_on_a_run_of_several_processes(tmp_path):
    flags = [
        "--model",
        "mlp",
        "--epochs",
        "2",
        "--max_train",
        "300",
        "--quiet",
        "--no-plots",
        "--engine",
        "threads",
        "--threads",
        "1",
        "--results_dir",
        str(tmp_path),
        "--run_name",
        "r",
    ]
    subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", str(ROOT / "main.py"), *flags],
        check=True,
        env=ENVIRONMENT,
        timeout=800,
        capture_output=True,
    )
    assert main_pruned.main([*flags, "--pruning_algorithm", "cascade", "--train_ratio", "0.8"]) == 0
    assert (tmp_path / "r" / "comparison.json").exists()


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_ends_the_same(tmp_path):
    def command(name):
        return [
            *TORCHRUN,
            "--nproc-per-node=2",
            "--max-restarts=1",
            str(ROOT / "main.py"),
            "--model",
            "mlp",
            "--epochs",
            "60",
            "--quiet",
            "--no-plots",
            "--engine",
            "threads",
            "--threads",
            "1",
            "--results_dir",
            str(tmp_path),
            "--run_name",
            name,
            "--checkpoint_every",
            "3",
        ]

    subprocess.run(command("undisturbed"), check=True, env=ENVIRONMENT, timeout=800, capture_output=True)
    process = subprocess.Popen(command("killed"), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed" / "stage1" / "checkpoints"
    deadline = time.time() + 800
    while len(checkpoint.stored(folder)) < 2 and time.time() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(timeout=800) == 0
    left, right = final(tmp_path / "undisturbed" / "stage1"), final(tmp_path / "killed" / "stage1")
    assert torch.equal(left["rows"], right["rows"]) and torch.equal(left["momentum"], right["momentum"])
    rounds = [json.loads(line)["round"] for line in (tmp_path / "killed/stage1/metrics.jsonl").read_text().splitlines()]
    assert rounds == sorted(set(rounds))


def test_a_checkpoint_that_lacks_a_part_is_passed_over(tmp_path):
    tensors = {"rows": torch.randn(2, 5), "momentum": torch.randn(2, 5)}
    for r in (1, 2):
        for part in range(2):
            checkpoint.write(tmp_path, checkpoint.Checkpoint(r, tensors, {}), part=part, parts=2)
    assert checkpoint.latest(tmp_path).round == 2 and len(checkpoint.latest(tmp_path).tensors["rows"]) == 4
    (tmp_path / "round-00000002.part-1-of-2.safetensors").unlink()
    with pytest.warns(UserWarning, match="missing"):
        assert checkpoint.latest(tmp_path).round == 1


# ---- processes that do not fit ------------------------------------------------------------------------


ODD_RANK = """
import os, runpy, sys
sys.path.insert(0, {root!r})
flags = sys.argv[1:]
if os.environ["RANK"] == "1":
    flags += {extra!r}
sys.argv = ["main.py", *flags]
{patch}
runpy.run_path({root!r} + "/main.py", run_name="__main__")
"""


def start_with_an_odd_rank(tmp_path, extra, patch=""):
    """Two processes, of which the second has ``extra`` flags, or other code; what they print and their exit code."""
    script = tmp_path / "odd.py"
    script.write_text(ODD_RANK.format(root=str(ROOT), extra=list(extra), patch=patch))
    flags = ["--model", "mlp", "--epochs", "2", "--quiet", "--no-plots", "--results_dir", str(tmp_path / "results")]
    result = subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", str(script), *flags],
        env=ENVIRONMENT,
        timeout=800,
        capture_output=True,
        text=True,
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return result.returncode, errors


OTHER_PIXELS = """
if os.environ["RANK"] == "1":
    from utils import registry
    digits = registry.load(registry.DATASETS, "digits", "data set")
    def changed(*arguments):
        arrays = digits(*arguments)
        arrays.inputs_n[0, 0, 0, 0] += 1
        return arrays
    registry.DATASETS["digits"] = changed
"""


@pytest.mark.parametrize(
    ("extra", "patch", "words"),
    [
        (["--epochs", "3"], "", "--epochs"),
        pytest.param(["--lr", "0.01"], "", "--lr", marks=pytest.mark.slow),
        pytest.param(["--seed", "1"], "", "--seed", marks=pytest.mark.slow),
        pytest.param(["--checkpoint_every", "2"], "", "--checkpoint_every", marks=pytest.mark.slow),
        pytest.param([], OTHER_PIXELS, "data", marks=pytest.mark.slow),
    ],
)
def test_processes_that_differ_are_refused(tmp_path, extra, patch, words):
    code, errors = start_with_an_odd_rank(tmp_path, extra, patch)
    assert code != 0 and errors and all("process 1" in line and words in line for line in errors), errors
    assert not list((tmp_path / "results").glob("*/stage1/summary.json"))


@pytest.mark.slow
def test_what_a_process_may_have_of_its_own(tmp_path):
    code, errors = start_with_an_odd_rank(tmp_path, ["--threads", "1", "--dataset_path", str(tmp_path)])
    assert (code, errors) == (0, [])


def test_every_process_takes_a_gpu_of_its_own(monkeypatch):
    """Before the group begins: NCCL looks for the process on its current GPU. Signals go over gloo, on the CPU."""
    done = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("set_device", str(device))))
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, timeout: iter([(None, 1, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: done.append(("init", backend)))
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_set_pg_timeout", lambda timeout: None)
    distributed.join(find_device("cuda"))
    assert done == [("set_device", "cuda:1"), ("init", "cpu:gloo,cuda:nccl")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lock", "data"])
def test_what_process_0_refuses_ends_all_in_a_line(tmp_path, kind):
    """A folder in use and data that changed: the others do not wait for a process that has given up."""
    words = ["--model", "mlp", "--max_train", "300", "--num_workers", "4", "--epochs", "1", "--no-plots", "--quiet",
             "--results_dir", str(tmp_path), "--run_name", "run"]  # fmt: skip
    with contextlib.ExitStack() as held:
        if kind == "lock":
            held.enter_context(locked(tmp_path / "run"))
        else:
            assert main.main(words) == 0
            path = tmp_path / "run" / "stage1" / "config.json"
            record = json.loads(path.read_text())
            record["identity"]["digest"] = record["identity"]["data"]["inputs"] = "0" * 64
            path.write_text(json.dumps(record))
            (path.parent / "summary.json").unlink()
        command = [*TORCHRUN, "--nproc-per-node", "2", str(ROOT / "main.py"), *words, "--resume"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=800, check=False)
    said = {"lock": "is in use by process", "data": "the data are not those"}[kind]
    assert done.returncode != 0 and said in done.stderr and "[rank" not in done.stderr, done.stderr
