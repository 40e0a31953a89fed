"""Dashboards of others: what they are told is what metrics.jsonl has, and training is the same with and without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import main
from utils.records import read_json

WORDS = "--model mlp --num_workers 3 --max_train 300 --epochs 2 --quiet --no-plots".split()


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, *words: str) -> Path:
    assert main.main([*WORDS, "--results_dir", str(folder), "--run_name", "run", *words]) == 0
    return folder / "run" / "stage1"


def events_of(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_tensorboard_gets_every_figure_the_settings_and_the_plots(tmp_path):
    run_dir = train(tmp_path / "told", "--log", "tensorboard")
    plain = train(tmp_path / "plain")
    assert (run_dir / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    events, lines = events_of(run_dir), lines_of(run_dir)
    for name in ("val_loss", "consensus_val_accuracy", "consensus_distance"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(line["round"], pytest.approx(line[name], rel=1e-6, abs=1e-9)) for line in lines]
    for k in range(3):
        values = [event.value for event in events.Scalars(f"worker_val_accuracy/{k:02d}")]
        assert values == pytest.approx([line["worker_val_accuracy"][k] for line in lines])
    assert {"training", "topology", "class_mix", "consensus_distance"} <= set(events.Tags()["images"])
    assert events.Scalars("final/test_accuracy")[0].value == pytest.approx(
        read_json(run_dir / "summary.json")["test_accuracy"]
    )
    assert any("hparams" in name for name in events.summary_metadata)


def test_after_a_kill_no_round_is_told_twice(tmp_path, monkeypatch):
    """The events of rounds after the checkpoint are purged when the run goes on."""
    from training.trainer import Trainer

    real = Trainer.save

    def killed(self):
        real(self)
        if self.done == 4:
            raise KeyboardInterrupt

    words = ["--tensorboard", "--checkpoint_every", "2", "--eval_every", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", killed)
        assert main.main([*WORDS, "--results_dir", str(tmp_path), "--run_name", "run", *words]) == 130
    run_dir = train(tmp_path, *words, "--resume")
    steps = [event.step for event in events_of(run_dir).Scalars("val_loss")]
    assert steps == [line["round"] for line in lines_of(run_dir)]


def test_a_dashboard_that_is_not_there_is_said_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main.main([*WORDS, "--results_dir", str(tmp_path), "--log", "wandb"]) == 2
    assert "--log wandb needs the package 'wandb'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def entries(data: bytes):
    """The records of a .wandb file: a head of 7 bytes, then LevelDB's log format (blocks of 32 KiB)."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if room < 7 or kind == 0:  # the rest of a block is padding
            at += room
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_keeps_a_run_offline_that_holds_the_same(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    run_dir = train(tmp_path / "told", "--log", "wandb")
    plain = train(tmp_path / "plain")
    assert (run_dir / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    told, settings = [], {}
    for data in entries(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "val_loss" in items:
            told.append(json.loads(items["val_loss"]))
        for update in record.run.config.update:
            settings[update.key] = json.loads(update.value_json)
    assert told == pytest.approx([line["val_loss"] for line in lines_of(run_dir)])
    assert settings["num_workers"] == 3 and settings["model"] == "mlp"
    assert list(run_dir.glob("wandb/offline-run-*/files/media/images/training_*.png"))
