"""This project's side of ``benchmarks.peers``: ``python -m benchmarks.peers_fleet JOB THREADS [amp]``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch

from benchmarks.peers_jobs import BATCH, JOBS, LR, MOMENTUM, SEED, Job, Turns
from data.batches import Batches, Samples
from utils.topology import build_topology
from workers.engine import Engine
from workers.optimizers import SGD
from workers.row_layout import RowLayout
from workers.tuning import choose_execution
from workers.worker_vision import Fleet


def rounds(job: Job, threads: int, amp: bool) -> Iterator[tuple[float, str]]:
    """The rounds without end: mean training loss, and the execution, chosen as ``main.py`` chooses it."""
    images, labels_n = job.data()
    half_C = torch.full((job.image_shape[0],), 0.5)
    batches = Batches([job.shard(k) for k in range(job.nodes)], BATCH, SEED)
    model, autocast = job.network(), torch.bfloat16 if amp else None
    samples = Samples(images, labels_n, half_C, half_C)
    name, channels_last = choose_execution(
        model, samples, batches, "auto", None, threads, torch.device("cpu"), autocast
    )
    samples = Samples(images, labels_n, half_C, half_C, channels_last=channels_last)
    layout = RowLayout(model, channels_last)
    row_D = torch.empty(layout.D)
    layout.write(model, row_D)
    fleet = Fleet(Engine(model, layout, name, threads, autocast), row_D, samples, batches, optimizer=SGD(MOMENTUM))
    everybody = list(range(job.nodes))
    average = build_topology("all", job.nodes).mixing(0)
    execution = f"{name} {'channels_last' if channels_last else 'nchw'}{' bf16' if amp else ''}"
    step = 0
    while True:
        loss = 0.0
        fleet.reset_state(everybody)
        for _ in range(job.steps):
            loss += fleet.step(torch.full((job.nodes,), step), LR).mean().item() / job.steps
            step += 1
        fleet.mix(average)
        yield loss, execution


def main() -> None:
    """Train in turns until the parent has had enough."""
    job, threads, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    turns = Turns()
    with contextlib.suppress(EOFError):
        for loss, execution in rounds(JOBS[job], int(threads), "amp" in rest):
            turns.after_round(loss, {"execution": execution})


if __name__ == "__main__":
    main()
