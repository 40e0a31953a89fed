"""Observers for other people's dashboards: ``--log tensorboard wandb``, beside metrics.jsonl and deciding nothing.

Each gets every figure of metrics.jsonl, the curves of the workers, all settings, and as pictures the plots of the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from training.observers import Observer
from utils.args import Config
from utils.registry import PICTURES, load

if TYPE_CHECKING:
    from training.trainer import Trainer

MOST_CURVES = 64  # workers with a curve of their own


def settings_of(config: Config) -> dict[str, Any]:
    """Every flag as a number, a switch or a text."""
    values = config.to_json()
    return {name: v if isinstance(v, bool | int | float | str) else _text(v) for name, v in values.items()}


def _text(value: Any) -> str:
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def figures_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line or a summary; those of the workers as ``name/worker``, if they are not too many."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
        elif name.startswith("worker_") and isinstance(value, list) and len(value) <= MOST_CURVES:
            found |= {f"{name}/{k:02d}": float(v) for k, v in enumerate(value) if v is not None}
    return found


class TensorBoard(Observer):
    """TensorBoard events, in ``tensorboard`` of the run's directory."""

    def begin(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._trainer = trainer
        purged = trainer.done + 1 if trainer.resumed else None  # what was told after the checkpoint is told again
        self._events = SummaryWriter(trainer.run_dir / "tensorboard", purge_step=purged)

    def evaluation(self, line: dict[str, Any]) -> None:
        for name, value in figures_of(line).items():
            self._events.add_scalar(name, value, line["round"])

    def end(self, summary: dict[str, Any]) -> None:
        metrics = {f"final/{name}": value for name, value in figures_of(summary).items() if "/" not in name}
        self._events.add_hparams(settings_of(self._trainer.config), metrics, run_name=".")
        for name, figure in load(PICTURES, "figures", "pictures")(self._trainer.run_dir).items():
            self._events.add_figure(name, figure, summary["rounds"])

    def close(self) -> None:
        if hasattr(self, "_events"):
            self._events.close()


class WeightsAndBiases(Observer):
    """A run of Weights & Biases, in ``wandb`` of the run's directory: offline (``wandb sync`` uploads it) unless the
    environment says WANDB_MODE=online."""

    def begin(self, trainer: Trainer) -> None:
        import wandb

        self._trainer, self._wandb = trainer, wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "decentralized-learning"),
            name="/".join(trainer.run_dir.resolve().parts[-3:-1]),  # of seeds the run's name, too
            dir=str(trainer.run_dir),
            config=settings_of(trainer.config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off", silent=True),
        )

    def evaluation(self, line: dict[str, Any]) -> None:
        self._run.log(figures_of(line), step=line["round"])

    def end(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(figures_of(summary))
        for name, figure in load(PICTURES, "figures", "pictures")(self._trainer.run_dir).items():
            self._run.log({name: self._wandb.Image(figure)})

    def close(self) -> None:
        if hasattr(self, "_run"):
            self._run.finish()
