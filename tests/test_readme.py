"""The commands of the README and of the examples, as a user types them."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest

import data.index
import data.resize
import main
import main_pruned
import visualization.runs
from tests.test_architecture import ROOT
from training.grid import cells_of
from utils.args import Config
from utils.parser import parse
from utils.pruning_args import PruningConfig
from valuation.args import ValuationConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python main(?:_pruned)?\.py(?: [^`#|\n]+(?:\\\n[^`#|\n]+)*)?")
FOUND = [found for page in PAGES for found in COMMAND.findall(page.read_text())]
TYPED = sorted({" ".join(found.replace("\\", " ").split()) for found in FOUND})
PLACEHOLDERS = re.compile(r"\b(NAME|PICTURES|SERIES|SOUND|CIFAR|FASHION|HOST|FILE|FOLDER)\b")
# What a user's folder holds, or a recorded run: these flags name something that is not here.
ELSEWHERE = ("--config", "--resume", "--stage1_dir")


def test_the_readme_has_commands():
    assert len(TYPED) >= 15


@pytest.mark.parametrize("typed", TYPED)
def test_every_command_is_understood_and_every_flag_counts(typed):
    program, *words = shlex.split(typed)[1:]
    if "..." in words or "--help" in words or "--config" in words:
        pytest.skip("stands for flags of the user's own, or names a run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(PruningConfig if program == "main_pruned.py" else Config, words, "")


ROOM = re.compile(r"python -m (valuation|data\.index|data\.resize|training\.grid|visualization\.runs)( [^`#|\n]+)?")
OF_ROOMS = sorted({(room, words.strip()) for page in PAGES for room, words in ROOM.findall(page.read_text())})


@pytest.mark.parametrize("room,typed", [(room, typed) for room, typed in OF_ROOMS if typed])
def test_commands_of_rooms_are_understood(room, typed):
    words = shlex.split(typed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if room == "valuation":
            parse(ValuationConfig, words, "")
        elif room == "training.grid":
            assert len(cells_of(words)[1]) > 1
        elif room == "visualization.runs":
            assert visualization.runs.parser().parse_args(words).folder == "results"
        else:
            {"data.index": data.index, "data.resize": data.resize}[room]._parser().parse_args(words)


NOT_HERE = ("dataset_name", "...", *ELSEWHERE)
ON_DIGITS = [t for t in TYPED if not PLACEHOLDERS.search(t) and not any(word in t for word in NOT_HERE)]
SHORTER = ("--epochs", "0.5", "--max_train", "300", "--min_shard", "2", "--no-plots", "--quiet")
FEWER = ("--audit_groups", "3", "--methods", "cascade", "random")


@pytest.mark.slow
@pytest.mark.parametrize("typed", [t for t in ON_DIGITS if "--help" not in t])
def test_commands_on_the_digits_run(typed, tmp_path: Path):
    """Each with fewer epochs, samples and groups."""
    program, *words = shlex.split(typed)[1:]
    words += ["--results_dir", str(tmp_path), *SHORTER]
    if "--dp_noise" in words:
        pytest.importorskip("opacus")
    if "--ledger" in words:
        pytest.importorskip("securesystemslib")
        words += ["--ledger", str(tmp_path / "ledger")]  # the last one counts
    words += FEWER if "--audit" in words else FEWER[2:] if "--sweep" in words else ()
    assert (main_pruned if program == "main_pruned.py" else main).main(words) == 0
