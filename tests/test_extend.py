"""To add something takes one file (or function) and one line: as the README says, tried on a copy of the project."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("utils", "networks", "data", "workers", "training", "visualization")

PIECES = {  # registry: the file of a new entry, what it holds, and its line
    "TOPOLOGIES": (
        "utils/pairs.py",
        '''"""A topology: neighbours in pairs."""

import scipy.sparse as sp


def pairs(num_workers, **_):
    """Workers 0 and 1 average, 2 and 3, ...; in the next round 1 and 2, 3 and 4, ..."""
    even = sp.block_diag([[[0.5, 0.5], [0.5, 0.5]]] * (num_workers // 2), format="csr")
    order = [(k + 1) % num_workers for k in range(num_workers)]
    return even, even[order][:, order]
''',
        '"toy": "utils.pairs:pairs",',
    ),
    "PROTOCOLS": (
        "training/protocols/seldom.py",
        '''"""A protocol: gossip every other round."""

import dataclasses

from training.protocols.gossip import Gossip


class Seldom(Gossip):
    """Who averages in even rounds, averages with its neighbours."""

    def plan(self, job, r):
        """Everybody trains."""
        plan = super().plan(job, r)
        return plan if r % 2 == 0 else dataclasses.replace(plan, mixing=None, messages=0)
''',
        '"toy": "training.protocols.seldom:Seldom",',
    ),
    "TASKS": (
        "data/counts.py",
        '''"""A task: how often something happens (Poisson regression)."""

import numpy as np
import torch

from data.task import Metric, Task, wide


class Counts(Task):
    """Targets: whole numbers [m]; the network gives the logarithm of the rate."""

    kind = "toy"
    metrics = (Metric("error", False, "events"),)

    def misfit(self, targets_m):
        return None if (targets_m >= 0).all() else "counts are below 0"

    def losses(self, outputs_nBC, targets_nB):
        log_rate_nB = wide(outputs_nBC)[..., 0]
        return log_rate_nB.exp() - targets_nB * log_rate_nB

    def strata(self, targets_m):
        return (targets_m > 3).long()

    def stratum_names(self, targets_m):
        return ["few", "many"]

    def predicted(self, outputs):
        return wide(outputs).exp()

    def score(self, predicted_m, targets_m):
        return float(np.abs(predicted_m[:, 0] - targets_m).mean())

    def of_outputs(self, outputs_RmC, targets_m):
        rates_Rm = outputs_RmC[..., 0].double().cpu().exp()
        return {"error": (rates_Rm - targets_m.double().cpu()).abs().mean(1)}

    def by_output(self, predicted_m, targets_m):
        return {"error_by_output": {"events": self.score(predicted_m, targets_m)}}

    def residuals(self, outputs_mC, targets_m):
        return outputs_mC.exp() - targets_m[:, None]

    def curvatures(self, outputs_mC, targets_m):
        return outputs_mC.exp()
''',
        '"toy": "data.counts:Counts",',
    ),
    "DATASETS": (
        "data/dots.py",
        '''"""A data set: pictures of dots, which are to be counted."""

import torch

from data.arrays import Arrays
from data.counts import Counts


def dots(path, options):
    """200 pictures for training, 60 for testing."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 8, (260,), generator=generator)
    rank = torch.rand(260, 64, generator=generator).argsort(1)
    images = ((rank < counts[:, None]) * 255).to(torch.uint8).view(-1, 1, 8, 8)
    return Arrays(images[:200], counts[:200], images[200:], counts[200:], Counts(["events"]))
''',
        '"toy": "data.dots:dots",',
    ),
    "NETWORKS": (
        "networks/single.py",
        '''"""A network: one linear layer."""

import math

from torch import nn


def single(num_outputs, input_shape):
    """All pixels at once."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_outputs))
''',
        '"toy": "networks.single:single",',
    ),
    "INFLUENCE": (
        "utils/influence/at_the_end.py",
        '''"""A method of influence: gradients at the end of the run."""

from utils.influence.method import Method
from utils.influence.targets import objective


def at_the_end(trajectory, options, progress):
    """<gradient of the objective, gradient of the sample's loss> at the final rows."""
    rows_ND = trajectory.final()
    _, gradient_ND = objective(trajectory, rows_ND, options.target)
    return trajectory.sample_products(rows_ND, gradient_ND[:, : trajectory.P]).double()


METHOD = Method(at_the_end, reads=("target",))
''',
        '"toy": "utils.influence.at_the_end:METHOD",',
    ),
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the project with a toy of each kind."""
    copy = tmp_path_factory.mktemp("checkout") / "project"
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "main_pruned.py"):
        shutil.copy(ROOT / name, copy / name)
    registry = copy / "utils" / "registry.py"
    for name, (file, text, line) in PIECES.items():
        (copy / file).write_text(text)
        head, start, entries = registry.read_text().partition(f"\n{name} = {{")
        entries, end, rest = entries.partition("\n}\n")
        assert start and end, name
        registry.write_text(f"{head}{start}{entries}\n    {line}{end}{rest}")
    return copy


def run(extended: Path, *words: str) -> str:
    """A command of the copy; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(extended / "cache")}
    done = subprocess.run(
        [sys.executable, *words], cwd=extended, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "warning" in line and "'if' assumes" not in line]
    assert not warned and "Traceback" not in done.stderr, done.stderr  # so short a training is far from its optimum
    return done.stdout + done.stderr


def places(extended: Path) -> dict[str, int]:
    """The files of the copy that differ from the project's, with the lines that were added; none may be removed."""
    found = {}
    for path in sorted(extended.rglob("*.py")):
        name = path.relative_to(extended).as_posix()
        if not (ROOT / name).exists():
            found[name] = -1  # a new file
        elif (ROOT / name).read_text() != path.read_text():
            before, after = ((folder / name).read_text().splitlines() for folder in (ROOT, extended))
            changes = [line for line in difflib.ndiff(before, after) if line[:2] in ("+ ", "- ")]
            assert all(line[:2] == "+ " for line in changes), changes
            found[name] = len(changes)
    return found


def test_each_takes_one_file_and_one_line(extended):
    files = {file for file, _, _ in PIECES.values()}
    assert places(extended) == {**dict.fromkeys(files, -1), "utils/registry.py": len(PIECES)}


TOYS = ("--dataset_name", "toy", "--model", "toy", "--protocol", "toy", "--mode", "toy", "--num_workers", "4",
        "--epochs", "3", "--lr", "0.01", "--batch_size", "8", "--local_steps", "2", "--min_shard", "5",
        "--run_name", "toys", "--quiet")  # fmt: skip


@pytest.mark.slow
def test_training_knows_them(extended):
    run(extended, "main.py", *TOYS)
    stage1 = extended / "results" / "toys" / "stage1"
    config, summary = (json.loads((stage1 / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert [config["config"][name] for name in ("dataset_name", "model", "protocol", "mode")] == ["toy"] * 4
    metric = {"name": "error", "higher_is_better": False, "unit": "events"}
    assert config["task"]["kind"] == "toy" and summary["metric"] == metric
    assert 0 < summary["test_error"] < 3 and (stage1 / "plots" / "training.png").is_file()


@pytest.mark.slow
def test_pruning_knows_them(extended):
    words = ("--pruning_algorithm", "toy", "--train_ratio", "0.8", "--audit", "--audit_groups", "4")
    shown = run(extended, "main_pruned.py", *TOYS, "--run_name", "pruned", *words)
    folder = extended / "results" / "pruned"
    assert "stage 1" in shown and (folder / "stage2_toy_0.8" / "summary.json").is_file()
    audit = json.loads((folder / "audit.json").read_text())
    assert list(audit["methods"])[:1] == ["cascade"] and "toy" in audit["methods"]  # a new one is compared too
