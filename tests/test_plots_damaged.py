"""Damaged records: every picture either is drawn or refuses in one line that names the file."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.test_influence_plots import audit_of, node_view, write_scores
from tests.test_plots import CLASSES, make_run
from utils.records import UsageError, write_confusion, write_json
from visualization import influence_plots
from visualization.plot_utils import plot_run

N = 4  # workers

# Put in the place of every value of a record. The text of the last ones is JSON that Python cannot hold exactly.
WRONG = (None, "text", True, [], {}, [1], [None, "x"], {"x": 1}, -1, 0, 0.5, 10**9, 1e308, float("nan"), float("inf"), 10**400)
DELETED = object()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run folder with two stages and every record that pictures read."""
    root = tmp_path_factory.mktemp("whole")
    finetune = {"epochs": 1, "head_only": False, "before": [0.5] * N, "after": [0.6, None, 0.7, 0.8],
                "mean_before": 0.5, "mean_after": 0.7}  # fmt: skip
    for stage in ("stage1", "stage2_if_0.6"):
        make_run(root / stage, N, rounds=4)
        summary = {"test_accuracy": 0.9, "worker_test_accuracy": [0.8, None, 0.9, 0.95], "finetune": finetune}
        write_json(root / stage / "summary.json", summary)
        write_json(root / stage / "corruption.json", {"flipped": [0, 3], "bad_workers": [1], "kind": "noise"})
        write_confusion(root / stage, np.eye(CLASSES, dtype=int), [str(c) for c in range(CLASSES)])
    write_scores(root / "influence" / "dice.zarr", np.linspace(-1, 1, 40), np.arange(40), np.arange(40) % N)
    write_json(root / "node_view_dice.json", node_view(N, bad=[1]))
    method = {"lds": 0.5, "interval": [0.1, 0.9], "predicted": [0.1, None, 0.3]}
    write_json(root / "audit.json", audit_of({"dice": method}, [0.1, 0.2, None]))
    curve = {"test_accuracy": [0.9, None, 0.8], "test_accuracy_std": [0.1, None, 0.1]}
    stage1 = {"test_accuracy": 0.9, "test_accuracy_std": 0.01}
    sweep = {"ratios": [0.9, 0.5, 0.1], "methods": {"if": curve}, "stage1": stage1, "seeds": 3}
    write_json(root / "sweep.json", sweep)
    return root


@pytest.fixture
def run_folder(whole, tmp_path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


DRAWN_FROM = {
    "stage1/topology.json": lambda root: plot_run(root / "stage1"),
    "stage1/summary.json": lambda root: plot_run(root / "stage1"),
    "stage2_if_0.6/summary.json": lambda root: influence_plots.plot_comparison(
        root / "stage1", root / "stage2_if_0.6", root / "c.png"
    ),
    "stage1/corruption.json": lambda root: influence_plots.plot_scores(
        root / "stage1", root / "influence" / "dice.zarr", root / "s.png"
    ),
    "node_view_dice.json": lambda root: influence_plots.plot_node_view(
        root / "stage1", root / "node_view_dice.json", root / "n.png"
    ),
    "audit.json": lambda root: influence_plots.plot_audit(root, root / "a.png"),
    "sweep.json": lambda root: influence_plots.plot_sweep(root, root / "w.png"),
}


def places(value, depth: int = 0) -> list[tuple]:
    """The way to every key of a record, and to the first and last element of every list."""
    inner = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        inner = sorted({0, len(value) - 1} & set(range(len(value))))
    return [(key, *rest) for key in inner for rest in [(), *places(value[key], depth + 1)]]


def damage(record, way: tuple, wrong):
    """The record with ``wrong`` (or nothing) at the place."""
    record = copy.deepcopy(record)
    inner = record
    for key in way[:-1]:
        inner = inner[key]
    if wrong is DELETED:
        del inner[way[-1]]
    else:
        inner[way[-1]] = wrong
    return record


def refusal(draw) -> str | None:
    """The line that a drawing function refuses with; None where it draws, which it does without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            draw()
        except UsageError as error:
            assert "\n" not in str(error)
            return str(error)
    return None


@pytest.mark.parametrize("name", DRAWN_FROM)
def test_no_value_of_a_record_ends_in_a_traceback(run_folder, name, monkeypatch):
    monkeypatch.setitem(__import__("visualization.style").style.STYLE, "savefig.dpi", 30)  # sooner written
    path = run_folder / name
    record = json.loads(path.read_text())
    print(len(places(record)))
    problems = []
    for way in places(record):
        for wrong in (DELETED, *WRONG):
            path.write_text(json.dumps(damage(record, way, wrong)))
            try:
                said = refusal(lambda: DRAWN_FROM[name](run_folder))
            except Exception as error:
                problems.append((way, repr(wrong)[:20], repr(error)[:200]))
                continue
            if said and name not in said: problems.append((way, repr(wrong)[:20], said[:150]))
    assert not problems, "\n".join(map(str, problems))
