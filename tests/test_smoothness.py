"""Metasmoothness: the formula, the run that it is measured on, and what the command says of it."""

from __future__ import annotations

import math

import command
import numpy as np
import pytest
import torch
from command import prune
from hypothesis import given
from hypothesis import strategies as st
from runs import digits_job
from scipy import stats
from torch import nn

from training.protocols import load_protocol
from training.smoothness import SMOOTH, directions, smoothness_said
from utils.influence.smoothness import metasmoothness
from visualization.checked import load_audit
from visualization.influence_plots import draw_audit

MOVES = st.lists(st.floats(-10, 10).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=8)


@given(MOVES, st.floats(0.1, 10))
def test_a_straight_way_is_one_and_the_way_back_minus_one(moves, factor):
    step = torch.tensor(moves, dtype=torch.float64)
    start = torch.zeros_like(step)
    assert metasmoothness(start, step, (1 + factor) * step) == pytest.approx(1)
    assert metasmoothness(start, step, (1 - factor) * step) == pytest.approx(-1)


def test_parameters_count_by_how_far_they_moved():
    start, half = torch.zeros(3), torch.tensor([3.0, -1.0, 0.0])
    assert metasmoothness(start, half, half + torch.tensor([1.0, 9.0, 5.0])) == pytest.approx((3 - 1) / 4)
    assert math.isnan(metasmoothness(start, start, half))


def test_as_three_trainings_say(tmp_path):
    """Side by side, one after the other, and by hand."""
    job = digits_job(epochs=2)
    rounds, groups = load_protocol("gossip").rounds(job), [job.train_ids[:20].tolist(), job.train_ids[50:60].tolist()]
    rows = []
    for weight in (1.0, 0.5, 0.0):
        weights_n = job.sample_weights_n.clone()
        weights_n[groups[0]] *= weight
        fleet = job.make_fleet(weights_n[None])
        for _ in load_protocol("gossip").run(fleet, job):
            pass
        rows.append(fleet.rows_RD.clone())
    first, second = rows[1] - rows[0], rows[2] - rows[1]
    expected = ((first.abs() * (first.sign() == second.sign())).sum() * 2 / first.abs().sum() - 1).item()
    found = directions(job, rounds, groups, side_by_side=5)
    assert found[0] == pytest.approx(expected, abs=1e-9)
    assert found == pytest.approx(directions(job, rounds, groups, side_by_side=1), abs=1e-9)


def test_a_convex_problem_is_smoother_than_a_rough_network():
    """Softmax regression at a small rate, against ReLU units after many large steps."""
    linear = digits_job(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), lr=0.02)
    rough = digits_job(model="mlp", lr=0.5, epochs=6)
    smooth, crooked = (
        directions(job, load_protocol("gossip").rounds(job), [job.train_ids[:30].tolist()], 3)[0]
        for job in (linear, rough)
    )
    assert smooth > 0.97 and crooked < smooth - 0.1


# ---- the command ------------------------------------------------------------------------------------------


def test_smoothness_alone_and_in_the_audit(tmp_path, capsys):
    words = ("--model", "mlp_smooth", "--epochs", "3", "--audit_groups", "3", "--methods", "random")
    folder = prune(tmp_path, *words[:4], "--smoothness")
    said = capsys.readouterr().out
    assert "metasmoothness" in said and not list(folder.glob("stage2*")) and not (folder / "audit.json").exists()
    [kept] = folder.glob("smoothness-*.json")
    assert len(command.load(kept)["values"]) == 4
    prune(tmp_path, *words, "--audit")
    record = command.load(folder / "audit.json")["metasmoothness"]
    values, (low, high) = record["values"], record["interval"]
    assert record["mean"] == pytest.approx(sum(values) / 3)
    assert len(values) == 3 and low <= record["mean"] <= high
    # The first groups do not depend on how many there are.
    assert values == pytest.approx([command.load(kept)["values"][str(i)] for i in range(3)], abs=1e-6)
    assert f"{record['mean']:.3f}" in capsys.readouterr().out


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    words = ("--model", "mlp_smooth", "--epochs", "2", "--smoothness")
    folder = prune(tmp_path, *words)
    monkeypatch.setattr("training.smoothness.directions", None)
    prune(tmp_path, *words)
    [kept] = folder.glob("smoothness-*.json")
    kept.write_text(kept.read_text().replace("0.", "0.1", 1))
    with pytest.raises(TypeError):  # damaged: it is measured
        prune(tmp_path, *words)


@pytest.mark.parametrize(
    ("mean", "words"), [(SMOOTH + 0.01, ""), (SMOOTH - 0.01, "predict retraining badly"), (math.nan, "diverged")]
)
def test_who_is_warned(mean, words):
    said = smoothness_said({"mean": mean, "interval": [mean, mean], "smooth": mean >= SMOOTH}, 0.05)
    assert words in said and ("--lr" in said) == bool(words)


def test_a_retraining_that_diverges_is_the_largest_rise_and_named(tmp_path, monkeypatch, capsys):
    """The rank of infinity, not an LDS of NaN, and the picture is drawn."""
    monkeypatch.setattr("training.audit.actual_changes", lambda *_: (np.array([1.0, 2.0, np.nan, 3.0]), 0.5))
    words = ("--epochs", "1", "--audit", "--audit_groups", "4", "--methods", "if", "--plots")
    folder = prune(tmp_path, *words)
    record = command.load(folder / "audit.json")
    assert record["diverged"] == [2] and record["actual"] == [1, 2, None, 3]
    entry = record["methods"]["if"]
    assert entry["lds"] == pytest.approx(stats.spearmanr(entry["predicted"], [1, 2, 4, 3]).statistic)
    assert all(-1 <= end <= 1 for end in entry["interval"])
    assert "diverged without group 2" in capsys.readouterr().out
    assert "; 1 diverged" in draw_audit(load_audit(folder)).get_suptitle()
    assert "1 of them diverged" in (folder / "report.html").read_text()
