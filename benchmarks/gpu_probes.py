"""What runs in the measuring processes of ``benchmarks.gpu``: fleets compared, waits counted, gossip timed, scores.

Each function here builds something and returns the function that measures it (see common.Probe).

Legend: N workers, D floats a row, R rows.
"""

from __future__ import annotations

import contextlib
import gc
import io
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import main
import training.round_losses
import training.trainer
from benchmarks.common import MIB, repeat_for, synchronize
from benchmarks.influence_probes import Case, build_job
from benchmarks.training_probes import AT_ONCE, SAMPLES, Setting, build_model, make_fleet, synthetic_data
from data.batches import Batches
from training.protocols.gossip import Gossip
from training.trajectory import RecordedRun
from utils.errors import choose
from utils.influence.cascade import cascade
from utils.topology import build_topology
from workers.mixing import is_average
from workers.worker_vision import Fleet

ROUNDS, WORKERS, SMALL_BATCH = 6, 4, 8
LR = 0.0625  # exact in float32: a recorded step reads the learning rate in that precision on a GPU
FLEETS = 8  # made and destroyed; two recorded steps each take nine of the 32 streams that PyTorch hands out in turn
RAGGED = (5, 20, 9, 30)
DATA = ("plain", "ragged", "augmented", "weighted")


# ---- the same bits, or nearly --------------------------------------------------------------------------------


def batch_norm_network() -> nn.Module:
    """A small network whose row holds statistics, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: build_model("mlp"),
    "cnn": lambda: build_model("cnn"),
    "batchnorm": batch_norm_network,
}


def small_fleet(network: str, data: str, engine: str, device: str, dtype: torch.dtype = torch.float64) -> Fleet:
    """Four workers. ``data``: 'plain' shards, 'ragged' ones (batches of different sizes), 'augmented' pictures, or
    two replicas with different sample weights ('weighted'); 'all' is all of these at once."""
    setting = Setting("mlp" if network == "mlp" else "cnn", device, engine)
    samples, _ = synthetic_data(setting, 1)
    augmentation = "crop_flip" if data in ("augmented", "all") else "none"
    lengths = RAGGED if data in ("ragged", "all") else (30,) * WORKERS
    weights_Mn = None
    if data in ("weighted", "all"):
        weights_Mn = (torch.rand(2, SAMPLES, generator=torch.Generator().manual_seed(1)) < 0.7).to(dtype)
    shards = list(torch.arange(sum(lengths)).split(list(lengths)))
    return make_fleet(
        setting,
        choose(NETWORKS, network, "network")(),
        replace(samples, dtype=dtype, augmentation=augmentation),
        Batches(shards, SMALL_BATCH, seed=0),
        threads=2 if engine == "threads" else 1,
        weights_Mn=weights_Mn,
    )


def trained(network: str, data: str, engine: str, device: str) -> Tensor:
    """Rows [R, D] after six rounds, on the CPU."""
    fleet = small_fleet(network, data, engine, device)
    train(fleet, range(ROUNDS))
    fleet.engine.close()
    return fleet.rows_RD.cpu()


def train(fleet: Fleet, rounds: range) -> None:
    """These rounds on a ring. In one of them only a part of the workers trains."""
    ring = build_topology("ring", WORKERS).mixing(0)
    for t in rounds:
        fleet.step(torch.full((WORKERS,), t), LR, workers=[0, 2] if t == 3 else None)
        fleet.mix(ring)


def compared(rows: Tensor, reference: Tensor) -> dict[str, Any]:
    """The largest difference, as a share of the largest entry, and whether the bits are equal."""
    distance = ((rows - reference).abs().max() / reference.abs().max()).item()
    return {"distance": distance, "same_bits": torch.equal(rows, reference)}


def engines_of(network: str, data: str, device: str) -> list[str]:
    """The engines to hold to the loop: vmap cannot train BatchNorm on batches of different sizes."""
    return [
        *(["graph"] if device != "cpu" else ["graph", "threads"]),
        *([] if network == "batchnorm" and data in ("ragged", "all") else ["vmap"]),
    ]


def agreement(network: str, device: str) -> Callable[[str], dict[str, dict[str, Any]]]:
    """A function of the kind of data: by comparison, how far apart the rows end, and whether the bits are equal."""

    @cache
    def on_cpu(data: str) -> Tensor:
        return trained(network, data, "loop", "cpu")

    def measure(data: str) -> dict[str, dict[str, Any]]:
        loop = trained(network, data, "loop", device)
        pairs = {f"{e} = loop": (trained(network, data, e, device), loop) for e in engines_of(network, data, device)}
        if device != "cpu":
            pairs["loop = loop on the CPU"] = (loop, on_cpu(data))
        return {name: compared(*pair) for name, pair in pairs.items()}

    def leave_fleets() -> dict[str, Any]:
        """Make and destroy fleets that record their steps: MiB that each of the later half left on the GPU, and what
        became of a fleet whose graphs live all the while."""
        living, memory = small_fleet(network, "plain", "graph", device), []
        train(living, range(ROUNDS // 2))
        for i in range(FLEETS):
            trained(network, DATA[i % len(DATA)], "graph", device)
            gc.collect()
            memory.append(torch.cuda.memory_allocated(device) / MIB if device != "cpu" else 0.0)
        train(living, range(ROUNDS // 2, ROUNDS))
        pair = living.rows_RD.cpu(), trained(network, "plain", "loop", device)
        return {"left_mib": (memory[-1] - memory[FLEETS // 2 - 1]) / (FLEETS // 2), "living": compared(*pair)}

    return lambda data: leave_fleets() if data == "fleets" else measure(data)


# ---- waiting for the GPU -------------------------------------------------------------------------------------


def waits(device: torch.device, action: Callable[[], object]) -> dict[str, int]:
    """``{file:line: how often the CPU waited there for the GPU}`` during ``action``."""
    synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return places(caught)


def places(caught: Iterable[warnings.WarningMessage]) -> dict[str, int]:
    """Where PyTorch warned of a wait, and how often."""
    found = [w for w in caught if "called a synchronizing" in str(w.message)]
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found))


def synchronizations(model: str, engine: str, device: str) -> Callable[[str], dict[str, int]]:
    """A function of what to watch: 'step' of a plain fleet, a 'round' of it as the trainer runs it (the losses of the
    round before are read, which waits for an event: PyTorch does not count that), or 'step, all options' of ragged,
    augmented, weighted batches."""
    place = torch.device(device)
    job = build_job(Case(model, "digits", 8, 16, 1000, 4, 0.1, engine, False), 1, device)
    fleet, steps_N = job.make_fleet(), torch.zeros(8, dtype=torch.int64)
    events, losses = Gossip().run(fleet, job), training.round_losses.LateLosses(place)
    special = small_fleet(model, "all", engine, device, torch.float32)
    for t in range(ROUNDS):  # steps are recorded, and permutations of the shards are made
        losses.put(next(events))
        special.step(torch.full((WORKERS,), t), LR)
    watched = {
        "step": lambda: fleet.step(steps_N, LR),
        "round": lambda: losses.put(next(events)),
        "step, all options": lambda: special.step(torch.full((WORKERS,), ROUNDS), LR),
    }
    watched["step"]()  # outside of a round, recorded too
    return lambda what: waits(place, watched[what])


# ---- gossip --------------------------------------------------------------------------------------------------


def gossip_times(setting: Setting, num_workers: int) -> Callable[[str, float], float]:
    """A function of the graph ('copy': a plain copy of the matrix instead) and of the seconds to repeat it: the
    seconds that one takes."""
    device = torch.device(setting.device)
    fleet = make_fleet(setting, build_model(setting.model), *synthetic_data(setting, num_workers))
    target_RD = torch.empty_like(fleet.rows_RD)

    def measure(mode: str, seconds: float) -> float:
        matrix = None if mode == "copy" else build_topology(mode, num_workers).mixing(0)
        action = (lambda: target_RD.copy_(fleet.rows_RD)) if matrix is None else (lambda: fleet.mix(matrix))
        action()
        calls, elapsed = repeat_for(seconds, action, device, AT_ONCE[device.type])
        return elapsed / calls

    return measure


def bytes_moved(mode: str, num_workers: int, row_bytes: int) -> int:
    """What a gossip must read and write: each neighbour's row once and a row a worker. (All rows of an average are
    equal: computed once.)"""
    if mode == "copy":
        return 2 * num_workers * row_bytes
    matrix = build_topology(mode, num_workers).mixing(0)
    return (num_workers + (num_workers if is_average(matrix) else matrix.nnz)) * row_bytes


# ---- a command's GPU time ------------------------------------------------------------------------------------


class TimedTrainer(training.trainer.Trainer):
    """Measures its training (evaluations and checkpoints included): the wall time, and the GPU's with ``profile``."""

    profile = False
    seconds = busy = 0.0

    def run(self) -> None:
        """All rounds."""
        synchronize(self.fleet.device)
        recording = [torch.profiler.ProfilerActivity.CUDA] if self.profile else None
        with torch.profiler.profile(activities=recording) if recording else contextlib.nullcontext() as profiler:
            start = time.perf_counter()
            super().run()
            synchronize(self.fleet.device)
            TimedTrainer.seconds = time.perf_counter() - start
        TimedTrainer.busy = covered(kernels(profiler)) if recording else 0.0
        if recording and TimedTrainer.busy == 0:
            raise RuntimeError("PyTorch's profiler saw no kernel: CUPTI does not work here")


def kernels(profiler: torch.profiler.profile) -> Iterator[tuple[float, float]]:
    """Start and end, in seconds, of all that ran on a GPU."""
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            yield event.time_range.start / 1e6, event.time_range.end / 1e6


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of the intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def command_times(arguments: list[str]) -> Callable[[str, bool], dict[str, float]]:
    """A function that runs main.py in this process under a run name: seconds of the command and of its training,
    and with ``profile`` the seconds that the GPU was at work in the training."""
    training.trainer.Trainer = TimedTrainer

    def measure(run_name: str, profile: bool) -> dict[str, float]:
        TimedTrainer.profile = profile
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # what it reports is not the certificate's
            code = main.main([*arguments, "--run_name", run_name])
        if code != 0:
            raise RuntimeError(f"main.py ended with code {code}")
        elapsed = time.perf_counter() - start
        return {"command": elapsed, "training": TimedTrainer.seconds, "busy": TimedTrainer.busy}

    return measure


# ---- scores --------------------------------------------------------------------------------------------------


def cascade_scores(case: Case, device: str) -> Callable[[], list[float]]:
    """A function that gives the scores of the training samples of that run, trained and scored there."""

    def measure() -> list[float]:
        job = build_job(case, 1, device)
        return cascade(RecordedRun(job, Gossip().rounds(job))).cpu()[job.train_ids].tolist()

    return measure
