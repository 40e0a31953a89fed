"""The command line, called in this process: small runs on the digits."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

import main
import main_pruned

SMALL = ("--model", "mlp", "--engine", "vmap", "--num_workers", "4", "--max_train", "300", "--epochs", "2",
         "--no-plots", "--quiet")  # fmt: skip


def arguments(folder: Path, *flags: str, name: str = "run") -> list[str]:
    """A run of six rounds in ``folder``/``name``; ``flags`` come last, so they win."""
    return [*SMALL, "--results_dir", str(folder), "--run_name", name, *map(str, flags)]


def train(folder: Path, *flags: str, name: str = "run") -> Path:
    """main.py; returns the run directory."""
    assert main.main(arguments(folder, *flags, name=name)) == 0
    return folder / name / "stage1"


def prune(folder: Path, *flags: str, name: str = "run") -> Path:
    """main_pruned.py; returns the folder of the run."""
    assert main_pruned.main(arguments(folder, *flags, name=name)) == 0
    return folder / name


def refused(capsys, code: int) -> str:
    """The one line that a refused command prints, checked: exit code 2, one 'error: ' line, no traceback."""
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1, output.err
    assert "Traceback" not in output.err and output.err.rstrip().endswith(errors[0]), output.err
    assert len(errors[0]) > len("error: ") + 10
    return errors[0]


def load(path: Path) -> dict:
    """A JSON file."""
    return json.loads(path.read_text())


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without the wall clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def summary(run_dir: Path) -> dict:
    """summary.json without what the wall clock says."""
    return {k: v for k, v in load(run_dir / "summary.json").items() if k not in ("seconds", "samples_per_second")}


def confusion(run_dir: Path) -> tuple:
    """Counts [C, C] and class names of confusion.npz."""
    from utils.records import read_confusion

    return read_confusion(run_dir)


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two safetensors files hold the same, to the bit (the order of their metadata is random)."""
    one, other = safetensors.torch.load_file(a), safetensors.torch.load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
