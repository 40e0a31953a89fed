"""report.html: one file that says what was trained, how well, which data helped, whether to believe it."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import main
import main_pruned
from utils.records import read_json, write_json
from visualization.report import write_report
from visualization.report.__main__ import main as command
from visualization.report.curves import LEFT, MOST_LINES, MOST_POINTS, RIGHT, WIDTH, Line, Panel
from visualization.report.parts import MOST_BYTES, Picture, Report, Section, Table, Text, write

VOID = {"meta", "img", "line", "circle", "path", "br", "link", "input"}


class Page(HTMLParser):
    """What a report holds: its elements, its texts, and whether every element that is opened is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.elements, self.words, self.html = [], [], [], path.read_text()
        self.feed(self.html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict:
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.html)[1])


WORDS = "--model mlp --epochs 3 --num_workers 4 --max_train 400 --val_fraction 0.2 --quiet".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run as main.py leaves it."""
    results = tmp_path_factory.mktemp("trained")
    assert main.main([*WORDS, "--results_dir", str(results), "--run_name", "plain"]) == 0
    return results / "plain"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A run that was scored, audited and pruned, with wrong labels."""
    results = tmp_path_factory.mktemp("pruned")
    words = [*WORDS, "--results_dir", str(results), "--run_name", "pruned", "--flip_labels", "0.1"]
    audit = ["--audit", "--audit_groups", "6", "--methods", "cascade", "random", "--edges"]
    assert main_pruned.main([*words, *audit, "--pruning_algorithm", "cascade", "--train_ratio", "0.8"]) == 0
    return results / "pruned"


def test_a_training_leaves_its_report(trained):
    page, summary = Page(trained / "report.html"), read_json(trained / "stage1" / "summary.json")
    assert f"{summary['test_accuracy']:.2%} [" in page.text and "4 workers trained mlp" in page.text
    assert page.html.index('id="verdict"') < min(page.html.index(f"<{tag}") for tag in ("svg", "table", "img", "code"))
    assert page.data["summary"] == summary and page.data["config"]["config"]["num_workers"] == 4
    paths = [element for element in page.all("path") if element["class"] == "worker"]
    assert {element["data-name"] for element in paths} == {f"worker {k}" for k in range(4)}
    assert len(paths) == 8  # metric and loss
    assert "No scores were computed" in page.text


def test_a_pruning_says_what_helped_and_whether_to_believe_it(pruned):
    page, audit = Page(pruned / "report.html"), read_json(pruned / "audit.json")
    assert f"(LDS {audit['methods']['cascade']['lds']:.2f}" in page.text.replace("−", "-")
    flipped = read_json(pruned / "stage1" / "corruption.json")["flipped"]
    assert "Metasmoothness" in page.text and f"{len(flipped)} training labels were flipped on purpose" in page.text
    verdict = read_json(pruned / "comparison.json")["verdict"].split(";")[0]
    assert verdict.replace("-", "−") in page.text.replace("-", "−")
    for stem in ("audit", "edges", "comparison_cascade_0.8", "extremes_cascade", "scores_cascade", "node_view_cascade"):
        assert (pruned / f"{stem}.png").is_file()
    assert len(page.all("img")) >= 9
    assert "cascade: the samples that harmed most" in page.text and "load_digits" in page.text


def test_a_report_needs_no_other_file_and_tells_what_each_picture_shows(pruned):
    page = Page(pruned / "report.html")
    assert len(page.html) < 3_000_000
    assert not page.all("link") and not re.search(r"(?:src|href)=\"https?:|@import|url\(", page.html)
    for image in page.all("img"):
        assert image["src"].startswith("data:image/png;base64,") and image["alt"]
    for figure in page.all("svg"):
        assert figure["role"] == "img" and "at the end" in figure["aria-label"]
    anchors = {element["id"] for _, element, _ in page.elements if "id" in element}
    assert {link["href"][1:] for link in page.all("a")} <= anchors


def test_its_commands_are_commands(pruned):
    from utils.args import Config
    from utils.parser import parse

    html = Page(pruned / "report.html").html
    lines = re.findall(r"<code>python main\.py (.*?)</code>", html)
    assert len(lines) == 2 and all(parse(Config, line.split(), "").num_workers == 4 for line in lines)
    assert f"python -m visualization.report {pruned}" in html


def test_seeds_have_a_report_each_and_one_of_all(tmp_path):
    words = [*WORDS, "--results_dir", str(tmp_path), "--run_name", "seeds", "--seeds", "3"]
    assert main.main(words) == 0
    page = Page(tmp_path / "seeds" / "report.html")
    assert "95 % interval of the mean over 3 seeds" in page.text
    assert [link["href"] for link in page.all("a") if "seed-" in link["href"]] == [
        f"seed-{seed}/report.html" for seed in range(3)
    ]
    assert all((tmp_path / "seeds" / f"seed-{seed}" / "report.html").is_file() for seed in range(3))


def test_a_server_has_no_graph(tmp_path):
    words = [*WORDS, "--results_dir", str(tmp_path), "--run_name", "server", "--protocol", "fedavg"]
    assert main.main(words) == 0
    page = Page(tmp_path / "server" / "report.html")
    assert "(fedavg)" in page.text and "ring" not in page.text.split("Training")[0]
    assert "graph" not in {element.get("id") for _, element, _ in page.elements}


def test_no_plots_no_report(tmp_path):
    assert main.main([*WORDS, "--results_dir", str(tmp_path), "--run_name", "bare", "--no-plots"]) == 0
    assert not (tmp_path / "bare" / "report.html").exists()


# ---- what may lie in a run ----------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\"'"


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def test_names_are_names_and_never_markup(copied):
    stage = copied / "stage1"
    config, summary = read_json(stage / "config.json"), read_json(stage / "summary.json")
    config["config"] |= {"dataset_name": EVIL, "dataset_path": EVIL, "mode": EVIL}
    config["owners"] = [EVIL] * 4
    write_json(stage / "config.json", config)
    write_json(stage / "summary.json", {**summary, "test_accuracy_by_class": {EVIL: 0.5}})
    labels = dict(np.load(stage / "labels.npz"))
    np.savez(stage / "labels.npz", labels=labels["labels"], class_names=np.array([EVIL] * 10))
    page = Page(write_report(copied))
    assert len(page.all("script")) == 2 and not [image for image in page.all("img") if image["src"] == "x"]
    assert not any(name.startswith("on") for _, element, _ in page.elements for name in element)
    assert page.data["config"]["config"]["dataset_name"] == EVIL
    assert EVIL.replace(" ", "") in page.text.replace(" ", "")


@pytest.mark.parametrize(
    ("name", "text"),
    [("summary.json", "{"), ("config.json", "[]"), ("metrics.jsonl", '{"round": 0, "worker_val_loss": 3}\n{"round":')],
)
def test_damage_is_one_line(copied, name, text, capsys):
    (copied / "stage1" / name).write_text(text)
    assert command([str(copied)]) == 2
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert command([str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err


def test_a_run_that_has_not_ended_has_a_report(copied):
    (copied / "stage1" / "summary.json").unlink()
    assert "The run has not ended" in Page(write_report(copied)).text


def test_a_run_that_diverged_says_so(copied):
    stage = copied / "stage1"
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= {"val_loss": None, "consensus_val_loss": None, "worker_val_loss": [None] * 4}
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(stage / "summary.json", {**read_json(stage / "summary.json"), "test_accuracy": None, "isolated": [2]})
    page = Page(write_report(copied))
    assert "the training diverged" in page.text and "no longer finite: 2" in page.text
    assert "not finite in 1 logged rounds" in page.text


def test_a_report_of_many_workers_and_rounds_stays_small(copied):
    stage, N, T = copied / "stage1", 700, 300
    rng = np.random.default_rng(0)
    config = read_json(stage / "config.json")
    config["config"]["num_workers"] = N
    write_json(stage / "config.json", config)
    for name in ("topology.json", "partition.npz"):
        (stage / name).unlink()
    with open(stage / "metrics.jsonl", "w") as file:
        for t in range(T):
            values = {f"worker_val_{key}": rng.random(N).tolist() for key in ("loss", "accuracy")}
            file.write(json.dumps({"round": t, "val_loss": 1.0, **values}) + "\n")
    path = write_report(copied)
    assert path.stat().st_size < 3_000_000
    assert f"{N - MOST_LINES} more workers have no line" in Page(path).text


# ---- parts --------------------------------------------------------------------------------------


def test_pictures_without_room_are_linked(tmp_path):
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    small.write_bytes(b"\x89PNG" + bytes(1000))
    large.write_bytes(b"\x89PNG" + bytes(MOST_BYTES))
    pictures = [Picture(large, "large one"), Picture(small, "small one")]
    page = Page(write(Report("r", [Text("well")], [Section("Pictures", pictures)]), tmp_path / "report.html"))
    assert [image["alt"] for image in page.all("img")] == ["small one"]
    assert "./large.png" in [link["href"] for link in page.all("a")] and len(page.html) < 3_000_000


def test_a_table_shows_its_first_rows_and_says_how_many_it_left_out(tmp_path):
    table = Table("all", ["n"], [[str(k)] for k in range(503)])
    page = Page(write(Report("r", [], [Section("Table", [table])]), tmp_path / "report.html"))
    assert "3 more rows are not shown" in page.text and len(page.all("td")) == 500


values = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=30)


@settings(max_examples=60, deadline=None)
@given(values, st.booleans(), st.sampled_from([None, True, False]))
def test_curves_of_any_numbers_stay_inside_their_panel(numbers, percent, log):
    y_T = np.array(numbers, dtype=float)
    drawn = Panel("t", "x", "y", [Line("a", np.arange(len(y_T), dtype=float), y_T)], percent, log).drawn
    for line in drawn["lines"]:
        places = [[float(number) for number in place.split()] for place in line["path"][1:].split("L")]
        assert len(places) == len(line["figures"].split())
        for x, y in places:
            assert -1 <= x <= 561 and (percent or -1 <= y <= 301)
    shown = sum(len(line["figures"].split()) for line in drawn["lines"])
    usable = np.isfinite(y_T) & ((y_T > 0) | (log is not True))
    assert shown <= usable.sum() and (shown > 0 or not usable.any() or log is None)


def test_curves_keep_their_ends_when_they_are_thinned():
    x_T = np.arange(MOST_POINTS + 1.0)
    drawn = Panel("t", "round", "y", [Line("a", x_T, np.sin(x_T / 50))]).drawn
    (line,) = drawn["lines"]
    assert 2 <= len(line["figures"].split()) <= MOST_POINTS
    assert line["at"].split()[0] == "0" and line["at"].split()[-1] == str(MOST_POINTS)
    assert line["path"].startswith(f"M{LEFT} ") and f"L{WIDTH - RIGHT} " in line["path"]


def test_the_figures_of_a_curve_are_in_the_page(trained):
    lines = [json.loads(line) for line in (trained / "stage1" / "metrics.jsonl").read_text().splitlines()]
    path = next(element for element in Page(trained / "report.html").all("path") if element["data-name"] == "worker 2")
    assert [float(value) for value in path["data-values"].split()] == pytest.approx(
        [line["worker_val_accuracy"][2] for line in lines], rel=1e-3
    )


# ---- what was found by attacking it -------------------------------------------------------------


def test_a_stage_2_does_not_take_the_place_of_its_run(pruned, tmp_path):
    copy = Path(shutil.copytree(pruned, tmp_path / "copy"))
    for stage in ("stage1", "stage2_cascade_0.8", "stage2_random_0.8"):
        page = Page(write_report(copy / stage))
        assert len(page.data["config"]["config"]["results_dir"]) > 0 and not page.data["config"].get("pruning")


def test_seeds_have_their_report_also_beside_a_single_run(tmp_path):
    words = [*WORDS, "--results_dir", str(tmp_path), "--run_name", "both"]
    assert main.main(words) == 0 and main.main([*words, "--seeds", "3"]) == 0
    assert "over 3 seeds" in Page(tmp_path / "both" / "report.html").text
    (tmp_path / "both" / "seed-1" / "stage1" / "summary.json").unlink()
    page = Page(write_report(tmp_path / "both"))
    assert "1 of 3 seeds have not ended" in page.text
    write_json(tmp_path / "both" / "audit.json", {"methods": {"cascade": {"lds": {"values": [0.5, 0.6]}}}})
    assert "The audit is of other seeds" in Page(write_report(tmp_path / "both")).text


def test_workers_say_on_how_many_samples_they_were_tested(trained):
    summary, page = read_json(trained / "stage1" / "summary.json"), Page(trained / "report.html")
    own, every = summary["worker_test_samples"], summary["test_samples"]
    assert own < every and f"(on {own} of the {every} test samples)" in page.text


def test_a_report_that_became_old_is_deleted(tmp_path):
    words = [*WORDS, "--results_dir", str(tmp_path), "--run_name", "run"]
    assert main.main(words) == 0 and (tmp_path / "run" / "report.html").is_file()
    assert main_pruned.main([*words, "--pruning_algorithm", "random", "--train_ratio", "0.5", "--no-plots"]) == 0
    assert not (tmp_path / "run" / "report.html").exists()


def test_verdicts_do_not_contradict_themselves():
    from visualization.report.verdict import audit_says, data_says

    def said(lds, interval):
        audit = {"methods": {"cascade": {"lds": lds, "interval": interval}}, "actual": [1.0] * 4, "fraction": 0.05}
        return audit_says(audit, True)

    assert "chance" in said(0.85, (-0.1, 0.99)).text and said(0.85, (-0.1, 0.99)).kind == "bad"
    assert "the opposite" in said(-0.9, (-0.99, -0.8)).text
    assert "well" in said(0.9, (0.8, 0.95)).text and said(0.9, (0.8, 0.95)).kind == "good"
    view = {"if": {"worker_influence": np.array([-1.0, -2.0, -3.0])}}
    (text,) = data_says(view, ["a", "b", "c"], [])
    assert "worker a harmed least, those of worker c most" in text.text


def test_a_folder_whose_name_is_no_text_has_a_report(trained, tmp_path):
    copy = Path(shutil.copytree(trained, tmp_path / "bad\udcff"))
    assert write_report(copy).is_file()
