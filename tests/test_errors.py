"""Bad input: exit code 2 and one line that says what is wrong; never a traceback."""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_values import BAD, BAD_PRUNING, FREE_TEXT, HUGE, NEEDS, RUNS_FIRST, is_boolean, words
from command import arguments, refused

import main
import main_pruned
from utils.args import Config
from utils.errors import UsageError
from utils.pruning_args import PruningConfig


@pytest.fixture(autouse=True)
def nothing_trains(monkeypatch):
    """A bad value that is not noticed must not cost a training."""

    def trained(*_, **__):
        raise AssertionError("the run began")

    monkeypatch.setattr("training.trainer.Trainer.run", trained)


def test_every_flag_has_bad_values():
    for config_class, tables in ((Config, (BAD,)), (PruningConfig, (BAD, BAD_PRUNING))):
        wanted = {f.name for f in dataclasses.fields(config_class) if not is_boolean(f)} - FREE_TEXT - RUNS_FIRST
        assert wanted <= {name for table in tables for name in table}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_of_main(name, tmp_path, capsys):
    for value in BAD[name]:
        code = main.main(arguments(tmp_path, *NEEDS.get(name, ()), f"--{name}", *words(value)))
        line = refused(capsys, code)
        assert name in line or name.replace("_", " ") in line or (value and value in line), line


@pytest.mark.parametrize("name", BAD_PRUNING)
def test_bad_values_of_main_pruned(name, tmp_path, capsys):
    for value in BAD_PRUNING[name]:
        code = main_pruned.main(arguments(tmp_path, f"--{name}", *words(value)))
        line = refused(capsys, code)
        assert name in line or (value and value in line), line


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(PruningConfig) if is_boolean(f)])
def test_bad_booleans(name, tmp_path, capsys):
    for flags in ([f"--{name}", "perhaps"], [f"--no-{name}", "True"], [f"--{name}="]):
        assert name in refused(capsys, main_pruned.main(arguments(tmp_path, *flags)))


@pytest.mark.parametrize(
    "flags",
    [
        ["--modle", "mlp"],
        ["--mod", "ring"],  # no abbreviations: a new flag would change what they mean
        ["mlp"],
        ["--lr"],
        ["-lr", "0.1"],
        ["--lr", "0.1", "0.2"],
        ["--", "--lr", "1"],
        ["--stage", "2"],  # a flag of main_pruned.py
    ],
)
def test_command_lines_that_are_none(flags, tmp_path, capsys):
    line = refused(capsys, main.main(arguments(tmp_path, *flags)))
    assert any(word in line for word in flags) and "--help" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mode", "file"], "--topology_file"),
        (["--resume", "--overwrite"], "--resume"),
        (["--milestones", "3", "2"], "--milestones"),
        (["--num_workers", "300"], "--num_workers"),
        (["--alpha", "1e-3", "--min_shard", "74"], "--alpha"),
        (["--node_datasize", "200", "--nonIID"], "--node_datasize"),
        (["--pretrained"], "--pretrained"),
        (["--device", "cuda:99"], "--device"),
        (["--image_size", "4"], "--image_size"),
    ],
)
def test_settings_that_do_not_fit(flags, words, tmp_path, capsys):
    assert words in refused(capsys, main.main(arguments(tmp_path, *flags)))
    assert not (tmp_path / "run").exists()


def test_alpha_too_small_names_alpha_and_workers(tmp_path, capsys):
    line = refused(capsys, main.main(arguments(tmp_path, "--alpha", "0.001", "--min_shard", "74")))
    assert "--alpha" in line and "0.001" in line and "4" in line


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashionmnist", "tinyimagenet", "imagefolder"])
def test_missing_data_say_what_is_expected_where(name, tmp_path, capsys):
    folder = tmp_path / "data"
    line = refused(capsys, main.main(arguments(tmp_path, "--dataset_name", name, "--dataset_path", folder)))
    assert str(folder) in line and (name == "imagefolder" or "--download" in line)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("0 1 0\n1 0 1\n", "square|symmetric"),
        (".5 .5 0 0\n.5 .5 0 0\n", "square"),
        ("0 1\n2 3\n", "not connected"),
        ("0 1\n1 2\n2 9\n", "worker 9"),
        ("0 1\n1 two\n", "line 2"),
        ("", "empty"),
        (".5 .5 0 0\n.5 .6 0 0\n0 0 .5 .5\n0 0 .5 .5\n", "row 1"),
        (None, "No such file"),
    ],
)
def test_bad_topology_files(content, problem, tmp_path, capsys):
    file = tmp_path / "graph.txt"
    if content is not None:
        file.write_text(content)
    line = refused(capsys, main.main(arguments(tmp_path, "--mode", "file", "--topology_file", file)))
    assert str(file) in line and any(p in line for p in problem.split("|"))


@pytest.mark.parametrize("content", ["1 2 three", "-1", "99999", "{}", None])
def test_bad_sample_lists(content, tmp_path, capsys):
    file = tmp_path / "ids.txt"
    if content is not None:
        file.write_text(content)
    assert str(file) in refused(capsys, main.main(arguments(tmp_path, "--drop_samples", file)))


def test_a_results_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in refused(capsys, main.main(arguments(tmp_path / "file")))


# ---- config files -------------------------------------------------------------------------------------

FIELDS = {
    "missing": None,
    "torn": '{"config": {"lr"',
    "a list": "[1]",
    "no object": '{"config": 3}',
    "text for a number": '{"config": {"epochs": "many"}}',
    "null for a number": '{"config": {"batch_size": null}}',
    "fraction for a count": '{"config": {"num_workers": 4.5}}',
    "text for a boolean": '{"config": {"amp": "perhaps"}}',
    "number for a name": '{"config": {"dataset_name": 7}}',
    "list for a name": '{"config": {"dataset_name": ["digits"]}}',
    "text in a list": '{"config": {"milestones": ["a"]}}',
    "number for a list": '{"config": {"milestones": 3}}',
    "number for a path": '{"config": {"results_dir": 3}}',
    "bad value": '{"config": {"lr": -1}}',
    "unknown name": '{"config": {"modle": "mlp"}}',
    "a text": '"config"',
    "deep": "[" * 100_000,
    "deep in a value": '{"config": {"lr": ' + '{"a": ' * 500 + "1" + "}" * 502,
    "large number": '{"config": {"seed": ' + "9" * 4000 + "}}",
    "too large number": '{"config": {"seed": ' + "9" * 5000 + "}}",
    "no number": '{"config": {"lr": NaN}}',
    "infinity": '{"config": {"lr": 1e999}}',
    "a key twice": '{"config": {"lr": 0.1, "lr": 0.2}}',
    "UTF-16": b"\xff\xfe{\x00",
    "NUL in a path": '{"config": {"dataset_path": "a\\u0000b"}}',
    "half a character": '{"config": {"results_dir": "\\ud800"}}',
    "large": " " * (10**7 + 1),
}


@pytest.mark.parametrize("content", [pytest.param(v, id=k) for k, v in FIELDS.items()])
def test_bad_config_files(content, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [
        "--config",
        str(file),
        "--model",
        "mlp",
        "--no-plots",
        "--quiet",
        "--run_name",
        "run",
    ]
    line = refused(capsys, main.main(words))
    assert str(file) in line or any(f"--{name}" in line for name in ("lr", "seed", "dataset_path", "results_dir"))


# ---- main_pruned.py -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["foo", "worker:", "worker:4", "worker:-1", "worker:x"])
def test_a_bad_target_is_refused_before_stage_1(target, tmp_path, capsys):
    assert "target" in refused(capsys, main_pruned.main(arguments(tmp_path, "--target", target)))


@pytest.mark.parametrize("cluster", ["local:0", "local:", "local:two", "tcp://", "tcp://host:port"])
def test_a_bad_cluster_is_refused_before_stage_1(cluster, tmp_path, capsys):
    assert "--cluster" in refused(capsys, main_pruned.main(arguments(tmp_path, "--audit", "--cluster", cluster)))


def test_a_protocol_that_cannot_be_scored_is_refused_before_stage_1(tmp_path, capsys):
    assert "fedasync" in refused(capsys, main_pruned.main(arguments(tmp_path, "--protocol", "fedasync")))


@pytest.mark.parametrize("folder", ["nowhere", "file", "empty"])
def test_a_stage1_dir_that_is_none(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    line = refused(capsys, main_pruned.main(arguments(tmp_path, "--stage1_dir", tmp_path / folder)))
    assert "--stage1_dir" in line and str(tmp_path / folder) in line


# ---- found by trying --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seed", "batch_size", "image_size", "local_steps"])
def test_numbers_of_more_than_64_bits(name, tmp_path, capsys):
    assert f"--{name}" in refused(capsys, main.main(arguments(tmp_path, f"--{name}", HUGE)))


@pytest.mark.parametrize(
    "flags",
    [
        ["--run_name", "x" * 300],
        ["--dataset_name", "cifar10", "--dataset_path", "~no-such-user/data"],
        ["--bad_data", "²:noise"],
        ["--model", "two\nlines"],
    ],
    ids=["long name", "unknown home", "superscript", "two lines"],
)
def test_odd_words(flags, tmp_path, capsys):
    refused(capsys, main.main(arguments(tmp_path, *flags)))


def test_a_file_in_the_place_of_the_run(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stage1").write_text("in the way")
    for flags in ([], ["--resume"], ["--overwrite"]):
        assert str(tmp_path / "run") in refused(capsys, main.main(arguments(tmp_path, *flags)))


@pytest.mark.parametrize("value", ["nan", "inf", "1 nan"])
def test_milestones_that_are_no_numbers(value, tmp_path, capsys):
    assert "milestones" in refused(capsys, main.main(arguments(tmp_path, "--milestones", *words(value))))


# ---- files and names that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--config"], ["--mode", "file", "--topology_file"], ["--drop_samples"], ["--keep_samples"],
        ["--protocol", "chained", "--chain_order", "policy", "--policy"],
    ],  # fmt: skip
    ids=lambda f: f[-1],
)
def test_what_is_no_regular_file_is_not_read(flags, kind, tmp_path, capsys):
    """A pipe without a writer would block for ever, and /dev/zero would fill the memory."""
    path = Path("/dev/null") if kind == "device" else tmp_path / kind
    {"folder": os.mkdir, "pipe": os.mkfifo, "device": str}[kind](path)
    line = refused(capsys, main.main(arguments(tmp_path, *flags, path)))
    assert str(path) in line and "not a regular file" in line


TEXTS = [f.name for f in dataclasses.fields(PruningConfig) if "str" in f.type]


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_no_path_can_hold(name):
    for text in ("a\0b", "\ud800", "\udfff"):
        with pytest.raises(UsageError, match=f"--{name} is .*(NUL|surrogate)") as error:
            PruningConfig(**{name: (text,) if name == "methods" else text})
        str(error.value).encode()  # can be printed anywhere


def test_paths_that_are_not_utf8_are_legitimate():
    assert Config(results_dir=os.fsdecode(b"caf\xe9")).results_dir == "caf\udce9"


@pytest.mark.parametrize("command", ["main", "main_pruned"])
def test_a_path_that_is_not_utf8_can_be_printed(command, tmp_path, monkeypatch, capsys):
    done = {"test_accuracy": 0.5, "epochs": 1, "seconds": 1}
    record = {"algorithm": "noprune", "stage1": done, "stage2": done, "ratio": 1.0, "verdict": None}
    stage1 = SimpleNamespace(folder=Path("caf\udce9", "run"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.run.train_seeds", lambda _: (done, []))
    monkeypatch.setattr("training.pruning.open_stage1", lambda _: stage1)
    monkeypatch.setattr("training.pruning.check_ratios", lambda _: None)
    monkeypatch.setattr("training.comparison.prune", lambda *_, **__: record)
    flags = ["--pruning_algorithm", "noprune"] if command == "main_pruned" else []
    monkeypatch.setattr(sys, "argv", arguments(Path("caf\udce9"), *flags))
    sys.argv.insert(0, command)
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(sys.modules[command].__file__, run_name="__main__")
    assert r"caf\udce9/run" in capsys.readouterr().out
