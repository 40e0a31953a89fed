"""Observers of a run: told what happens, and deciding nothing.

To add one, subclass :class:`Observer` and add it in :func:`observers_of`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.protocols import Round
from utils.args import Config
from utils.errors import check_installed
from utils.progress import bar
from utils.records import MetricsLog
from utils.registry import OBSERVERS, load

if TYPE_CHECKING:
    from training.trainer import Trainer


class Observer:
    """What a run tells. ``begin`` hands over the trainer, whose fleet may be looked at whenever it tells something;
    ``close`` comes last, also where the run fails or is interrupted."""

    def begin(self, trainer: Trainer) -> None:
        """The run starts, or goes on after ``trainer.done`` rounds."""

    def round(self, event: Round) -> None:
        """A round has ended."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """The models have been measured: a line of metrics.jsonl."""

    def end(self, summary: dict[str, Any]) -> None:
        """The run is finished: what its summary.json will say."""

    def close(self) -> None:
        """Let go of files and screens."""


class MetricsLines(Observer):
    """metrics.jsonl: one line an evaluation; lines later than the checkpoint that a run goes on from are cut."""

    def begin(self, trainer: Trainer) -> None:
        self._log = MetricsLog(trainer.run_dir / "metrics.jsonl")
        self._log.cut_after(trainer.done if trainer.resumed else -1)

    def evaluation(self, line: dict[str, Any]) -> None:
        self._log.append(line)


class Bar(Observer):
    """The progress bar: rounds, and how good the run's model is."""

    def begin(self, trainer: Trainer) -> None:
        what = f"{trainer.config.protocol} {trainer.config.num_workers} workers"
        self._metric = trainer.job.dataset.task.metric.name
        self._ticks = bar(trainer.stop_after, what, "round", initial=trainer.done)

    def round(self, event: Round) -> None:
        self._ticks.update()

    def evaluation(self, line: dict[str, Any]) -> None:
        shown = {"loss": line["consensus_val_loss"], self._metric: line[f"consensus_val_{self._metric}"]}
        self._ticks.set_postfix(
            {name: f"{value:.3f}" for name, value in shown.items()} | {"distance": f"{line['consensus_distance']:.2g}"}
        )

    def close(self) -> None:
        self._ticks.close()


def observers_of(trainer: Trainer) -> list[Observer]:
    """Who watches a run; of several processes the first one is watched, but for the ledger."""
    every: list[Observer] = []  # each process signs what its own workers did
    if trainer.config.ledger:
        every.append(load(OBSERVERS, "ledger", "observer")(trainer))
    if not trainer.lead:
        return every
    observers: list[Observer] = [MetricsLines(), *every]
    observers += [] if trainer.config.quiet else [Bar()]
    return observers + [load(OBSERVERS, name, "observer")() for name in logs_of(trainer.config)]


def logs_of(config: Config) -> tuple[str, ...]:
    """The dashboards that a run tells (training/logs.py)."""
    return tuple(dict.fromkeys((*config.log, *(["tensorboard"] * config.tensorboard))))


def check_logs(config: Config) -> None:
    """Raises :class:`UsageError` where a package of theirs is missing."""
    for name in logs_of(config):
        check_installed([name], "requirements-log.txt", f"--log {name}")
