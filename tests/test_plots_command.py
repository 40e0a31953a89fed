"""``python -m visualization.plot_utils``: what may be named, where the pictures go, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.test_plots import metrics_line
from utils.records import MetricsLog, UsageError
from visualization import plot_utils
from visualization.run_folders import first_stage, seeds_of, stages_of
from visualization.several_runs import compare_path, seeds_path

STAGE_PICTURES = ["training.png", "consensus_distance.png"]


def make_stage(path: Path, seed: int = 0) -> Path:
    for round in range(3):
        MetricsLog(path / "metrics.jsonl").append(metrics_line(round, 2, np.random.default_rng(seed)))
    return path


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """results/ring and results/star with two stages each, results/seeds with three seeds; the working directory
    is above it."""
    for run in "ring", "star":
        for stage in "stage1", "stage2_if_0.8":
            make_stage(tmp_path / "results" / run / stage)
    for seed in 0, 2, 10:
        make_stage(tmp_path / "results" / "seeds" / f"seed-{seed}" / "stage1", seed)
    (tmp_path / "results" / "ring" / "influence").mkdir()
    monkeypatch.chdir(tmp_path)
    return Path("results")


def command(capsys, *words: object) -> list[str]:
    """The files that the command says it wrote, each a picture."""
    assert plot_utils.main([str(word) for word in words]) == 0
    said = capsys.readouterr().out.splitlines()
    for path in said:
        assert imread(path).shape[0] >= 400
    return said


def refused(capsys, *words: object) -> str:
    """The one line that it refuses with."""
    assert plot_utils.main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def pictures(*stages: Path) -> list[str]:
    return [str(stage / "plots" / name) for stage in stages for name in STAGE_PICTURES]


@pytest.mark.slow
def test_one_run_is_drawn_stage_by_stage(results, capsys):
    stage1, stage2 = results / "ring" / "stage1", results / "ring" / "stage2_if_0.8"
    assert command(capsys, stage1) == pictures(stage1)
    assert command(capsys, results / "ring") == pictures(stage1, stage2)
    assert command(capsys, f"{results / 'ring'}/") == pictures(stage1, stage2)


@pytest.mark.slow
def test_a_folder_of_seeds_is_drawn_seed_by_seed_and_on_one_sheet(results, capsys):
    folder = results / "seeds"
    each = pictures(*(folder / f"seed-{seed}" / "stage1" for seed in (0, 2, 10)))
    assert command(capsys, folder) == [*each, str(folder / "seeds.png")]
    assert command(capsys, folder, "--out", "other.png") == [*each, "other.png"]
    assert command(capsys, "--seeds", folder) == [str(folder / "seeds.png")]


@pytest.mark.slow
def test_several_runs_go_on_a_sheet_of_their_own(results, capsys):
    (sheet,) = command(capsys, results / "ring", results / "star")
    assert sheet == str(results / "compare_ring_vs_star.png")
    assert command(capsys, results / "ring" / "stage1", results / "star") == [sheet], "the same comparison"
    assert not Path("comparison.png").exists()
    assert command(capsys, results / "ring", results / "star", "--loss") == [sheet.replace(".png", "_loss.png")]
    (sheet,) = command(capsys, results / "ring", results / "seeds")
    assert sheet == str(results / "compare_ring_vs_seeds.png"), "seeds count as one run"
    (sheet,) = command(capsys, *stages_of(results / "ring"))
    assert sheet == str(results / "ring" / "compare_stage1_vs_stage2_if_0.8.png")
    (seeds,) = command(capsys, "--seeds", results / "ring", results / "star")
    assert seeds == str(results / "seeds.png")
    (seeds,) = command(capsys, "--seeds", results.absolute() / "ring", results / "star")
    assert seeds == str(results / "seeds.png")
    Path("named.png").write_text("mine, but named")
    assert command(capsys, results / "ring", results / "star", "--out", "named.png") == ["named.png"]


def test_different_comparisons_have_different_files(results):
    names = ("ri ng", "a_vs_b", "a", "b", "x" * 100, "x" * 101, "é", "b_vs_c", "c")
    other = [make_stage(results / name / "stage1") for name in names]
    ring, star = results / "ring" / "stage1", results / "star" / "stage1"
    stage2 = [results / name / "stage2_if_0.8" for name in ("ring", "star")]
    sets = [[ring, star], [star, ring], stage2, [ring, stage2[1]], [ring, other[0]], [other[1], ring],
            [*other[2:4], ring], [ring, other[4]], [ring, other[5]], [ring, other[6]],
            [ring, star, other[2]], [other[1], other[8]], [other[2], other[7]]]  # fmt: skip
    paths = [compare_path(run_dirs) for run_dirs in sets]
    assert len(set(paths)) == len(sets)
    for path in paths:
        assert path.parent == results and path.name.isascii() and len(path.name) < 110
        assert not set(path.name) & set(" /\\:*?\"<>|$")


def test_folders_and_stages(results):
    assert [path.name for path in stages_of(results / "ring")] == ["stage1", "stage2_if_0.8"]
    assert [path.name for path in seeds_of(results / "seeds")] == ["seed-0", "seed-2", "seed-10"]
    assert first_stage(results / "ring") == results / "ring" / "stage1"
    assert seeds_path([seed / "stage1" for seed in seeds_of(results / "seeds")]).parent.name == "seeds"


def test_refusals_say_what_to_do(results, capsys, monkeypatch):
    ring, star = results / "ring", results / "star"
    assert "there is no results/rung; did you mean results/ring?" in refused(capsys, results / "rung")
    assert "there is no nowhere/at/all; name the folder of a run" in refused(capsys, "nowhere/at/all")
    assert "metrics.jsonl is a file; name the folder" in refused(capsys, ring / "stage1" / "metrics.jsonl")
    assert "name one of the runs in it: results/ring, results/seeds, results/star" in refused(capsys, results)
    assert "there is no stage1/metrics.jsonl in it" in refused(capsys, ring / "influence")
    assert "there is no results/no" in refused(capsys, ring, results / "no")
    assert "--loss is for a sheet of several runs" in refused(capsys, ring, "--loss")
    for flags in [], ["--seeds"]:
        assert "a run is named twice" in refused(capsys, ring, ring / "stage1", *flags)
    assert "--out is for a sheet of several runs" in refused(capsys, ring, "--out", "x.png")
    for name in "x.pdf", "x", "", "results":
        assert "is no PNG file" in refused(capsys, ring, star, "--out", name)
    Path("file").write_text("")
    assert "cannot write file/x.png" in refused(capsys, ring, star, "--out", "file/x.png")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "say where with --out FILE" in refused(capsys, ring, star)


def test_runs_that_share_only_the_root_need_out():
    with pytest.raises(UsageError, match="no sheet can be put in /,"):
        compare_path(["/a/stage1", "/b/stage1"])


def test_flags(capsys):
    for argv, code in ([], 2), (["--bogus", "x"], 2), (["--help"], 0):
        with pytest.raises(SystemExit) as stop:
            plot_utils.main(argv)
        said = capsys.readouterr()
        assert stop.value.code == code and said.err.count("\n") == (code == 2)
    assert "examples:" in said.out and "results/compare_A_vs_B.png" in said.out
    assert max(map(len, said.out.splitlines())) <= 120


def test_a_folder_whose_name_is_no_text_is_drawn(results):
    folder = os.fsencode(results) + b"/\xff$\\frac{$"
    os.rename(results / "ring", folder)
    command = [sys.executable, "-m", "visualization.plot_utils", folder, results / "star"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert Path(done.stdout.decode().strip()).is_file()
