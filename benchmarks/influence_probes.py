"""What runs in the measuring processes of ``benchmarks.influence``: a short run, and all that is timed of it.

Legend: N workers, D floats a row, P trainable floats, n training samples, T local steps, r hops.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import peak_memory, repeat_for
from benchmarks.influence_if_part import compare_if
from networks import load_model
from training import checkpoint
from training.build import Job, build
from training.protocols.gossip import Gossip
from training.trajectory import RecordedRun
from utils.args import Config
from utils.influence.cascade import cascade
from utils.influence.delete import delete
from utils.influence.dice import dice, direction, scored_steps, states_from
from utils.influence.last_layer import last_layer_influence
from utils.influence.targets import node_weights, objective
from utils.progress import Progress, ignored
from workers.derivatives import piece_size
from workers.engine import Engine
from workers.row_layout import RowLayout
from workers.worker_vision import Fleet

HOPS = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    """A run to score: gossip on a ring over IID shards. ``images``: 'digits' (1 x 8 x 8) or '3x32x32' (noise
    with the digits' labels: only the time counts; in float32). ``samples``: n."""

    model: str
    images: str
    workers: int
    batch_size: int
    samples: int
    epochs: int
    val_fraction: float
    engine: str
    channels_last: bool
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """For people."""
        layout = " channels_last" if self.channels_last else ""
        return f"{self.model} {self.images} N={self.workers} ({self.engine}{layout})"


def build_job(case: Case, threads: int, device: str = "cpu") -> Job:
    """The case as a run that is ready to start. A GPU records its steps where a CPU would use threads."""
    engine = "graph" if case.engine == "threads" and device != "cpu" else case.engine
    job = build(
        Config(
            model=case.model,
            num_workers=case.workers,
            batch_size=case.batch_size,
            epochs=case.epochs,
            max_train=case.samples,
            val_fraction=case.val_fraction,
            partition="iid",
            lr=0.01,
            engine=engine,
            channels_last=case.channels_last,
            dtype=case.dtype,
            threads=threads,
            device=device,
            quiet=True,
        )
    )
    if case.images == "digits":
        return job
    shape, count = (3, 32, 32), len(job.samples.targets_n)
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    half_C = torch.full(shape[:1], 0.5)
    samples = dataclasses.replace(job.samples, inputs_n=images, mean_C=half_C, std_C=half_C)
    job.samples = samples.to(torch.device(device))
    job.model = load_model(case.model, 10, shape, seed=0)
    layout = RowLayout(job.model, case.channels_last)
    row_D = torch.empty(layout.D)
    layout.write(job.model, row_D)
    job.initial_ND, job.engine = row_D[None].to(device), Engine(job.model, layout, engine, threads)
    return job


class Kept:
    """A recorded run with all its states in memory: nothing is replayed."""

    def __init__(self, run: RecordedRun):
        self._run = run
        self.states = [rows_ND.clone() for _, rows_ND in run.forwards(range(run.num_steps + 1))]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def final(self) -> Tensor:
        """Rows at the end."""
        return self.states[-1]

    def forwards(self, steps: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Rows before each of these steps."""
        return ((t, self.states[t]) for t in steps)

    def backwards(self, first: int = 0, progress: Progress = ignored) -> Iterator[tuple[int, Tensor]]:
        """Rows before step t for t = T-1 .. first."""
        return ((t, self.states[t]) for t in reversed(range(first, self.num_steps)))


def train(job: Job, snapshots: Path | None = None) -> Fleet:
    """The whole training, as a run does it but for looking at it. With ``snapshots`` it leaves about sqrt(T)
    states there, as stage 1 does."""
    fleet, every = job.make_fleet(), math.isqrt(Gossip().rounds(job) - 1) + 1
    for event in Gossip().run(fleet, job):
        if snapshots and event.done % every == 0:
            state = checkpoint.Checkpoint(event.done, checkpoint.snapshot(fleet), {})
            checkpoint.write(snapshots / checkpoint.TRAJECTORY, state, keep=None)
    return fleet


class OnePass:
    """A pass over the training data in training steps, by a fleet of its own. An epoch's steps are rounded up to
    whole batches: ``share`` is what n samples take of them."""

    def __init__(self, job: Job):
        self.fleet, self.steps = job.make_fleet(), job.steps_per_epoch
        self.first_N = torch.zeros(job.config.num_workers, dtype=torch.int64)
        self.share = len(job.train_ids) / (self.steps * int(job.batches.sizes_N.sum()))

    def __call__(self) -> None:
        for _ in range(self.steps):
            self.fleet.step(self.first_N, 1e-4)
            self.first_N += 1


def naive_dice(run: Kept, states: list[Tensor], t: int, i: int) -> float:
    """n_j / T times the 1-hop score of sample i with ``dice_rounds`` 1, as released code computes it: validation
    gradients anew for every sample, and the sample's own gradient."""
    gradients = [objective(run, rows_ND, "nodes")[1] for rows_ND in states]
    rho_NP, j = direction(run, t, states, gradients), int(run.worker_of_n[i])
    own_1D = run.derivatives.validation_gradient(states[0][j : j + 1], run.job.samples, torch.tensor([i]))[1]
    return -(rho_NP[j] @ own_1D[0, : run.P]).item()


class ScoredRun:
    """A case's run, and the seconds that each part of scoring it takes (``only``: of these parts)."""

    def __init__(
        self, case: Case, threads: int, seconds: float, device: str = "cpu", only: Collection[str] | None = None
    ):
        self.case, self.seconds, self.device = case, seconds, torch.device(device)
        self.job = job = build_job(case, threads, device)
        self.folder = tempfile.TemporaryDirectory()
        fleet = train(job, Path(self.folder.name))
        self.run = RecordedRun(job, Gossip().rounds(job), Path(self.folder.name))
        self.run.set_final(checkpoint.snapshot(fleet))
        self.kept = Kept(self.run)
        self.one_pass = OnePass(job)
        self.t = scored_steps(self.run.num_steps, 1, 1)[0][0]
        self.states = states_from(self.kept, self.t, 1)
        rows_ND = self.states[0]
        rho_NP = torch.randn(rows_ND[:, : self.run.P].shape, generator=torch.Generator().manual_seed(0)).to(device)
        statistics_NS = torch.ones_like(rows_ND[:, self.run.P :])
        self.parts: dict[str, Callable[[], object]] = {
            "training": lambda: train(job),
            "pass": self.one_pass,
            "validation": lambda: self.run.validation_gradient(rows_ND),
            "product": lambda: self.run.step_adjoint(self.t, rows_ND, rho_NP, statistics_NS),
            **{f"dice_{hops}": partial(dice, self.kept, hops, 1) for hops in HOPS},
            "dice_naive": lambda: naive_dice(self.kept, self.states, self.t, int(job.train_ids[0])),
            "delete": lambda: delete(self.kept, 1),
            "cascade": lambda: cascade(self.kept),
            "cascade_replayed": lambda: cascade(self.run),
            "if": lambda: last_layer_influence(*inputs_of_if(self.kept)),
            "if_forward": self.forward,
            "if_pydvl": lambda: last_layer_influence(*self.head_inputs),
        }
        for name, part in self.parts.items():  # the first run pays for memory and imports
            if only is None or name in only:
                part()

    @cached_property
    def head_inputs(self) -> tuple:
        """What ``if`` reads."""
        return inputs_of_if(self.run)

    @torch.no_grad()
    def forward(self) -> None:
        """One network's logits of all training and validation samples, on the fleet's threads."""
        samples, engine = self.job.samples, self.job.engine
        model = copy.deepcopy(self.job.model).to(self.device).eval()
        for ids_n in (self.job.train_ids, self.job.val_ids):
            pieces = ids_n.to(self.device).split(piece_size(samples))
            engine.map(torch.no_grad()(lambda piece: model(samples.plain(piece)[0])), pieces)

    def describe(self) -> dict[str, Any]:
        """Sizes of the run."""
        sizes = {"samples": len(self.job.train_ids), "validation": len(self.job.val_ids), "steps": self.run.num_steps}
        return {"case": self.case.name, **sizes, "floats": self.run.fleet.layout.D}

    def measure(self, part: str) -> dict[str, float]:
        """Seconds of the part (of all n samples, where it is about them) and the MiB the process held at most."""
        forget_peak_memory(self.device)
        calls, seconds = repeat_for(self.seconds, self.parts[part], self.device)
        count = {"dice_naive": len(self.job.train_ids), "pass": self.one_pass.share}.get(part, 1)
        return {"seconds": count * seconds / calls, "peak_mib": peak_memory(self.device)}


def scored_run(
    case: Case, threads: int, seconds: float, device: str, only: Collection[str] | None = None
) -> Callable[[str], dict[str, Any]]:
    """For a Probe: the sizes of the run for part "", else its measurements."""
    scored = ScoredRun(case, threads, seconds, device, only)
    return lambda part="": scored.measure(part) if part else scored.describe()


def last_layer_alone(model: str, n: int, v: int) -> Callable[[], dict[str, float]]:
    """For a Probe: :func:`compare_if`."""
    return lambda: compare_if(model, n, v)


def forget_peak_memory(device: torch.device) -> None:
    """Start the high-water mark of :func:`peak_memory` anew, where the system can (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def inputs_of_if(run: RecordedRun) -> tuple:
    """What ``if`` reads of a run."""
    layer = run.last_layer(node_weights(run.num_workers, "nodes"))
    return layer.head, layer.train_features, layer.train_targets, layer.val_features, layer.val_targets
