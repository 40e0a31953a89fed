"""The trainer consumes a protocol's rounds: it evaluates, checkpoints and stops, and tells observers.

Legend: N workers, D floats a row, K figures (the loss and the task's metrics).
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batches import Samples
from training import checkpoint
from training.build import Job, describe
from training.evaluation import evenly_spread, plan_evaluations
from training.identity import check_identity
from training.observers import Observer, observers_of
from training.protocols import Round, load_protocol
from training.result import save_result
from training.round_losses import LateLosses
from training.split import bytes_a_sample, in_words
from utils.early_stopping import EarlyStopping
from utils.effects import asks_graph
from utils.progress import Progress, bar, ignored
from utils.records import write_json, write_labels, write_partition, write_sources
from workers import distributed
from workers.robust import exposed
from workers.worker_vision import Fleet

SECONDS_BETWEEN_CHECKPOINTS = 60.0
LONG_TEST = 20_000  # forward passes from which testing shows a bar


def train(
    job: Job,
    run_dir: Path,
    *,
    snapshots: bool = False,
    notes: dict[str, Any] | None = None,
    observers: Sequence[Observer] = (),
) -> dict[str, Any]:
    """Train the job's fleet in ``run_dir``, from the last checkpoint if there is one; returns the summary.

    ``snapshots``: keep about sqrt(rounds) states in trajectory/, from which scoring replays. ``notes``:
    more entries for config.json. ``observers``: told what happens, besides those that the flags ask for.

    Writes config.json, partition.npz, topology.json, labels.npz, sources.txt, metrics.jsonl, checkpoints/,
    model.safetensors (the consensus model), predictions.npz, confusion.npz and summary.json. Raises
    :class:`UsageError` where ``run_dir`` holds a run of other data or settings.
    """
    trainer = Trainer(job, run_dir, snapshots, notes or {})
    trainer.observers += observers
    return trainer.train()


class Trainer:
    """One run in one directory. ``observers``: told what happens."""

    def __init__(self, job: Job, run_dir: Path, snapshots: bool = False, notes: dict | None = None):
        self.job, self.config, self.run_dir, self.notes = job, job.config, run_dir, notes or {}
        self.lead = distributed.rank() == 0  # of several processes one writes what all have measured
        self.protocol = load_protocol(job.config.protocol)
        self.rounds = self.protocol.rounds(job)
        self.stop_after = min(self.rounds, self.config.max_rounds or self.rounds)
        self.snapshot_every = checkpoint.snapshot_interval(self.rounds) if snapshots else None
        self.fleet: Fleet = job.make_fleet()
        self.stopping = EarlyStopping(self.config.patience, self.config.min_delta)
        self.shared = self.protocol.shared
        every = self.config.eval_every or self.protocol.evaluate_every
        self.evaluations = plan_evaluations(job, self.rounds, 0 if self.shared else self.config.num_workers, every)
        self.task = job.dataset.task
        self.observers = observers_of(self)
        self.samples = self.bytes = 0  # trained on; sent, by workers and by stages
        self.done = 0
        self.resumed = False
        self.seconds = self.virtual_seconds = 0.0
        self.messages = 0
        self.stopped = False
        self._losses: list[float] = []
        self._late = LateLosses(self.fleet.device)
        self._last_checkpoint = time.monotonic()

    def train(self) -> dict[str, Any]:
        """All of it; the summary."""
        self.start()
        with contextlib.ExitStack() as begun:
            for observer in self.observers:
                observer.begin(self)
                begun.callback(observer.close)
            begun.enter_context(distributed.needing(self.fleet.others))
            distributed.barrier()
            self.run()
            return self.finish()

    def start(self) -> None:
        """Write what is known before training, and go to the last checkpoint."""
        if self.lead:
            self._record()
            if not self.config.quiet:
                print(headline(self.job, self.rounds), file=sys.stderr)
            self._warn_of_exposed()
            for leftover in self.run_dir.rglob(".*.tmp"):  # of a kill while writing
                leftover.unlink()
        self.protocol.start(self.fleet, self.job)
        found = checkpoint.latest(self.run_dir / "checkpoints", self.job.identity["digest"])
        self.resumed = found is not None
        if found is not None:
            checkpoint.restore(self.fleet, found.tensors)
            self.done = found.round
            self.seconds, self.virtual_seconds = found.state["seconds"], found.state["virtual_seconds"]
            self.messages, self.samples = found.state["messages"], found.state["samples"]
            self.bytes = found.state.get("bytes", self.messages * self.job.virtual_time.row_bytes)  # of older versions
            self.stopped = found.state["stopped"]
            self._losses = found.state["losses"]
            self.fleet.isolated = set(found.state["isolated"])
            self.job.decisions.update(found.state.get("decisions", {}))
            self.stopping.load_state_dict(found.state["early_stopping"])

    def _record(self) -> None:
        """The record of the run, where there is none yet; else the run must be the recorded one."""
        if (self.run_dir / "config.json").exists():
            check_identity(self.run_dir, self.job.identity)
            return
        write_json(self.run_dir / "topology.json", self.job.topology.to_json())
        write_partition(self.run_dir, [s.numpy() for s in self.job.shards])
        targets_n = self.job.dataset.targets_n
        write_labels(self.run_dir, self.task.strata(targets_n).numpy(), self.task.stratum_names(targets_n))
        write_sources(self.run_dir, self.job.dataset.sources)
        if self.job.corruption:
            write_json(self.run_dir / "corruption.json", self.job.corruption)
        # Last: a folder with this file is a run, whole but for its training.
        write_json(self.run_dir / "config.json", {**describe(self.job), **self.notes})

    def _warn_of_exposed(self) -> None:
        """Say who hears more bad workers than the rule can take."""
        if self.job.byzantine is None:
            return
        rule = self.config.aggregation
        fallen = {k for matrix in self.job.topology.matrices for k in exposed(rule, matrix, self.job.byzantine)}
        if fallen:
            warnings.warn(
                f"--aggregation {rule} cannot protect workers {sorted(fallen)}: too many of the rows they get are "
                "bad; a denser --mode helps",
                stacklevel=2,
            )

    def run(self) -> None:
        """All remaining rounds."""
        if self.done >= self.stop_after or self.stopped:
            return
        if self.done == 0:
            self._evaluate(lr=self.job.learning_rate(0, self.rounds))
        clock = time.perf_counter()
        for event in self.protocol.run(self.fleet, self.job, self.done):
            self.done = event.done
            self.virtual_seconds += event.seconds
            self.messages += event.messages
            self.samples += event.samples
            self.bytes += self._bytes(event)
            self._losses += self._late.put(event)
            for observer in self.observers:
                observer.round(event)
            last = self.done == self.stop_after
            if last or self.done % self.evaluations.every == 0:
                self._losses += self._late.flush()
                self._evaluate(event.lr, self.seconds + time.perf_counter() - clock)
            last = last or self.stopped
            if last or self._checkpoint_due():
                self.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
                self.save()
            if self.snapshot_every and self.done % self.snapshot_every == 0:
                self._write(checkpoint.TRAJECTORY, {}, keep=None)
            if last:
                break

    def _evaluate(self, lr: float, seconds: float = 0.0) -> None:
        """Measure, tell observers a line of metrics, and decide about stopping."""
        self.fleet.restack()
        of_workers, of_model = self.measure(self.job.samples, self.job.val_ids, self.evaluations.of_workers)
        counted_N = self.fleet.counted()
        line = {
            "round": self.done,
            "epoch": self.config.epochs * self.done / self.rounds,
            "lr": lr,
            "train_loss": sum(self._losses) / len(self._losses) if self._losses else None,
            **{f"val_{name}": value_N[counted_N].mean().item() for name, value_N in of_workers.items()},
            **{f"worker_val_{name}": value_N.tolist() for name, value_N in of_workers.items()},
            **{f"consensus_val_{name}": value for name, value in of_model.items()},
            "consensus_distance": self.fleet.consensus_distance().item(),
            "seconds": seconds,
            "virtual_seconds": self.virtual_seconds,
            "messages": self.messages,
            "bytes": self.bytes,
        }
        for observer in self.observers:
            observer.evaluation(line)
        self._losses = []
        if self.done > 0:
            self.stopped = distributed.share_json(self.stopping.update(line["consensus_val_loss"]))

    def _bytes(self, event: Round) -> int:
        """What was sent in a round between workers, and between stages."""
        between = event.samples * bytes_a_sample(self.job.stages, self.job.samples.dtype.itemsize)
        sent = event.messages * self.job.virtual_time.row_bytes if event.sent_bytes is None else event.sent_bytes
        return sent + between

    def measure(
        self, samples: Samples, ids_m: Tensor, most_of_workers: int, progress: Progress = ignored
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """'loss' and metrics of the workers [N] each, on ``most_of_workers`` of these samples at most, and those of the
        run's model on all of them, on the CPU. ``progress``: gets the forward passes that have been made."""
        N = self.config.num_workers
        of_model = self.fleet.evaluate(samples, ids_m, self.model(), progress=progress)
        of_each = of_model
        if not self.shared:
            ids_m = evenly_spread(ids_m, most_of_workers)
            common = self.done == 0 and len(self.job.initial_ND) == 1  # they are all the same
            rows_RD = self.fleet.rows_RD[:1] if common else None
            of_each = self.fleet.evaluate(samples, ids_m, rows_RD, progress=progress)
        values = [torch.cat([of_each[name].expand(N), value_1]) for name, value_1 in of_model.items()]
        values_KN = torch.stack(values).cpu()  # one wait, not four
        of_workers = dict(zip(of_model, values_KN[:, :N], strict=True))
        return of_workers, dict(zip(of_model, values_KN[:, N].tolist(), strict=True))

    def model(self) -> Tensor:
        """The model that the run is about [1, D]: the consensus of the workers, or the server's."""
        return self.protocol.model(self.fleet)

    def _checkpoint_due(self) -> bool:
        if self.config.checkpoint_every is not None:
            return self.done % self.config.checkpoint_every == 0
        return distributed.share_json(time.monotonic() - self._last_checkpoint > SECONDS_BETWEEN_CHECKPOINTS)

    def save(self) -> None:
        """A checkpoint of this instant."""
        self._losses += self._late.flush()
        state = {
            "seconds": self.seconds,
            "virtual_seconds": self.virtual_seconds,
            "messages": self.messages,
            "samples": self.samples,
            "bytes": self.bytes,
            "stopped": self.stopped,
            "losses": self._losses,
            "isolated": sorted(self.fleet.isolated),
            "early_stopping": self.stopping.state_dict(),
            "decisions": self.job.decisions,
        }
        self._write("checkpoints", state)
        self._last_checkpoint = time.monotonic()

    def _write(self, folder: str, state: dict[str, Any], keep: int | None = checkpoint.KEEP) -> None:
        self.fleet.restack()
        if self.fleet.part is None:
            distributed.barrier()
            return
        checkpoint.write(
            self.run_dir / folder,
            checkpoint.Checkpoint(self.done, checkpoint.snapshot(self.fleet), state, self.job.identity["digest"]),
            keep,
            *self.fleet.part,
            distributed.barrier,
        )

    def finish(self) -> dict[str, Any]:
        """Test once, save the run's model, write and return the summary."""
        job = self.job
        test_ids, most = torch.arange(len(job.test_samples.targets_n)), self.evaluations.of_workers_test
        passes = len(test_ids) + (0 if self.shared else self.config.num_workers * min(most, len(test_ids)))
        with bar(passes, "testing", "sample", self.config.quiet or not self.lead or passes < LONG_TEST) as ticks:
            of_workers, of_model = self.measure(job.test_samples, test_ids, most, ticks.update)
        metrics = [name for name in of_model if name != "loss"]
        summary = {
            **{f"test_{name}": of_model[name] for name in (*metrics, "loss")},
            **{f"worker_test_{name}": of_workers[name].tolist() for name in (*metrics, "loss")},
            "test_samples": len(test_ids),
            "worker_test_samples": len(test_ids) if self.shared else min(most, len(test_ids)),  # on which workers are
            "metric": vars(self.task.metric),
            "consensus_distance": self.fleet.consensus_distance().item(),
            "epochs": self.config.epochs * self.done / self.rounds,
            "rounds": self.done,
            "stopped_early": self.stopped,
            "samples_per_second": self.samples / self.seconds if self.seconds else None,
            "seconds": self.seconds,
            "virtual_seconds": self.virtual_seconds,
            "messages": self.messages,
            "bytes": self.bytes,
            **job.decisions,
        }
        for observer in self.observers:
            observer.end(summary)  # before there is a summary.json: a run that has one is not gone on with
        return save_result(job, self.fleet, self.model(), self.run_dir, summary)


def headline(job: Job, rounds: int) -> str:
    """What is about to be trained, in a line: samples, classes, shapes, workers, rounds, execution."""
    config, data, sizes_N = job.config, job.dataset, job.batches.lengths_N
    shape = " x ".join(map(str, data.inputs_n.shape[1:]))
    graph = f" on {config.mode}" if asks_graph(config) else ""
    execution = [job.execution.device, job.execution.engine, "channels_last" if job.execution.channels_last else ""]
    parts = job.execution.batch_parts
    execution += [f"batches in {parts} parts" if parts > 1 and not job.stages else in_words(config, job.stages, parts)]
    lines = [
        f"{data.name}: {len(job.train_ids):,} training, {len(job.val_ids):,} validation and "
        f"{len(data.test_targets_m):,} test samples {data.task.what}, {shape}; "
        f"{config.num_workers} workers with {int(sizes_N.min()):,} to {int(sizes_N.max()):,} samples; "
        f"{config.protocol}{graph}, {rounds:,} rounds; {config.model} with {job.engine.layout.num_parameters:,} "
        f"parameters; {', '.join(filter(None, execution))}"
    ]
    return "\n".join([*lines, *(f"left out: {note}" for note in data.skipped), *data.notes])
