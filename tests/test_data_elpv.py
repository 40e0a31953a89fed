"""ELPV in the exact format of its package, put on the path: what is read, how it is split, what is refused."""

import sys
from functools import partial

import pytest
import torch
from command import load as read_json
from command import refused, train
from PIL import Image

import main
from data.dataset_loader import load_dataset
from utils.errors import UsageError

COUNTS = {("0.0", "mono"): 12, ("0.3333333333333333", "poly"): 8, ("0.6666666666666666", "mono"): 4, ("1.0", "poly"): 8}
CELLS = [kind for kind, count in COUNTS.items() for _ in range(count)]


@pytest.fixture
def load(tmp_path):
    return partial(load_dataset, "elpv", cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """elpv_dataset/data as the wheel unpacks it: a line of 46 bytes a cell; the pixels tell a cell's number."""
    data = tmp_path / "site-packages" / "elpv_dataset" / "data"
    (data / "images").mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise RuntimeError('nobody needs to import it')")
    lines = []
    for i, (probability, kind) in enumerate(CELLS, start=1):
        lines.append(f"images/cell{i:04}.png  {probability:<18}  {kind}\n")
        Image.new("L", (300, 300), i).save(data / "images" / f"cell{i:04}.png")
    (data / "labels.csv").write_text("".join(lines))
    assert {len(line) for line in lines} == {46}
    monkeypatch.syspath_prepend(data.parents[1])
    yield data
    sys.modules.pop("elpv_dataset", None)


def test_defective_is_what_is_more_likely_so(package, load):
    data = load(image_size=12)
    assert data.task.names == ("functional", "defective") and data.inputs_n.shape[1:] == (1, 12, 12)
    for part, targets in ((data.inputs_n, data.targets_n), (data.test_inputs_m, data.test_targets_m)):
        probability = torch.tensor([float(CELLS[cell - 1][0]) for cell in part[:, 0, 0, 0].tolist()])
        assert torch.equal(targets, (probability > 0.5).long())
    cells = data.inputs_n[:, 0, 5, 5].tolist()
    assert data.sources == tuple(f"images/cell{cell:04}.png" for cell in cells)
    assert data.owners.names == ("mono", "poly")
    assert [data.owners.names[g] for g in data.owners.owner_n.tolist()] == [CELLS[cell - 1][1] for cell in cells]


def test_a_fixed_quarter_of_each_class_and_type_is_for_testing(package, load):
    data = load(package, image_size=12)
    train_cells, test_cells = (part[:, 0, 0, 0].tolist() for part in (data.inputs_n, data.test_inputs_m))
    assert sorted(train_cells + test_cells) == list(range(1, 33))
    kinds = [CELLS[cell - 1] for cell in test_cells]
    assert {kind: kinds.count(kind) for kind in COUNTS} == {kind: count // 4 for kind, count in COUNTS.items()}
    again = load(image_size=12)  # the package itself, in place of its folder by name
    assert again.fingerprint == data.fingerprint
    assert load().inputs_n.shape[1:] == (1, 300, 300)


def test_without_the_package_a_line_says_how_to_get_it(tmp_path, load, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)  # as if it were not installed, whatever is
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, main.main(["--dataset_name", "elpv", "--results_dir", str(tmp_path)]))
    assert "pip install elpv-dataset" in line and "CC BY-NC-SA" in line and "--dataset_path" in line


@pytest.mark.parametrize(
    "line",
    ["images/cell0001.png 1.0", "images/cell0001.png much mono", "images/cell0001.png 1.5 mono",
     "images/cell0001.png nan mono", "images/cell0001.png 1.0 thin", "../cell0001.png 1.0 mono",
     "/etc/passwd 1.0 mono", "\xff\x00", ""],
)  # fmt: skip
def test_labels_that_cannot_be_right_are_refused(package, load, line):
    (package / "labels.csv").write_text(f"images/cell0002.png 0.0 mono\n{line}\n", encoding="latin-1")
    with pytest.raises(UsageError, match="line 2 of .*labels.csv") as caught:
        load(image_size=12)
    assert "\n" not in str(caught.value)


def test_cells_that_are_missing_are_named(package, load):
    (package / "images" / "cell0007.png").unlink()
    with pytest.raises(UsageError, match="cell0007.png is missing"):
        load(image_size=12)
    (package / "labels.csv").write_text("")
    with pytest.raises(UsageError, match="is empty"):
        load(image_size=12)


def test_a_run_over_the_types(package, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ("--dataset_name", "elpv", "--image_size", "12", "--partition", "natural", "--num_workers", "2")
    record = read_json(train(tmp_path, *flags, "--batch_size", "4") / "config.json")
    assert record["owners"] == ["mono", "poly"]
