"""Random command lines: each is taken, or refused with one line; none ends in a traceback."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from bad_values import BAD, BAD_PRUNING, is_boolean, words
from command import SMALL, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
import main_pruned
from utils.pruning_args import PruningConfig

FLAGS = {f.name: f for f in dataclasses.fields(PruningConfig)}
HINTS = typing.get_type_hints(PruningConfig)
ALL_BAD = {**BAD, **BAD_PRUNING}


def good_values(f: dataclasses.Field) -> st.SearchStrategy[list[str]]:
    """Words that this flag accepts, or nearly."""
    kind = HINTS[f.name]
    if is_boolean(f):
        return st.sampled_from([[], ["True"], ["False"], ["0"], ["yes"]])
    if f.metadata["choices"]:
        return st.sampled_from(tuple(f.metadata["choices"])).map(lambda v: [v])
    if typing.get_origin(kind) is tuple:
        return st.lists(st.sampled_from(["0.2", "0.5", "1", "if", "dice"]), min_size=1, max_size=3)
    if "int" in f.type:
        return st.integers(0, 50).map(lambda v: [str(v)])
    if "float" in f.type:
        return st.floats(0, 2).map(lambda v: [repr(v)])
    return st.sampled_from(["2:noise", "cpu", "results", "local:2", "a/b"]).map(lambda v: [v])


def bad_values(f: dataclasses.Field) -> st.SearchStrategy[list[str]]:
    """Words that this flag likely refuses."""
    own = st.sampled_from(ALL_BAD.get(f.name, ("",))).map(words)
    text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), max_size=12).map(lambda v: [v])
    number = st.one_of(st.integers(), st.floats()).map(lambda v: [str(v)])
    return st.one_of(own, text, number, st.just([]))


def assignment(name: str) -> st.SearchStrategy[list[str]]:
    """One flag and its words."""
    f = FLAGS[name]
    spellings = [f"--{name}", f"--no-{name}"] if is_boolean(f) else [f"--{name}"]
    values = st.one_of(good_values(f), good_values(f), bad_values(f))
    return st.tuples(st.sampled_from(spellings), values).map(lambda pair: [pair[0], *pair[1]])


CHEAP = ("alpha", "bad_data", "batch_size", "device", "dirichlet", "drop_samples", "dtype", "flip_labels", "init",
         "local_steps", "lr", "max_train", "min_shard", "mode", "node_datasize", "nonIID", "num_workers", "partition",
         "seed", "self_balancing", "shards_per_worker", "topology_file", "val_fraction", "wd")  # fmt: skip
ANY_FLAG = st.one_of([assignment(name) for name in sorted(FLAGS)])
CHEAP_FLAG = st.one_of([assignment(name) for name in CHEAP])


@pytest.fixture
def nothing_trains(monkeypatch):
    """A run up to its first step."""

    def trained(*_, **__):
        raise AssertionError("the run began")

    monkeypatch.setattr("training.trainer.Trainer.run", trained)


@pytest.fixture
def checks_only(monkeypatch, tmp_path):
    """main and main_pruned up to where they would load data, where folders of random names hurt nobody."""
    monkeypatch.chdir(tmp_path)
    summary = {"test_accuracy": 0.5, "test_accuracy_std": 0.0, "epochs": 1.0, "seconds": 1.0}
    monkeypatch.setattr("training.run.train_seeds", lambda config: (summary, []))
    monkeypatch.setattr("training.run.each_seed", lambda config: [config])
    monkeypatch.setattr("main_pruned.run", lambda config: {})


COMMAND_LINES = {"program": st.sampled_from([main, main_pruned]), "lines": st.lists(ANY_FLAG, max_size=4)}


def check_command_line(program, lines, capsys) -> None:
    """It is taken, or refused with one line."""
    code = program.main([word for line in lines for word in line])
    if code != 0:
        refused(capsys, code)
    capsys.readouterr()


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(**COMMAND_LINES)
def test_random_command_lines(checks_only, capsys, program, lines):
    check_command_line(program, lines, capsys)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(**COMMAND_LINES)
def test_two_thousand_random_command_lines(checks_only, capsys, program, lines):
    check_command_line(program, lines, capsys)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(CHEAP_FLAG, max_size=4))
def test_random_command_lines_up_to_the_first_step(nothing_trains, tmp_path_factory, capsys, lines):
    """The same with the data loaded and split, the graph and the networks built."""
    folder = tmp_path_factory.mktemp("random")
    flags = [word for line in lines for word in line]
    try:
        code = main.main([*SMALL, "--results_dir", str(folder), *flags])
    except AssertionError as error:
        assert str(error) == "the run began"
    else:
        refused(capsys, code)
    capsys.readouterr()
