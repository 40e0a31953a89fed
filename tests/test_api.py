"""The Python of docs/api.md and of the notebook, run as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest import mock

import pytest

from utils import registry
from utils.args import Config
from utils.errors import UsageError

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
TOUR = ROOT / "examples" / "tour.ipynb"


@pytest.fixture
def registries():
    """What a page registers is gone after it."""
    with mock.patch.dict(registry.DATASETS), mock.patch.dict(registry.NETWORKS):
        yield


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, registries, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, "docs/api.md", "exec"), namespace)  # noqa: S102
    assert len(BLOCKS) >= 6 and namespace["summary"]["test_accuracy"] > 0.8
    assert namespace["callback"].best >= namespace["summary"]["test_accuracy"] - 0.2
    assert (tmp_path / "runs" / "api" / "report.html").is_file()
    assert namespace["record"]["algorithm"] == "cascade" and "95 %" in namespace["record"]["verdict"]
    flipped, ids = set(namespace["stage1"].job.corruption["flipped"]), namespace["stage1"].job.train_ids
    lowest = ids[namespace["scores_n"][ids].argsort()[: len(flipped)]].tolist()
    assert len(flipped & set(lowest)) > len(flipped) / 2  # they are what was made bad


def test_what_a_program_registers_is_a_choice_at_once(registries):
    with pytest.raises(UsageError, match="unknown --model"):
        Config(model="of_mine")
    registry.NETWORKS["of_mine"] = lambda outputs, shape: None
    assert Config(model="of_mine").model == "of_mine"


def test_data_of_a_program_are_read_anew(registries):
    """No cache knows whether they changed."""
    import torch

    from data.arrays import Arrays
    from data.classification import Classification
    from data.dataset_loader import load_dataset

    def of(value):
        pictures, labels = torch.full((20, 1, 4, 4), value, dtype=torch.uint8), torch.arange(20) % 2
        return lambda path, options: Arrays(pictures, labels, pictures, labels, Classification(("a", "b")))

    for value in (3, 5):
        registry.DATASETS["changing"] = of(value)
        assert load_dataset("changing").inputs_n.unique().tolist() == [value]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    tour = nbformat.read(TOUR, 4)
    for cell in tour.cells:
        cell.source = cell.source.replace("--epochs 20", "--epochs 3")
    (tmp_path / "kernel").mkdir()
    with mock.patch.dict("os.environ", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", IPYTHONDIR=str(tmp_path / "kernel")):
        NotebookClient(tour, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = json.dumps([cell.get("outputs") for cell in tour.cells])
    assert "image/png" in shown and "test accuracy" in shown and (tmp_path / "results/tour/report.html").is_file()
