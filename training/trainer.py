"""The trainer consumes a protocol's rounds: it logs, evaluates, checkpoints and stops.

Legend: N workers, R rows of the fleet, D floats a row.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.batches import Samples
from networks import model_metadata, save_model
from training import checkpoint
from training.build import Job, describe
from training.evaluation import evenly_spread, plan_evaluations
from training.finetune import finetune
from training.identity import check_identity
from training.protocols import Round, load_protocol
from utils.devices import fetch
from utils.early_stopping import EarlyStopping
from utils.errors import UsageError
from utils.progress import Progress, bar, ignored
from utils.records import (
    MetricsLog,
    write_confusion,
    write_json,
    write_labels,
    write_partition,
    write_predictions,
    write_sources,
)
from workers import distributed
from workers.evaluation import predictions
from workers.robust import exposed
from workers.worker_vision import Fleet

SECONDS_BETWEEN_CHECKPOINTS = 60.0
LONG_TEST = 20_000  # forward passes from which testing shows a bar


class WorkerFailed(UsageError):
    """A worker's loss is no longer a number."""


def train(
    job: Job, run_dir: Path, *, snapshots: bool = False, notes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train the job's fleet in ``run_dir``, from the last checkpoint if there is one; returns the summary.

    ``snapshots``: keep about sqrt(rounds) states in trajectory/, from which scoring replays. ``notes``:
    more entries for config.json.

    Writes config.json, partition.npz, topology.json, labels.npz, sources.txt, metrics.jsonl, checkpoints/,
    model.safetensors (the consensus model), predictions.npz, confusion.npz and summary.json. Raises
    :class:`UsageError` where ``run_dir`` holds a run of other data or settings.
    """
    trainer = Trainer(job, run_dir, snapshots, notes or {})
    trainer.start()
    trainer.run()
    return trainer.finish()


class Trainer:
    """One run in one directory. ``start``, ``run``, ``finish``, in that order."""

    def __init__(self, job: Job, run_dir: Path, snapshots: bool = False, notes: dict | None = None):
        self.job, self.config, self.run_dir, self.notes = job, job.config, run_dir, notes or {}
        self.lead = distributed.rank() == 0  # of several processes one writes what all have measured
        self.protocol = load_protocol(job.config.protocol)
        self.rounds = self.protocol.rounds(job)
        self.stop_after = min(self.rounds, self.config.max_rounds or self.rounds)
        self.snapshot_every = checkpoint.snapshot_interval(self.rounds) if snapshots else None
        self.fleet: Fleet = job.make_fleet()
        self.metrics = MetricsLog(run_dir / "metrics.jsonl")
        self.stopping = EarlyStopping(self.config.patience, self.config.min_delta)
        self.shared = getattr(self.protocol, "SHARED", False)
        every = self.config.eval_every or getattr(self.protocol, "EVALUATE_EVERY", None)
        self.evaluations = plan_evaluations(job, self.rounds, 0 if self.shared else self.config.num_workers, every)
        self.samples = 0
        self.done = 0
        self.seconds = self.virtual_seconds = 0.0
        self.messages = 0
        self.stopped = False
        self._losses: list[float] = []
        self._late = LateLosses(self.fleet.device)
        self._last_checkpoint = time.monotonic()
        self._events = None

    def start(self) -> None:
        """Write what is known before training, and go to the last checkpoint."""
        if self.lead:
            self._record()
            if not self.config.quiet:
                print(headline(self.job, self.rounds), file=sys.stderr)
            self._warn_of_exposed()
            for leftover in (self.run_dir / "checkpoints").glob("*.tmp"):  # of a kill while writing
                leftover.unlink()
        found = checkpoint.latest(self.run_dir / "checkpoints", self.job.identity["digest"])
        if found is not None:
            checkpoint.restore(self.fleet, found.tensors)
            self.done = found.round
            self.seconds, self.virtual_seconds = found.state["seconds"], found.state["virtual_seconds"]
            self.messages, self.samples = found.state["messages"], found.state["samples"]
            self.stopped = found.state["stopped"]
            self._losses = found.state["losses"]
            self.fleet.isolated = set(found.state["isolated"])
            self.stopping.load_state_dict(found.state["early_stopping"])
        if self.lead:
            self.metrics.cut_after(self.done if found is not None else -1)
        distributed.barrier()
        if self.config.tensorboard and self.lead:
            self._events = open_tensorboard(self.run_dir)

    def _record(self) -> None:
        """The record of the run, where there is none yet; else the run must be the recorded one."""
        if (self.run_dir / "config.json").exists():
            check_identity(self.run_dir, self.job.identity)
            return
        write_json(self.run_dir / "topology.json", self.job.topology.to_json())
        write_partition(self.run_dir, [s.numpy() for s in self.job.shards])
        write_labels(self.run_dir, self.job.dataset.labels_n.numpy(), self.job.dataset.class_names)
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
        what = f"{self.config.protocol} {self.config.num_workers} workers"
        with bar(self.stop_after, what, "round", self.config.quiet or not self.lead, self.done) as ticks:
            if self.done == 0:
                self._evaluate(ticks, lr=self.job.learning_rate(0, self.rounds))
            clock = time.perf_counter()
            for event in self.protocol.run(self.fleet, self.job, self.done):
                self.done = event.done
                self.virtual_seconds += event.seconds
                self.messages += event.messages
                self.samples += event.samples
                self._losses += self._late.put(event)
                ticks.update()
                last = self.done == self.stop_after
                if last or self.done % self.evaluations.every == 0:
                    self._losses += self._late.flush()
                    self._evaluate(ticks, event.lr, self.seconds + time.perf_counter() - clock)
                last = last or self.stopped
                if last or self._checkpoint_due():
                    self.seconds += time.perf_counter() - clock
                    clock = time.perf_counter()
                    self.save()
                if self.snapshot_every and self.done % self.snapshot_every == 0:
                    self._write(checkpoint.TRAJECTORY, {}, keep=None)
                if last:
                    break

    def _evaluate(self, ticks: tqdm, lr: float, seconds: float = 0.0) -> None:
        """Log one line of metrics, and decide about stopping."""
        measured = self.measure(self.job.samples, self.job.val_ids, self.evaluations.of_workers)
        loss_N, accuracy_N, loss_1, accuracy_1 = measured
        counted_N = self.fleet.counted()
        line = {
            "round": self.done,
            "epoch": self.config.epochs * self.done / self.rounds,
            "lr": lr,
            "train_loss": sum(self._losses) / len(self._losses) if self._losses else None,
            "val_loss": loss_N[counted_N].mean().item(),
            "val_accuracy": accuracy_N[counted_N].mean().item(),
            "worker_val_loss": loss_N.tolist(),
            "worker_val_accuracy": accuracy_N.tolist(),
            "consensus_val_loss": loss_1.item(),
            "consensus_val_accuracy": accuracy_1.item(),
            "consensus_distance": self.fleet.consensus_distance().item(),
            "seconds": seconds,
            "virtual_seconds": self.virtual_seconds,
            "messages": self.messages,
            "bytes": self.messages * self.job.virtual_time.row_bytes,
        }
        if self.lead:
            self.metrics.append(line)
        if self._events is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, self.done)
        self._losses = []
        ticks.set_postfix(
            loss=f"{line['consensus_val_loss']:.3f}",
            acc=f"{line['consensus_val_accuracy']:.3f}",
            distance=f"{line['consensus_distance']:.2g}",
        )
        if self.done > 0:
            self.stopped = distributed.share_json(self.stopping.update(line["consensus_val_loss"]))

    def measure(
        self, samples: Samples, ids_n: Tensor, of_workers: int, progress: Progress = ignored
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss and accuracy of the workers [N], [N] on ``of_workers`` of these samples at most, and of the run's model
        [1], [1] on all of them, on the CPU. ``progress``: gets the forward passes that have been made."""
        N = self.config.num_workers
        of_model = self.fleet.evaluate(samples, ids_n, self.model(), progress=progress)
        of_each = of_model
        if not self.shared:
            ids_n = evenly_spread(ids_n, of_workers)
            common = self.done == 0 and len(self.job.initial_ND) == 1  # they are all the same
            rows_RD = self.fleet.rows_RD[:1] if common else None
            of_each = self.fleet.evaluate(samples, ids_n, rows_RD, progress=progress)
        values = [value.expand(N) for value in of_each] + list(of_model)
        return torch.cat(values).cpu().split([N, N, 1, 1])  # one wait, not four

    def model(self) -> Tensor:
        """The model that the run is about [1, D]: the consensus of the workers, or the server's."""
        return getattr(self.protocol, "global_model", lambda fleet: fleet.consensus())(self.fleet)

    def _checkpoint_due(self) -> bool:
        if self.config.checkpoint_every is not None:
            return self.done % self.config.checkpoint_every == 0
        return distributed.share_json(time.monotonic() - self._last_checkpoint > SECONDS_BETWEEN_CHECKPOINTS)

    def save(self) -> None:
        """A checkpoint of this instant."""
        self._losses += self._late.flush()
        self._losses += self._late.flush()
        state = {
            "seconds": self.seconds,
            "virtual_seconds": self.virtual_seconds,
            "messages": self.messages,
            "samples": self.samples,
            "stopped": self.stopped,
            "losses": self._losses,
            "isolated": sorted(self.fleet.isolated),
            "early_stopping": self.stopping.state_dict(),
        }
        self._write("checkpoints", state)
        self._last_checkpoint = time.monotonic()

    def _write(self, folder: str, state: dict[str, Any], keep: int | None = checkpoint.KEEP) -> None:
        checkpoint.write(
            self.run_dir / folder,
            checkpoint.Checkpoint(self.done, checkpoint.snapshot(self.fleet), state, self.job.identity["digest"]),
            keep,
            distributed.rank(),
            distributed.world(),
            distributed.barrier,
        )

    def finish(self) -> dict[str, Any]:
        """Test once, save the consensus model, write and return the summary."""
        job, fleet = self.job, self.fleet
        test_ids, of_workers = torch.arange(len(job.test_samples.labels_n)), self.evaluations.of_workers_test
        passes = len(test_ids) + (0 if self.shared else self.config.num_workers * min(of_workers, len(test_ids)))
        with bar(passes, "testing", "sample", self.config.quiet or not self.lead or passes < LONG_TEST) as ticks:
            measured = self.measure(job.test_samples, test_ids, of_workers, ticks.update)
        loss_N, accuracy_N, loss_1, accuracy_1 = measured
        model_1D = self.model()
        summary = {
            "test_accuracy": accuracy_1.item(),
            "test_loss": loss_1.item(),
            "worker_test_accuracy": accuracy_N.tolist(),
            "worker_test_loss": loss_N.tolist(),
            "consensus_distance": fleet.consensus_distance().item(),
            "epochs": self.config.epochs * self.done / self.rounds,
            "rounds": self.done,
            "stopped_early": self.stopped,
            "samples_per_second": self.samples / self.seconds if self.seconds else None,
            "seconds": self.seconds,
            "virtual_seconds": self.virtual_seconds,
            "messages": self.messages,
            "bytes": self.messages * job.virtual_time.row_bytes,
        }
        if self.config.finetune:
            summary["finetune"] = finetune(job, model_1D)
        if isinstance(fleet, distributed.ShardedFleet):
            summary["processes"] = distributed.world()
            summary["crossed_bytes"] = fleet.total_crossed_bytes()
        if fleet.isolated:
            summary["isolated"] = sorted(fleet.isolated)
        if job.byzantine is not None:
            summary["byzantine"] = {"workers": list(job.byzantine.workers), "attack": job.byzantine.attack}
        if not self.lead:
            return summary
        names, labels_n = job.dataset.class_names, job.test_samples.labels_n
        predicted_n = predictions(fleet.engine, model_1D, job.test_samples, test_ids)[0]
        write_predictions(self.run_dir, labels_n.cpu().numpy(), predicted_n.cpu().numpy())
        counts_CC = confusion(labels_n, predicted_n, len(names))
        by_class_C = counts_CC.diag() / counts_CC.sum(1)
        summary["test_accuracy_by_class"] = dict(zip(names, by_class_C.tolist(), strict=True))
        write_confusion(self.run_dir, counts_CC.numpy(), names)
        data = job.dataset
        about = dict(mean=data.mean_C.tolist(), std=data.std_C.tolist(), class_names=list(names))
        metadata = model_metadata(self.config.model, data.num_classes, data.images_nCHW.shape[1:], **about)
        save_model(fleet.layout.state_dict(model_1D[0]), self.run_dir / "model.safetensors", metadata)
        write_json(self.run_dir / "summary.json", summary)
        if self._events is not None:
            self._events.close()
        return summary


class LateLosses:
    """Mean training losses of rounds. On a GPU each is read a round late: asked for at once, the CPU would wait for
    the end of every round, and the GPU for the CPU after it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._waiting: tuple[Round, torch.cuda.Event] | None = None

    def put(self, event: Round) -> list[float]:
        """The means that can be read now: that of this round, on a GPU that of the one before it."""
        if self._device.type != "cuda":
            return [mean_loss(event)]
        read = self.flush()
        there = {name: fetch(getattr(event, name)) for name in ("train_loss_R", "trained_R")}
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self._device))
        self._waiting = dataclasses.replace(event, **there), arrived
        return read

    def flush(self) -> list[float]:
        """The mean that has not been read yet, if there is one."""
        if self._waiting is None:
            return []
        event, arrived = self._waiting
        self._waiting = None
        arrived.synchronize()
        return [mean_loss(event)]


def mean_loss(event: Round) -> float:
    """The mean training loss of a round over the workers that trained.

    Raises :class:`WorkerFailed` where a worker's loss is not finite.
    """
    failed = (event.trained_R & ~event.train_loss_R.isfinite()).nonzero()[:, 0].tolist()
    if failed:
        raise WorkerFailed(
            f"the training loss of worker {failed[0]} is {event.train_loss_R[failed[0]].item()} in round "
            f"{event.done}: lower --lr, add --warmup_step, or --on_bad_worker isolate."
        )
    if not bool(event.trained_R.any()):
        raise WorkerFailed(f"every worker has been isolated by round {event.done}: lower --lr.")
    return event.train_loss_R[event.trained_R].mean().item()


def confusion(labels_n: Tensor, predicted_n: Tensor, C: int) -> Tensor:
    """How many samples of each class (row) are taken for each class (column): int64 [C, C]."""
    return (labels_n * C + predicted_n).bincount(minlength=C * C).view(C, C).cpu()


def headline(job: Job, rounds: int) -> str:
    """What is about to be trained, in a line: samples, classes, shapes, workers, rounds, execution."""
    config, data, sizes_N = job.config, job.dataset, job.batches.lengths_N
    shape = " x ".join(map(str, data.images_nCHW.shape[1:]))
    graph = f" on {config.mode}" if config.protocol == "gossip" else ""
    execution = [job.execution.device, job.execution.engine, "channels_last" if job.execution.channels_last else ""]
    lines = [
        f"{data.name}: {len(job.train_ids):,} training, {len(job.val_ids):,} validation and "
        f"{len(data.test_labels_m):,} test samples of {data.num_classes} classes, {shape}; "
        f"{config.num_workers} workers with {int(sizes_N.min()):,} to {int(sizes_N.max()):,} samples; "
        f"{config.protocol}{graph}, {rounds:,} rounds; {config.model} with {job.engine.layout.num_parameters:,} "
        f"parameters; {', '.join(filter(None, execution))}"
    ]
    return "\n".join([*lines, *(f"left out: {note}" for note in data.skipped)])


def open_tensorboard(run_dir: Path):
    """A TensorBoard writer."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run_dir / "tensorboard")
