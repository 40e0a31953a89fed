"""The table of trust: what is measured is kept, and how metasmoothness and LDS go together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import removals, trust
from training import retrain
from visualization.trust import GOOD, plot_trust, threshold, together

ROOT = Path(trust.__file__).parent.parent
POINTS = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=12)


def a_line(setting: str, seed: int, smooth: float, lds: float) -> dict:
    of = {method: [lds, lds - 0.1, min(1, lds + 0.1)] for method in trust.METHODS}
    seconds = dict.fromkeys(("training", *trust.METHODS), 1.0)
    return {"round": 1, "setting": setting, "seed": seed, "flags": trust.flags(setting, []), "accuracy": 0.9,
            "gradient_ratio": 0.05 + 0.05 * seed, "seconds": seconds,
            "smoothness": {"0.01": smooth, "0.05": smooth}, "lds": {"0.01": of, "0.05": of}}  # fmt: skip


@given(POINTS)
def test_no_other_threshold_makes_fewer_errors(points):
    smooth, lds = map(np.array, zip(*points, strict=True))

    def errors(at: float) -> int:
        return int((lds[smooth < at] > GOOD).sum() + (lds[smooth >= at] <= GOOD).sum())

    assert errors(threshold(smooth, lds)) <= min(errors(at) for at in (-1.1, 1.1, *smooth, *(smooth + 1e-9)))


def test_the_table_and_the_picture_are_of_what_is_there(tmp_path, capsys):
    out = tmp_path / "trust.jsonl"
    lines = [a_line("MLP", 0, 0.9, 0.98), a_line("MLP", 1, 0.8, 0.9), a_line("CNN", 0, 0.1, 0.4)]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"setting": "CNN", "se')  # cut by a kill
    assert trust.main(["--table", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "| MLP | 0.900 | 0.85 / 0.85 | 0.08 | 0.94 / 0.94 |" in said[2] and "above 0.45" in said[-3]
    assert said[-2] == (
        "LDS of if with a gradient ratio from 0.08 on: 0.90 (0.90 to 0.90, 2 points); with a smaller one: 0.69 "
        "(0.40 to 0.98, 4 points)"
    )
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert trust.main(["--table", "--settings", "MLP, IID", "--out", str(out)]) == 2
    assert trust.main(["--table", "--fractions", "0.05", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "metasmoothness, 5 %" in said and "| MLP | 0.900 | 0.85 | 0.08 | 0.94 |" in said
    assert trust.main(["--table", "--fractions", "0.1", "--out", str(out)]) == 2  # the record has none of these
    assert trust.main(["--table", "--fractions", "1.5", "--out", str(out)]) == 2


def test_one_point_is_a_picture_too(tmp_path):
    line = a_line("MLP", 0, 0.9, 0.98)
    assert plot_trust([line], tmp_path / "one.png").exists() and "2 points" in together([line])


@pytest.mark.slow
def test_what_is_there_is_not_measured_again(tmp_path):
    """In a process of its own: flags take the names of networks when they are imported."""
    words = ["--settings", "MLP", "smooth, GELU", "--seeds", "1", "--out", str(tmp_path / "trust.jsonl"), "--epochs",
             "2", "--max_train", "200", "--num_workers", "4", "--audit_groups", "4"]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.trust", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    first = (tmp_path / "trust.jsonl").read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == again.returncode == 0, done.stderr
    assert done.stdout == again.stdout and "smooth, GELU" in done.stdout
    assert (tmp_path / "trust.jsonl").read_text() == first
    line = json.loads(first.splitlines()[0])
    assert line["setting"] == "MLP" and -1 <= line["smoothness"]["0.01"] <= 1 and len(line["lds"]["0.05"]["if"]) == 3


@pytest.mark.slow
def test_what_a_stopped_one_has_retrained_is_kept(tmp_path, monkeypatch):
    words = ["--settings", "MLP", "--seeds", "1", "--out", str(tmp_path / "trust.jsonl"), "--epochs", "2",
             "--max_train", "200", "--num_workers", "4", "--audit_groups", "4"]  # fmt: skip
    retrained, real = [], retrain.retrain

    def stops_in_the_second_audit(job, rounds, masks_Mn, *rest):
        if sum(retrained) >= 6:
            raise KeyboardInterrupt
        retrained.append(len(masks_Mn))
        return real(job, rounds, masks_Mn, *rest)

    monkeypatch.setattr("training.audit.masked_against_removed", lambda *_: None)
    monkeypatch.setattr("training.audit.retrain", stops_in_the_second_audit)
    with pytest.raises(KeyboardInterrupt):
        trust.main(words)
    [kept] = (tmp_path / "trust.jsonl.runs").glob("*/seconds.json")
    seconds = json.loads(kept.read_text())
    monkeypatch.setattr("training.audit.retrain", lambda *a: retrained.append(len(a[2])) or real(*a))
    assert trust.main(words) == 0
    assert sum(retrained) == 2 * 5  # the whole run and four groups, of 1 and of 5 %
    assert json.loads((tmp_path / "trust.jsonl").read_text())["seconds"] == seconds
    assert not list((tmp_path / "trust.jsonl.runs").iterdir())


@pytest.mark.slow
def test_the_tables_of_removals(tmp_path, capsys):
    words = ["--runs", "2", "--out", str(tmp_path / "removals.json"), "--epochs", "2", "--max_train", "200",
             "--num_workers", "4", "--audit_groups", "4", "--min_shard", "5"]  # fmt: skip
    assert removals.main(words) == 0
    record = json.loads((tmp_path / "removals.json").read_text())["runs"]
    assert [run["seed"] for run in record] == [0, 1]
    predicted = [record[0]["lowest"][str(share)]["cascade"]["predicted"] for share in removals.SHARES]
    actual = [record[0]["lowest"][str(share)]["cascade"]["actual"] for share in removals.SHARES]
    assert predicted[-1] > predicted[0] and actual[-1] > actual[0]  # what helps goes last
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 40%") for line in lines) == 2
