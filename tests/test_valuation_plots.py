"""Pictures of valuation: what is drawn is what the records say."""

import json

import numpy as np
import pytest
from command import refused
from test_valuation import SMALL

import valuation.__main__
from benchmarks import institutions
from visualization.valuation import by_error, draw_against_truth, draw_errors
from visualization.valuation_benchmarks import draw_institutions, draw_tasks

TRUTHS = ([0.1, 0.3, 0.2], [0.2, 0.25, 0.15])
FAR = 5.0


def over_seeds():
    """Two seeds: one method that knows the truth, one that is beyond the scale at an institution."""
    records = [
        {
            "institutions": ["a", "b", "c"], "truth": truth, "metric": "accuracy",
            "methods": {
                "right": {"values": truth, "relative_l1": 0.0},
                "far": {"values": [FAR, *truth[1:]], "relative_l1": 1.0 + i},
                "equal": {"values": [0.2] * 3, "relative_l1": 0.3},
            },
        }
        for i, truth in enumerate(TRUTHS)
    ]  # fmt: skip
    errors = {"right": [0.0, 0.0, 0.0], "far": [1.5, -4.9, 7.9], "equal": [0.3, 0.3, 0.3]}
    return records, {name: {"relative_l1": error} for name, error in errors.items()}


def test_values_lie_against_the_truth():
    records, summary = over_seeds()
    assert by_error(summary) == ["right", "equal", "far"]
    panels = [axes for axes in draw_against_truth(records, summary).axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left").split("\n")[0] for axes in panels] == ["right", "equal", "far"]
    dashed, *seeds = panels[0].lines
    assert np.array_equal(*dashed.get_data()) and len(seeds) == 2
    for line, truth in zip(seeds, TRUTHS, strict=True):
        assert line.get_xdata().tolist() == sorted(truth) == line.get_ydata().tolist()
    top = panels[2].get_ylim()[1]
    marks = [line for line in panels[2].lines if line.get_marker() == "^"]
    assert [mark.get_xdata().tolist() for mark in marks] == [[0.1], [0.2]] and marks[0].get_ydata()[0] == top < FAR
    assert panels[0].get_ylim() == panels[2].get_ylim()


def test_errors_have_intervals():
    records, summary = over_seeds()
    [axes] = draw_errors(records, summary).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["far", "equal", "right"]
    seeds, interval, mean = axes.lines[:3]
    assert seeds.get_xdata().tolist() == [1.0, 2.0] and mean.get_xdata().tolist() == [1.5]
    assert interval.get_xdata().tolist() == [0, 7.9]  # an error is not below 0


def test_costs_go_on_by_count():
    record = {
        "institutions": [2, 3, 4], "all": [1.0] * 3, "truth": [3.0, 7.0, None], "by_count": [3.0, 7.0, 15.0],
        "methods": {"ddval": [0.5, 0.5, 0.5], "heads": [1.0, None, None]},
    }  # fmt: skip
    [axes] = draw_institutions(record).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["truth, by the number of coalitions"].get_ydata().tolist() == [3, 7, 15]
    assert np.isfinite(lines["heads"].get_ydata()).tolist() == [True, False, False]
    assert len({line.get_color() for name, line in lines.items() if name in ("ddval", "heads", "truth, measured")}) == 3


def test_tasks_have_three_panels():
    curve = [[0.9, 0.8, 0.5], [0.8, 0.7, 0.4], [1.0, 0.9, 0.6]]
    curves = {"ddval": {"lowest_removed": curve, "highest_removed": curve, "found": [[0, 0.5, 0.8, 1]] * 3}}
    record = {"shares": [0, 0.3, 0.6, 1], "bad": 0.2, "metric": "accuracy", "runs": 3, "curves": curves}
    figure = draw_tasks(record)
    lowest, _, found = figure.axes
    assert lowest.lines[0].get_xdata().tolist() == [0, 30, 60] and lowest.lines[0].get_ydata().tolist() == curve[0]
    assert found.lines[0].get_ydata()[-1] == 1 and found.lines[-1].get_xdata().tolist() == [0, 20, 100]


@pytest.mark.slow
def test_several_seeds_are_drawn(tmp_path):
    flags = [*SMALL[:-1], "--results_dir", str(tmp_path), "--run_name", "v", "--seeds", "2", "--max_train", "120"]
    assert valuation.__main__.main([*flags, "--valuations", "equal", "ddval", "--epochs", "1"]) == 0
    assert {p.name for p in (tmp_path / "v/valuation/plots").iterdir()} == {"values.png", "errors.png"}


@pytest.mark.slow
def test_costs_are_measured(tmp_path, capsys):
    out = tmp_path / "i.json"
    flags = [*SMALL[:-1], "--out", str(out), "--most", "4", "--enough", "1e-9", "--epochs", "1"]
    assert institutions.main([*flags, "--valuations", "ddval", "leave_one_out"]) == 0
    record, rows = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    assert record["institutions"] == [2, 3, 4] and record["truth"][1:] == [None, None]
    assert record["by_count"] == pytest.approx([record["truth"][0] * count / 3 for count in (3, 7, 15)])
    assert record["methods"]["ddval"][0] > 0 and record["methods"]["ddval"][1] is None
    assert record["methods"]["leave_one_out"] == [None] * 3 and out.with_suffix(".png").exists()
    assert len(rows) == 5 and rows[-1].startswith("| 4 | 15 |")
    assert "no-such" in refused(capsys, institutions.main([*flags, "--model", "no-such"]))
