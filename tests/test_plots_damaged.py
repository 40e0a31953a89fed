"""Damaged records: a picture either is drawn or refuses in one line that names the file."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.test_influence_plots import audit_of, node_view, write
from tests.test_plots import CLASSES, make_run
from utils.records import UsageError, write_confusion, write_json, write_labels, write_partition
from visualization import checked, influence_plots
from visualization.plot_utils import plot_compare, plot_run, plot_seeds

N = 4  # workers
DELETED = object()
WRONG = (DELETED, None, "text", True, [], {}, [1], [None, "x"], [[1, 2]], {"x": 1}, -1, 0, 0.5, 10**9, 10**18, 10**400,
         1e308, float("nan"), float("inf"))  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run folder with two stages and every record that pictures read."""
    root = tmp_path_factory.mktemp("whole")
    finetune = {"epochs": 1, "head_only": False, "before": [0.5] * N, "after": [0.6, None, 0.7, 0.8]}
    for stage in ("stage1", "stage2_if_0.6"):
        make_run(root / stage, N, rounds=4)
        summary = {"test_accuracy": 0.9, "worker_test_accuracy": [0.8, None, 0.9, 0.95], "finetune": finetune}
        summary["test_loss"] = 0.4
        write_json(root / stage / "summary.json", summary)
        write_json(root / stage / "corruption.json", {"flipped": [0, 3], "bad_workers": [1], "kind": "noise"})
        write_confusion(root / stage, np.eye(CLASSES), [f"class {c}" for c in range(CLASSES)])
    write(root / "influence" / "dice.zarr", np.linspace(-1, 1, 40), np.arange(40), np.arange(40) % N)
    write_json(root / "node_view_dice.json", node_view(N, bad=[1]))
    method = {"lds": 0.5, "interval": [0.1, 0.9], "predicted": [0.1, None, 0.3]}
    write_json(root / "audit.json", audit_of({"dice": method}, [0.1, 0.2, None]))
    curve = {"test_accuracy": [0.9, None, 0.8], "test_accuracy_std": [0.1, None, 0.1]}
    stage1 = {"test_accuracy": 0.9, "test_accuracy_std": 0.01}
    runs = {"stage1": ["stage1"], "stage2": ["stage2_if_0.6"], "control": None}
    stages = {"stage1": {"test_accuracy": 0.9}, "stage2": {"test_accuracy": None}, "control": None}
    over = {"over_stage1": [0.1, 0.0, None], "over_random": None, "verdict": "no"}
    comparison = {"algorithm": "if", "ratio": 0.6, "seed": 0, "runs": runs, **stages, **over}
    write_json(root / "comparison_if_0.6.json", comparison)
    write_json(root / "sweep.json", {"ratios": [0.9, 0.5, 0.1], "methods": {"if": curve}, "stage1": stage1, "seeds": 3})
    return root


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of it to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def compare_stages(root: Path) -> Path:
    return influence_plots.plot_comparison(root / "comparison_if_0.6.json")


LOADED_BY = {
    "stage1/metrics.jsonl": lambda root: checked.load_lines(root / "stage1"),
    "stage1/summary.json": lambda root: checked.load_summary(root / "stage1"),
    "stage1/topology.json": lambda root: checked.load_topology(root / "stage1"),
    "stage1/corruption.json": lambda root: checked.load_corruption(root / "stage1"),
    "node_view_dice.json": lambda root: checked.load_node_view(root / "node_view_dice.json"),
    "audit.json": checked.load_audit,
    "comparison_if_0.6.json": lambda root: checked.load_comparison(root / "comparison_if_0.6.json"),
    "sweep.json": checked.load_sweep,
}
DRAWN_BY = {
    "stage1/metrics.jsonl": lambda root: plot_run(root / "stage1"),
    "stage1/summary.json": lambda root: plot_run(root / "stage1"),
    "stage1/topology.json": lambda root: plot_run(root / "stage1"),
    "stage1/labels.npz": lambda root: plot_run(root / "stage1"),
    "stage1/partition.npz": lambda root: plot_run(root / "stage1"),
    "stage1/confusion.npz": lambda root: plot_run(root / "stage1"),
    "stage2_if_0.6/summary.json": compare_stages,
    "stage2_if_0.6/metrics.jsonl": compare_stages,
    "stage1/corruption.json": lambda root: influence_plots.plot_scores(
        root / "stage1", root / "influence" / "dice.zarr", root / "s.png"
    ),
    "node_view_dice.json": lambda root: influence_plots.plot_node_view(
        root / "stage1", root / "node_view_dice.json", root / "n.png"
    ),
    "comparison_if_0.6.json": lambda root: influence_plots.plot_all_comparisons(root),
    "audit.json": lambda root: influence_plots.plot_audit(root, root / "a.png"),
    "sweep.json": lambda root: influence_plots.plot_sweep(root, root / "w.png"),
}


def places(value) -> list[tuple]:
    """The way to every key of a record, and to the first and the last element of every list."""
    inner = list(value) if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        inner = sorted({0, len(value) - 1})
    return [(key, *rest) for key in inner for rest in [(), *places(value[key])]]


def damage(path: Path, way: tuple, wrong: object) -> None:
    """Put ``wrong`` in the place of a value of a record (the first line of metrics.jsonl), or delete it."""
    first, *others = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    record = json.loads(first)
    inner = record
    for key in way[:-1]:
        inner = inner[key]
    if wrong is DELETED:
        del inner[way[-1]]
    else:
        inner[way[-1]] = copy.deepcopy(wrong)
    path.write_text("\n".join([json.dumps(record), *others, ""]))


def refusal(draw, root: Path) -> str:
    """The line in which a function refuses; empty where it does not, and then it has nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            draw(root)
        except UsageError as error:
            assert "\n" not in str(error)
            return str(error)
    return ""


@pytest.mark.parametrize("name", LOADED_BY)
def test_no_value_of_a_record_ends_in_a_traceback(folder, name):
    path = folder / name
    intact = path.read_bytes()
    assert not refusal(LOADED_BY[name], folder)
    refused = 0
    for way in places(json.loads(intact.splitlines()[0] if path.suffix == ".jsonl" else intact)):
        for wrong in WRONG:
            path.write_bytes(intact)
            damage(path, way, wrong)
            said = refusal(LOADED_BY[name], folder)
            refused += bool(said)
            assert not said or (f"{path} is damaged (" in said and len(said) < 500), (way, wrong)
    assert refused > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DRAWN_BY if not name.endswith("metrics.jsonl")])
def test_files_that_are_no_records_are_refused(folder, name):
    for content in b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"PK\x03\x04", b"{}\n{}\n":
        (folder / name).write_bytes(content)
        assert refusal(DRAWN_BY[name], folder).startswith(f"{folder / name} is damaged ("), content


@pytest.mark.slow
def test_metrics_may_be_torn_but_not_broken(folder):
    path = folder / "stage1" / "metrics.jsonl"
    intact = path.read_bytes()
    path.write_bytes(intact + b'{"round": 9')  # by a kill
    assert not refusal(DRAWN_BY["stage1/metrics.jsonl"], folder)
    path.write_bytes(b"")
    assert not refusal(DRAWN_BY["stage1/metrics.jsonl"], folder)
    path.write_bytes(b"{}\n" + intact)
    assert f"{path} is damaged (line 1" in refusal(DRAWN_BY["stage1/metrics.jsonl"], folder)


@pytest.mark.parametrize("name, way, wrong, said", [
    ("stage1/topology.json", ("num_workers",), 5, "matrices[0] has no row for some of the 5 workers"),
    ("stage1/topology.json", ("num_workers",), 3, "matrices[0].receiver is no list of whole numbers from 0 to 2"),
    ("stage1/topology.json", ("num_workers",), 10**12, "no row for some"),
    ("stage1/topology.json", ("mode",), DELETED, "it has no 'mode'"),
    ("stage1/topology.json", ("matrices",), [], "it has no matrix"),
    ("stage1/topology.json", ("matrices", 0, "sender", 0), -1, "matrices[0].sender is no list of whole numbers"),
    ("stage1/topology.json", ("matrices", 0, "sender", 0), 0.5, "matrices[0].sender is no list of whole numbers"),
    ("stage1/topology.json", ("matrices", 0, "sender", 0), DELETED, "the lists of matrices[0] differ in length"),
    ("stage1/topology.json", ("matrices", 0, "weight", 0), None, "matrices[0].weight is no list of numbers"),
    ("stage1/summary.json", ("worker_test_accuracy", 0), DELETED, "they are of different runs"),
    ("stage1/summary.json", ("finetune", "after"), DELETED, "finetune has no 'after'"),
    ("stage1/metrics.jsonl", ("worker_val_loss", 0), DELETED, "line 1"),
    ("stage1/metrics.jsonl", ("consensus_val_loss",), "0.5", "line 1.consensus_val_loss is no number"),
    ("stage2_if_0.6/summary.json", ("test_accuracy",), "0.9", "test_accuracy is no number"),
    ("comparison_if_0.6.json", ("stage1",), None, "it has no test accuracy of stage 1"),
    ("comparison_if_0.6.json", ("runs", "stage1", 0), 1, "runs.stage1 is no list of texts"),
    ("comparison_if_0.6.json", ("over_stage1", 0), DELETED, "over_stage1 is not of length 3"),
    ("stage1/corruption.json", ("flipped", 0), "x", "flipped is no list of numbers"),
    ("node_view_dice.json", ("table", 0, 0), DELETED, "table is no table of 4 x 4 numbers"),
    ("node_view_dice.json", ("bad_workers", 0), 4, "bad_workers is no list of whole numbers from 0 to 3"),
    ("audit.json", ("actual", 0), DELETED, "methods.dice.predicted is not of length 2"),
    ("audit.json", ("methods", "dice"), None, "methods.dice is no JSON object"),
    ("sweep.json", ("ratios", 0), None, "ratios is no list of numbers"),
    ("sweep.json", ("methods", "if", "test_accuracy_std", 0), -0.1, "is no list of numbers from 0 on"),
    ("sweep.json", ("stage1", "test_accuracy"), None, "stage1.test_accuracy is no number"),
])  # fmt: skip
def test_the_line_says_what_is_wrong(folder, name, way, wrong, said):
    damage(folder / name, way, wrong)
    assert said in refusal(DRAWN_BY[name], folder)


ODD_FIGURES = [
    ("stage1/metrics.jsonl", ("worker_val_loss",), [None] * N),
    ("stage1/metrics.jsonl", ("train_loss",), 1e308),
    ("stage1/metrics.jsonl", ("consensus_distance",), None),
    ("stage1/summary.json", ("worker_test_accuracy",), [None] * N),
    ("stage1/summary.json", ("finetune", "after"), [None] * N),
    ("stage1/summary.json", ("test_accuracy",), None),
    ("stage1/topology.json", ("spectral_gap",), None),
    ("stage1/topology.json", ("mode",), "$x_{"),
    ("stage1/corruption.json", ("bad_workers",), [10**9]),
    ("node_view_dice.json", ("worker_influence",), [None] * N),
    ("node_view_dice.json", ("table",), [[None] * N] * N),
    ("node_view_dice.json", ("table",), None),
    ("audit.json", ("actual",), [None] * 3),
    ("audit.json", ("methods",), {}),
    ("audit.json", ("methods", "dice", "lds"), None),
    ("audit.json", ("methods", "dice", "interval"), None),
    ("sweep.json", ("methods",), {}),
    ("sweep.json", ("methods", "if", "test_accuracy"), [None] * 3),
    ("sweep.json", ("methods", "if", "test_accuracy_std"), [None] * 3),
    ("stage2_if_0.6/summary.json", ("worker_test_accuracy",), []),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, way, odd",  # every second of those that draw a whole run only in CI
    [pytest.param(*case, marks=pytest.mark.slow) if i % 2 and "stage" in case[0] else case
     for i, case in enumerate(ODD_FIGURES)],
)  # fmt: skip
def test_figures_that_are_not_finite_are_left_out(folder, name, way, odd):
    damage(folder / name, way, odd)
    assert not refusal(DRAWN_BY[name], folder)


@pytest.mark.slow
def test_damaged_arrays_are_refused(folder):
    stage = folder / "stage1"
    names = [f"class {c}" for c in range(CLASSES)]
    intact = {name: (stage / f"{name}.npz").read_bytes() for name in ("labels", "partition", "confusion")}
    for name, damage in (
        ("labels", lambda: write_labels(stage, np.array([0, -1]), names)),
        ("labels", lambda: write_labels(stage, np.array([0, CLASSES]), names)),
        ("labels", lambda: write_labels(stage, np.zeros(0), [])),
        ("labels", lambda: write_labels(stage, np.zeros((2, 2)), names)),
        ("labels", lambda: np.savez(stage / "labels.npz", labels=np.array([0.5]), class_names=np.array(names))),
        ("labels", lambda: np.savez(stage / "labels.npz", labels=np.array(["x"]), class_names=np.array(names))),
        ("partition", lambda: write_partition(stage, [])),
        ("partition", lambda: write_partition(stage, [np.array([0, -1])])),
        ("partition", lambda: np.savez(stage / "partition.npz", worker_0000=np.array([0.5]))),
        ("partition", lambda: np.savez(stage / "partition.npz", worker_0000=np.array(1))),
        ("partition", lambda: np.savez(stage / "partition.npz", worker_0001=np.array([1]))),
        ("confusion", lambda: write_confusion(stage, np.zeros((0, 0)), [])),
        ("confusion", lambda: write_confusion(stage, np.zeros((2, 2)), ["a"])),
        ("confusion", lambda: write_confusion(stage, np.zeros((2, 3)), ["a", "b"])),
        ("confusion", lambda: write_confusion(stage, np.full((2, 2), -1), ["a", "b"])),
        ("confusion", lambda: np.savez(stage / "confusion.npz", counts=np.eye(2), class_names=np.array(["a", "b"]))),
        ("confusion", lambda: np.savez(stage / "confusion.npz", counts=np.eye(1, dtype=int), class_names="a")),
        ("confusion", lambda: np.savez(stage / "confusion.npz", counts=np.eye(2, dtype=int))),
        ("confusion", lambda: np.savez(stage / "confusion.npz", counts=np.array([None]), class_names=np.array(names))),
    ):
        damage()
        assert refusal(plot_run, stage).startswith(f"{stage / name}.npz is damaged ("), name
        (stage / f"{name}.npz").write_bytes(intact[name])
    assert not refusal(plot_run, stage)
    write_partition(stage, [np.array([10**6])])
    assert "names sample 1000000" in refusal(plot_run, stage)


def test_sheets_of_several_runs_refuse_damage_too(folder):
    damage(folder / "stage2_if_0.6" / "metrics.jsonl", ("val_loss",), "high")
    for plot in plot_compare, plot_seeds:
        with pytest.raises(UsageError, match="stage2_if_0.6/metrics.jsonl is damaged"):
            plot([folder / "stage1", folder / "stage2_if_0.6"], folder / "x.png")
