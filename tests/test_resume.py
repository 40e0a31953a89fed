"""A run killed at any instant and resumed ends as one that was not killed, to the bit."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import pytest
from command import arguments, metrics, refused, same_tensors, summary, train

import main
import training.result
import training.round_losses
from training import checkpoint

ROUNDS = 18
FLAGS = ("--epochs", "6", "--checkpoint_every", "2", "--eval_every", "3", "--mode", "exponential_one_peer")
PROJECT = Path(main.__file__).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run without a kill."""
    run_dir = train(tmp_path_factory.mktemp("whole"), *FLAGS)
    assert summary(run_dir)["rounds"] == ROUNDS
    return run_dir


def assert_same_end(run_dir: Path, whole: Path) -> None:
    """Same final rows and momentum, model, metrics and summary."""
    last = f"checkpoints/round-{ROUNDS:08d}.safetensors"
    assert same_tensors(run_dir / last, whole / last)
    assert same_tensors(run_dir / "model.safetensors", whole / "model.safetensors")
    assert metrics(run_dir) == metrics(whole)
    assert summary(run_dir) == summary(whole)


class Killed(BaseException):
    """Stands for kill -9: nothing of the project's catches it."""


def killed_in_round(monkeypatch, count: int) -> None:
    """Kill the next run before it has consumed its ``count``-th round."""

    seen = 0

    def mean_loss(event):
        nonlocal seen
        seen += 1
        if seen == count:
            raise Killed
        return original(event)

    original = training.round_losses.mean_loss
    monkeypatch.setattr(training.round_losses, "mean_loss", mean_loss)


def interrupted(folder: Path, count: int, *more: str) -> Path:
    """A run that was killed in its ``count``-th round."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_in_round(patch, count)
        main.main(arguments(folder, *FLAGS, *more))
    return folder / "run" / "stage1"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12, 17, 18])
def test_resumed_run_ends_like_an_undisturbed_one(tmp_path, whole, count):
    interrupted(tmp_path, count)
    assert_same_end(train(tmp_path, *FLAGS, "--resume"), whole)


@pytest.mark.parametrize(
    "flags",
    [
        ("--protocol", "fedavg", "--epochs", "6"),
        ("--protocol", "fedasync", "--epochs", "4"),
        ("--protocol", "chained", "--epochs", "4"),
        ("--protocol", "local", "--local_steps", "2"),
        ("--patience", "1", "--min_delta", "0.2", "--scheduler", "multistep", "--warmup_step", "3"),
        ("--optimizer", "adamw", "--lr", "0.002", "--model", "cnn", "--channels_last", "--epochs", "2"),
        ("--optimizer", "adam", "--lr", "0.002", "--protocol", "chained", "--epochs", "2"),
        ("--protocol", "qg", "--optimizer", "nesterov", "--local_steps", "2", "--epochs", "3"),
        ("--protocol", "d2", "--mode", "line", "--epochs", "3"),
        ("--protocol", "tracking", "--epochs", "3"),
        ("--protocol", "choco", "--compression", "quantize", "--mode", "ring", "--epochs", "3"),
        ("--protocol", "relay", "--mode", "tree", "--epochs", "3"),
        ("--protocol", "pushsum", "--mode", "exponential", "--epochs", "3"),
        ("--protocol", "diloco", "--optimizer", "adamw", "--lr", "0.002", "--local_steps", "2", "--epochs", "3"),
        ("--protocol", "scaffold", "--fraction_fit", "0.5", "--epochs", "4"),
        ("--protocol", "fedprox", "--server_momentum", "0.5", "--epochs", "4"),
        (
            "--model",
            "cnn",
            "--engine",
            "threads",
            "--augment",
            "crop_flip",
            "--epochs",
            "2",
            "--eval_every",
            "1",
        ),
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_other_runs_resume_too(tmp_path, flags):
    flags = (*FLAGS, *flags)
    whole = train(tmp_path, *flags, name="whole")
    rounds = summary(whole)["rounds"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_in_round(patch, max(2, 2 * rounds // 3))
        train(tmp_path, *flags)
    run_dir = train(tmp_path, *flags, "--resume")
    assert metrics(run_dir) == metrics(whole) and summary(run_dir) == summary(whole)
    assert same_tensors(run_dir / "model.safetensors", whole / "model.safetensors")


def test_killed_again_and_again(tmp_path, whole):
    interrupted(tmp_path, 5)
    for count in (3, 4, 1, 6):
        interrupted(tmp_path, count, "--resume")
    assert_same_end(train(tmp_path, *FLAGS, "--resume"), whole)


@pytest.mark.parametrize("where", ["save_model", "write_json"])
def test_killed_between_training_and_the_summary(tmp_path, whole, monkeypatch, where):
    original = getattr(training.result, where)

    def killed(*arguments):
        if where == "save_model" or arguments[0].name == "summary.json":
            raise Killed
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.result, where, killed)
        with pytest.raises(Killed):
            train(tmp_path, *FLAGS)
    assert_same_end(train(tmp_path, *FLAGS, "--resume"), whole)


def test_killed_while_a_checkpoint_is_written(tmp_path, whole, monkeypatch):
    def torn(tensors, path, metadata):
        original(tensors, path, metadata)
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: len(data) // 2])
        raise Killed

    original = checkpoint.save_file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", torn)
        with pytest.raises(Killed):
            train(tmp_path, *FLAGS)
    run_dir = train(tmp_path, *FLAGS, "--resume")
    assert_same_end(run_dir, whole)
    assert all(p.suffix == ".safetensors" for p in (run_dir / "checkpoints").iterdir())


# ---- damaged files ------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    """Lose the second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, position: int) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    """What some file systems leave after a power cut."""
    path.write_bytes(b"")


DAMAGE = {
    "truncated": truncate,
    "empty": empty,
    "bit of a weight": lambda path: flip(path, path.stat().st_size - 1000),
    "bit of the length": lambda path: flip(path, 2),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, whole, capsys, damage):
    run_dir = interrupted(tmp_path, 12)
    before, last = checkpoint.stored(run_dir / "checkpoints")
    damage(last)
    assert checkpoint.latest(run_dir / "checkpoints").round == checkpoint.read(before).round == 8
    capsys.readouterr()
    assert_same_end(train(tmp_path, *FLAGS, "--resume"), whole)
    assert "warning: " in (shown := capsys.readouterr().err) and last.name in shown


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    """The header holds the trainer's state and the round: as precious as the weights."""
    run_dir = interrupted(tmp_path, 4)
    [path] = checkpoint.stored(run_dir / "checkpoints")
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    chosen = random.Random(0)
    missed = []
    for position in [*chosen.sample(range(header), 150), *chosen.sample(range(header, len(data)), 50)]:
        flip(path, position)
        try:
            checkpoint.read(path)
            missed.append(data[max(0, position - 20) : position + 20])
        except ValueError:
            pass
        path.write_bytes(data)
    assert not missed


def test_all_checkpoints_damaged_starts_anew(tmp_path, whole, capsys):
    run_dir = interrupted(tmp_path, 12)
    for path in checkpoint.stored(run_dir / "checkpoints"):
        truncate(path)
    capsys.readouterr()
    assert_same_end(train(tmp_path, *FLAGS, "--resume"), whole)
    assert capsys.readouterr().err.count("warning: ") == 2


def test_torn_last_line_of_the_metrics(tmp_path, whole):
    run_dir = interrupted(tmp_path, 12)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"round": 12, "val_lo')
    assert_same_end(train(tmp_path, *FLAGS, "--resume"), whole)


def test_damaged_config_is_refused(tmp_path, capsys):
    run_dir = interrupted(tmp_path, 4)
    for content in ("", "{}", "[]", '{"config": 3}', '{"config": {}, "execution": {"engine": "loop"}}'):
        (run_dir / "config.json").write_text(content)
        line = refused(capsys, main.main(arguments(tmp_path, *FLAGS, "--resume")))
        assert "config.json" in line and "--overwrite" in line


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr", "0.2"),
        ("--alpha", "0.5"),
        ("--epochs", "7"),
        ("--model", "mlp_smooth"),
        ("--eval_every", "2"),
    ],
)
def test_another_configuration_is_not_resumed(tmp_path, capsys, flags):
    run_dir = interrupted(tmp_path, 4)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    line = refused(capsys, main.main(arguments(tmp_path, *FLAGS, "--resume", *flags)))
    assert flags[0] in line
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


def test_changed_contents_of_a_named_file_are_noticed(tmp_path, capsys):
    dropped = tmp_path / "dropped.txt"
    dropped.write_text("3\n5\n")
    interrupted(tmp_path, 4, "--drop_samples", str(dropped))
    dropped.write_text("3\n7\n")
    again = arguments(tmp_path, *FLAGS, "--resume", "--drop_samples", str(dropped))
    assert "--drop_samples" in refused(capsys, main.main(again))
    moved = tmp_path / "moved.txt"
    moved.write_text("3\n5\n")
    assert main.main([*again[:-1], str(moved)]) == 0


def test_what_does_not_change_the_numbers_may_differ(tmp_path, whole):
    interrupted(tmp_path, 4)
    run_dir = train(tmp_path, *FLAGS, "--resume", "--engine", "loop", "--threads", "1", "--checkpoint_every", "5")
    assert metrics(run_dir) == metrics(whole)
    assert command.load(run_dir / "config.json")["execution"]["engine"] == "vmap"


def test_last_two_checkpoints_are_kept(whole):
    rounds = [checkpoint.read(p).round for p in checkpoint.stored(whole / "checkpoints")]
    assert rounds == [ROUNDS - 2, ROUNDS]


# ---- disks that refuse ----------------------------------------------------------------------------------


def test_full_disk_while_a_checkpoint_is_written(tmp_path, whole, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        original, calls = checkpoint.save_file, []

        def save_file(*arguments):
            calls.append(arguments)
            return (full if len(calls) == 4 else original)(*arguments)

        patch.setattr(checkpoint, "save_file", save_file)
        line = refused(capsys, main.main(arguments(tmp_path, *FLAGS)))
    assert "No space left" in line and "--resume" in line
    run_dir = tmp_path / "run" / "stage1"
    assert checkpoint.latest(run_dir / "checkpoints").round == 6
    assert_same_end(train(tmp_path, *FLAGS, "--resume"), whole)


@pytest.mark.parametrize("limit", [1_000, 30_000])
def test_file_size_limit(tmp_path, capsys, limit):
    """A quota: 1 kB stops config.json or the partition, 30 kB the first checkpoint (rows of 100 kB)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        code = main.main(arguments(tmp_path, *FLAGS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused(capsys, code).startswith("error: cannot write")
    assert not list(tmp_path.rglob("*.tmp"))


def test_full_disk_while_the_model_is_written(tmp_path, capsys, monkeypatch):
    """Training is done: nothing of it may be lost."""
    import networks

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(networks.safetensors.torch, "save_file", full)
        assert "No space left" in refused(capsys, main.main(arguments(tmp_path, *FLAGS)))
    assert checkpoint.latest(tmp_path / "run" / "stage1" / "checkpoints").round == ROUNDS


@pytest.mark.parametrize("name", ["write_json", "write_partition"])
def test_read_only_results_folder(tmp_path, capsys, monkeypatch, name):
    """Tests may run as root, whom no permission stops: the disk refuses instead."""
    original = os.replace

    def replace(source, target):
        if str(target).startswith(str(tmp_path)):
            raise OSError(30, "Read-only file system", str(target))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    line = refused(capsys, main.main(arguments(tmp_path)))
    assert "Read-only" in line and "--results_dir" in line


def test_a_file_where_the_checkpoints_go(tmp_path, capsys):
    run_dir = interrupted(tmp_path, 1)
    (run_dir / "checkpoints").write_text("in the way")
    line = refused(capsys, main.main(arguments(tmp_path, *FLAGS, "--resume")))
    assert "checkpoints" in line


# ---- real kills -------------------------------------------------------------------------------------------


def start(folder: Path, *more: str) -> subprocess.Popen:
    """main.py as a process of its own."""
    words = [sys.executable, "main.py", *arguments(folder, *FLAGS, "--engine", "threads", *more)]
    return subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until the file is there or the process has ended."""
    end = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    """kill -9."""
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_kill_9(tmp_path):
    whole = train(tmp_path, *FLAGS, "--engine", "threads", name="whole")
    process = start(tmp_path)
    run_dir = tmp_path / "run" / "stage1"
    wait_for(run_dir / "checkpoints", process)
    kill(process)
    assert process.returncode == -signal.SIGKILL and not (run_dir / "summary.json").exists()
    assert_same_end(train(tmp_path, *FLAGS, "--engine", "threads", "--resume"), whole)


@pytest.mark.slow
def test_kill_9_at_twenty_random_instants(tmp_path):
    """A checkpoint every round keeps the disk busy, so that many kills fall into a write."""
    flags = ("--engine", "threads", "--checkpoint_every", "1", "--eval_every", "1", "--epochs", "40")
    whole = train(tmp_path, *FLAGS, *flags, name="whole")
    chosen = random.Random(0)
    run_dir = tmp_path / "run" / "stage1"
    kills = torn = 0
    for _ in range(20):
        process = start(tmp_path, *flags, "--resume")
        wait_for(run_dir / "config.json", process)
        time.sleep(chosen.uniform(0.0, 1.0) if kills else 0.0)
        if process.poll() is None:
            kill(process)
            kills += 1
        else:
            process.communicate()
        torn += len(list(run_dir.rglob("*.tmp")))
        if (run_dir / "summary.json").exists():
            break
    assert kills >= 1
    assert train(tmp_path, *FLAGS, *flags, "--resume") == run_dir
    assert metrics(run_dir) == metrics(whole) and summary(run_dir) == summary(whole)
    assert same_tensors(run_dir / "model.safetensors", whole / "model.safetensors")
