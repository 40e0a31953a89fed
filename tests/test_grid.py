"""Grids: every run is an ordinary run, what has ended is kept, what is wrong is said before anything is trained."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import main as train
from tests.test_report import Page
from training.grid import cells_of, main
from utils.errors import UsageError
from utils.records import read_json

WORDS = "--model mlp --num_workers 4 --max_train 400 --epochs 1 --quiet".split()


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    words = [*WORDS, "--results_dir", str(folder), "--lr", "0.02", "0.1", "--mode", "ring", "all"]
    assert main(words) == 0
    return folder / "grid"


def test_each_run_is_what_main_makes_of_its_flags(grid, tmp_path):
    words = [*WORDS, "--lr", "0.1", "--mode", "all", "--results_dir", str(tmp_path), "--run_name", "alone"]
    assert train.main([*words, "--no-plots"]) == 0
    cell, alone = grid / "lr-0.1_mode-all" / "stage1", tmp_path / "alone" / "stage1"
    assert (cell / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert {path.name for path in alone.iterdir()} <= {path.name for path in cell.iterdir()}


def test_a_grid_leaves_a_table_a_picture_and_a_page(grid, capsys):
    assert {path.name for path in grid.iterdir()} == {
        "grid.json", "grid.png", "index.html", "lr-0.02_mode-ring", "lr-0.02_mode-all", "lr-0.1_mode-ring",
        "lr-0.1_mode-all",
    }  # fmt: skip
    page = Page(grid / "index.html")
    links = [link["href"] for link in page.all("a") if not link["href"].startswith("#")]
    assert len(links) == 4 and all((grid / link).is_file() for link in links)


def test_what_has_ended_is_kept_and_more_values_are_added(grid, capsys):
    words = [*WORDS, "--results_dir", str(grid.parent), "--lr", "0.02", "0.1", "0.05", "--mode", "ring", "all"]
    before = {path: path.stat().st_mtime_ns for path in grid.glob("*/stage1/model.safetensors")}
    assert main([*words, "--no-plots"]) == 0
    after = {path: path.stat().st_mtime_ns for path in grid.glob("*/stage1/model.safetensors")}
    assert len(before) == 4 and len(after) == 6 and before.items() <= after.items()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:3] == ["run", "mode", "lr"] and len(shown) == 7


def test_a_run_that_cannot_be_trained_does_not_stop_the_others(tmp_path, capsys):
    words = [*WORDS, "--no-plots", "--results_dir", str(tmp_path), "--min_shard", "10", "90"]
    assert main(words) == 2
    assert (tmp_path / "grid" / "min_shard-10" / "stage1" / "summary.json").is_file()
    assert "min_shard-90: " in capsys.readouterr().err


def test_an_interrupted_grid_goes_on(tmp_path, monkeypatch, capsys):
    words = [*WORDS, "--no-plots", "--results_dir", str(tmp_path), "--lr", "0.02", "0.1"]
    from training import grid as module

    trained, real = [], module.train_cell

    def interrupted(config):
        if trained:
            raise KeyboardInterrupt
        trained.append(real(config))

    monkeypatch.setattr(module, "train_cell", interrupted)
    assert main(words) == 130 and "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(module, "train_cell", real)
    first = tmp_path / "grid" / "lr-0.02" / "stage1" / "model.safetensors"
    made = first.stat().st_mtime_ns
    assert main(words) == 0 and first.stat().st_mtime_ns == made
    assert len(read_json(tmp_path / "grid" / "grid.json")["runs"]) == 2


def test_listed_commands_train_the_same(tmp_path, capsys):
    words = [*WORDS, "--results_dir", str(tmp_path), "--run_name", "g", "--lr", "0.02", "0.1", "--no-plots", "--list"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and not list(tmp_path.iterdir())
    for line in lines:
        assert line.startswith("python main.py ")
        assert train.main(shlex.split(line)[2:]) == 0
    rates = [read_json(path)["config"]["lr"] for path in sorted(tmp_path.glob("g/*/stage1/config.json"))]
    assert rates == [0.02, 0.1]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--lr", "0.1"], "a flag with several values"), (["--lrr", "0.1", "0.2"], "Did you mean --lr?"),
     (["--lr", "0.1", "-3"], "lr"), (["--lr", "0.1", "x"], "--lr x"), (["--threads", "1", "2"], "one value for the"),
     (["--run_name", "a", "b"], "one value for the whole"), (["0.1"], "neither a flag"),
     (["--mode", "ring", "rang"], "--mode rang"), (["--lr", "0.1", "0.2", "--cluster", "recipes"], "--list"),
     (["--seed", "0", "1", "--lr", "0.1", "0.2"], "one value")],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_anything_is_trained(words, said, tmp_path, capsys):
    assert main([*words, "--results_dir", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "results").exists()


def test_flags_that_take_several_values_are_no_axes():
    axes, cells = cells_of("--scheduler multistep --milestones 1 2 --lr 0.1 0.2".split())
    assert axes == {"lr": ["0.1", "0.2"]}
    assert all(cell.config.milestones == (1.0, 2.0) for cell in cells)
    axes, cells = cells_of(["--lr", "0.1", "0.2", "0.10", "--tf32", "True", "False"])
    assert [cell.config.tf32 for cell in cells] == [True, False] * 2  # 0.1 and 0.10 are the same
    axes, cells = cells_of("--mode torus --torus 2 2 --num_workers 4 --lr 0.1 0.2".split())
    assert all(cell.config.torus == (2, 2) for cell in cells)
    with pytest.raises(UsageError, match="fewer values"):
        cells_of(["--lr", *(str(k) for k in range(1, 200)), "--wd", *(str(k) for k in range(1, 200))])


@pytest.mark.slow
def test_runs_elsewhere_are_the_same(grid, tmp_path):
    words = [*WORDS, "--results_dir", str(tmp_path), "--lr", "0.02", "0.1", "--mode", "ring", "all"]
    assert main([*words, "--cluster", "local:2"]) == 0
    for path in sorted((tmp_path / "grid").glob("*/stage1/model.safetensors")):
        assert path.read_bytes() == (grid / path.relative_to(tmp_path / "grid")).read_bytes()
    assert len(json.loads((tmp_path / "grid" / "grid.json").read_text())["runs"]) == 4


def test_only_runs_of_these_settings_are_summed_up(grid, tmp_path, capsys):
    """Runs of an earlier grid in the folder, with another setting, are refused and not drawn; the reason is said."""
    words = [*WORDS, "--no-plots", "--results_dir", str(tmp_path), "--lr", "0.02", "0.1"]
    assert main(words) == 0
    assert main([*words, "0.05", "--batch_size", "8"]) == 2
    said = capsys.readouterr()
    assert "lr-0.02: the run" in said.err and "another --batch_size" in said.err
    assert [run["folder"] for run in read_json(tmp_path / "grid" / "grid.json")["runs"]] == ["lr-0.05"]
    assert main([*WORDS, "--results_dir", str(tmp_path / "none"), "--num_workers", "400", "500"]) == 2
    assert "num_workers-400: " in capsys.readouterr().err


def test_listed_commands_have_no_flags_of_the_grid(capsys):
    assert main("--lr 0.1 0.2 --list True --cluster local:2 --model mlp".split()) == 0
    for line in capsys.readouterr().out.splitlines():
        assert "cluster" not in line and "True" not in line and "--list" not in line


def test_a_grid_inside_a_run_is_summed_up(tmp_path, capsys):
    words = [*WORDS, "--no-plots", "--results_dir", str(tmp_path), "--run_name", "nest"]
    assert train.main(words) == 0 and main([*words, "--lr", "0.02", "0.1"]) == 0
    assert "lr-0.02" in capsys.readouterr().out
