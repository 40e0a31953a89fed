"""The table of runs: what differs, how good, at what cost; filters, sorting, CSV, and an index that links reports."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from urllib.parse import unquote

import pytest

import main
import main_pruned
from tests.test_report import Page
from utils.records import read_json, write_json
from visualization.runs import differing, find_runs, sorted_by
from visualization.runs import main as command

WORDS = "--model mlp --num_workers 4 --max_train 400 --val_fraction 0.2 --quiet".split()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A run, one of two seeds in a folder below, and one that was pruned."""
    folder = tmp_path_factory.mktemp("results")
    where = ["--results_dir", str(folder), "--run_name"]
    assert main.main([*WORDS, *where, "a", "--epochs", "2"]) == 0
    below = ["--results_dir", str(folder / "below"), "--run_name", "b", "--no-plots"]
    assert main.main([*WORDS, *below, "--epochs", "2", "--seeds", "2", "--lr", "0.1"]) == 0
    pruning = ["--pruning_algorithm", "random", "--train_ratio", "0.5", "--no-plots"]
    audit = ["--audit", "--audit_groups", "4", "--methods", "delete", "random"]
    assert main_pruned.main([*WORDS, *where, "c", "--epochs", "1", "--mode", "all", *pruning, *audit]) == 0
    return folder


def test_a_row_a_run_and_its_seeds_together(results):
    rows = {row.name: row for row in find_runs(results)}
    assert list(rows) == ["a", "below/b", "c", "c stage2_random_0.5"]
    assert rows["a"].mean == read_json(results / "a" / "stage1" / "summary.json")["test_accuracy"]
    seeds = [read_json(results / f"below/b/seed-{s}/stage1/summary.json") for s in (0, 1)]
    both = [summary["test_accuracy"] for summary in seeds]
    assert rows["below/b"].mean == pytest.approx(sum(both) / 2)
    assert rows["below/b"].deviation == pytest.approx(abs(both[0] - both[1]) / math.sqrt(2))
    assert rows["below/b"].bytes == seeds[0]["bytes"]
    assert rows["c"].best[0] == "delete" and rows["c"].lds["random"] == rows["c"].lds["random"]
    assert rows["c stage2_random_0.5"].config["kept"] == 0.5


def test_only_what_differs_has_a_column(results):
    assert differing(find_runs(results)) == ["mode", "epochs", "lr", "pruning", "kept"]


def test_rows_are_chosen_and_sorted(results, capsys):
    assert command([str(results), "--where", "lr=0.10", "mode=ring"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "below/b"]
    rows = find_runs(results)
    means = [row.mean for row in sorted_by(rows, "accuracy", reverse=True)]
    assert means == sorted(means, reverse=True)
    assert sorted_by(rows, "LDS", reverse=False)[0].name == "c"  # those without an audit are last
    assert [row.name for row in sorted_by(rows, "lr", reverse=True)][0] == "below/b"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--where", "mod=ring"], "did you mean 'mode'"), (["--where", "mode"], "setting=value"),
     (["--where", "lr=7"], "none of the 4 runs"), (["--sort", "accurcy"], "did you mean 'accuracy'")],
)  # fmt: skip
def test_what_is_not_there_is_one_line(results, words, said, capsys):
    assert command([str(results), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_folders_without_runs_are_one_line(tmp_path, capsys):
    assert command([str(tmp_path)]) == 2 and command([str(tmp_path / "nowhere")]) == 2
    assert "python main.py makes one" in capsys.readouterr().err


def test_csv_has_every_setting_in_all_digits(results, tmp_path):
    assert command([str(results), "--csv", str(tmp_path / "runs.csv")]) == 0
    with open(tmp_path / "runs.csv") as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    assert float(lines["a"]["mean"]) == read_json(results / "a/stage1/summary.json")["test_accuracy"]
    assert lines["a"]["deviation"] == "" and lines["a"]["num_workers"] == "4"
    assert float(lines["c"]["LDS delete"]) == read_json(results / "c/audit.json")["methods"]["delete"]["lds"]


def test_the_index_links_the_reports_that_are_there(results, tmp_path):
    index = results / "index.html"
    assert command([str(results), "--html", str(index)]) == 0
    page = Page(index)
    links = [link["href"] for link in page.all("a") if not link["href"].startswith("#")]
    assert links == ["./a/report.html"] and (results / links[0]).is_file()
    index.unlink()


def test_a_run_that_has_not_ended_and_one_that_is_damaged(results, tmp_path, capsys):
    stage = tmp_path / "open" / "stage1"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text(json.dumps({"round": 0}) + "\n")
    assert command([str(tmp_path)]) == 0
    assert "not finished" in capsys.readouterr().out
    write_json(stage / "summary.json", {"test_accuracy": "high"})
    assert command([str(tmp_path)]) == 2
    assert "summary.json" in capsys.readouterr().err


def test_names_that_addresses_and_folders_do_not_like(results, tmp_path):
    """A run called like a seed hides no other; addresses are quoted; '.' has the name of its folder."""
    import shutil

    for name in ("x#1", "p%20q", "javascript:alert(1)", "seed-5"):
        shutil.copytree(results / "a", tmp_path / name)
    assert {row.name for row in find_runs(tmp_path)} == {"x#1", "p%20q", "javascript:alert(1)", "seed-5"}
    index = tmp_path / "index.html"
    assert command([str(tmp_path), "--html", str(index)]) == 0
    links = [link["href"] for link in Page(index).all("a") if not link["href"].startswith("#")]
    assert all(link.startswith("./") and (tmp_path / unquote(link)).is_file() for link in links) and len(links) == 4
    assert "./x%231/report.html" in links


def test_the_number_of_seeds_is_that_of_the_runs(results, tmp_path, capsys):
    assert command([str(results), "--where", "seeds=2"]) == 0
    assert "below/b" in capsys.readouterr().out
    assert command([str(results), "--csv", str(tmp_path / "runs.csv")]) == 0
    head = (tmp_path / "runs.csv").read_text().splitlines()[0].split(",")
    assert len(head) == len(set(head))
