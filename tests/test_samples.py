"""``python -m visualization.samples``: the samples that harmed or helped most, from records alone."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from command import refused

from utils.records import MetricsLog, write_json, write_labels, write_partition, write_sources
from utils.scores import write_scores
from visualization import samples

SAMPLES = 30
SCORES = np.linspace(-1, 1, 20)[np.random.default_rng(0).permutation(20)]
IDS = np.arange(20)[::-1] + 5  # of 30 samples, 20 are training samples
OWNER = np.arange(SAMPLES) % 2


@pytest.fixture
def run(tmp_path):
    """results/run with stage 1, two owners, and scores of dice."""
    stage = tmp_path / "run" / "stage1"
    MetricsLog(stage / "metrics.jsonl").append({"round": 0})
    write_labels(stage, np.arange(SAMPLES) % 3, ["cat", "dog", "emu, or so"])
    write_partition(stage, [IDS[OWNER[IDS] == k] for k in range(2)])
    write_sources(stage, [f"train/file {i}.png" for i in range(SAMPLES)])
    write_json(stage / "config.json", {"owners": ["Kiel", "Bonn"]})
    scored(tmp_path / "run" / "influence" / "dice.zarr")
    return tmp_path / "run"


def scored(path, **changes):
    write_scores(path, {"scores": SCORES, "sample_id": IDS, "worker": OWNER[IDS], **changes}, {"method": path.stem})


def said(capsys, *words) -> list[str]:
    assert samples.main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


def refusal(capsys, *words) -> str:
    return refused(capsys, samples.main([str(word) for word in words]))


def test_the_lowest_come_first_with_owner_label_and_source(run, capsys):
    head, *rows = said(capsys, run, "--lowest", "3", "--method", "dice")
    assert head.split() == ["id", "score", "owner", "label", "source"]
    order = IDS[np.argsort(SCORES)][:3]
    assert [int(row.split()[0]) for row in rows] == order.tolist()
    for row, i, score in zip(rows, order, np.sort(SCORES), strict=False):
        assert f"{score:+.4g}" in row and f"{OWNER[i]} {['Kiel', 'Bonn'][OWNER[i]]}" in row
        assert row.endswith(f"train/file {i}.png") and ["cat", "dog", "emu, or so"][i % 3] in row
    assert said(capsys, run / "stage1", "--lowest", "3") == [head, *rows], "the stage, and the only method, will do"
    assert len(said(capsys, run)) == 1 + samples.SHOWN
    assert said(capsys, run, "--highest", "1")[1].split()[0] == str(IDS[SCORES.argmax()])


def test_a_csv_holds_the_same_in_full(run, capsys, tmp_path):
    path = tmp_path / "new" / "scores.csv"
    assert said(capsys, run, "--all", "--csv", path) == [f"20 samples: {path}"]
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert list(rows[0]) == ["id", "score", "owner", "label", "source"]
    assert [int(row["id"]) for row in rows] == sorted(IDS.tolist())
    by_id = dict(zip(IDS.tolist(), SCORES.tolist(), strict=True))
    assert all(float(row["score"]) == by_id[int(row["id"])] for row in rows), "to the bit"
    assert {row["label"] for row in rows} == {"cat", "dog", "emu, or so"}
    assert {row["owner"] for row in rows} == {"0 Kiel", "1 Bonn"}
    said(capsys, run, "--lowest", "2", "--csv", path)
    assert len(path.read_text().splitlines()) == 3


def test_scores_may_lie_in_the_stage_and_owners_and_sources_may_not_be_known(run, capsys):
    (run / "influence").rename(run / "stage1" / "influence")
    write_json(run / "stage1" / "config.json", {})
    (run / "stage1" / "sources.txt").unlink()
    head, row = said(capsys, run, "--lowest", "1")
    assert row.split()[:3] == [str(IDS[SCORES.argmin()]), "-1", str(OWNER[IDS[SCORES.argmin()]])]
    write_sources(run / "stage1", [])
    assert said(capsys, run, "--lowest", "1") == [head, row]


def test_scores_that_are_not_finite_stand_last(run, capsys):
    scored(run / "influence" / "dice.zarr", scores=np.where(SCORES == SCORES.min(), np.nan, SCORES))
    for flag in "--lowest", "--highest":
        assert "nan" in said(capsys, run, flag, "20")[-1]


def test_what_is_missing_is_a_line(run, capsys, tmp_path):
    scored(run / "influence" / "if.zarr")
    assert "several scores: choose one with --method (dice, if)" in refusal(capsys, run)
    line = refusal(capsys, run, "--method", "cascade")
    assert "no scores of cascade, only of dice, if" in line and "main_pruned.py --config" in line
    assert line.endswith("--pruning_algorithm cascade")
    line = refusal(capsys, run, "--method", "cascde")
    assert "Did you mean 'cascade'?" in line and "main_pruned.py" not in line
    (run / "influence").rename(run / "elsewhere")
    assert "has no scores; compute them: python main_pruned.py" in refusal(capsys, run)
    (run / "elsewhere").rename(run / "influence")
    assert "there is no" in refusal(capsys, tmp_path / "rum")
    (run / "stage1" / "labels.npz").rename(run / "labels.npz")
    assert "labels.npz" in refusal(capsys, run, "--method", "dice")


def test_scores_of_another_run_are_refused(run, capsys):
    scored(run / "influence" / "dice.zarr", worker=1 - OWNER[IDS])
    assert "of other samples than" in refusal(capsys, run)
    scored(run / "influence" / "dice.zarr", sample_id=IDS + 10)
    assert "of other samples than" in refusal(capsys, run)
    scored(run / "influence" / "dice.zarr")
    write_sources(run / "stage1", ["a", "b"])
    assert "sources.txt is damaged" in refusal(capsys, run)
    write_sources(run / "stage1", ["a"] * SAMPLES)
    write_json(run / "stage1" / "config.json", {"owners": ["Kiel"]})
    assert "names 1 owners of 2 workers" in refusal(capsys, run)


def test_a_folder_of_seeds_names_one(run, capsys, tmp_path):
    run.rename(tmp_path / "seed-0")
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seed-0").rename(tmp_path / "seeds" / "seed-0")
    assert "name one, such as" in refusal(capsys, tmp_path / "seeds")


@pytest.mark.parametrize("words", [["--lowest", "0"], ["--highest", "x"], ["--lowest", "1", "--all"], []])
def test_bad_flags_are_a_line(capsys, words):
    with pytest.raises(SystemExit) as stop:
        samples.main([*words, *(["results/x"] if words else [])])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        samples.main(["--help"])
    text = capsys.readouterr().out
    assert "columns:" in text and "--csv worst.csv" in text and "main_pruned.py" in text
    assert max(map(len, text.splitlines())) <= 120
