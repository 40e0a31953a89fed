"""Which execution a run gets: by rule, so that the same command gives the same bits on a busy machine too.

The rule reads shapes, device and the number of workers, never a clock; ``benchmarks.training --rule`` keeps it
honest. Only ``--engine measure`` times the candidates. Whatever was chosen is recorded, and reused by resume,
replay, audit and stage 2.
"""

from __future__ import annotations

import dataclasses
import time
import warnings

import torch
from torch import nn

from data.batches import Batches, Samples
from utils.errors import UsageError
from workers.engine import Engine
from workers.row_layout import RowLayout
from workers.worker_vision import Fleet

# Linear layers of all workers as one batched product: measured on MLPs of 5 thousand to 2 million parameters and
# 1 to 64 workers, two threads. With 8 workers 2.5 x one by one at 5 thousand, 1.25 x at 100 thousand, 0.8 x at 200.
BATCHED_PARAMETERS, BATCHED_WORKERS = 150_000, 8
TRIAL_ROWS, GPU_TRIAL_ROWS = 128, 64


def choose_execution(
    model: nn.Module,
    samples: Samples,
    batches: Batches,
    engine: str,
    channels_last: bool | None,
    threads: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> tuple[str, bool]:
    """The engine's name and whether convolutions are laid out channels_last.

    ``engine`` 'auto' and ``channels_last`` None follow the rule; 'measure' times SGD steps of a part of the fleet.
    """
    if engine == "graph" and device.type != "cuda":
        raise UsageError(f"--engine graph records steps for a GPU, and this run is on '{device}': use --engine auto.")
    has_convolutions = any(p.dim() == 4 for p in model.parameters())
    layout = has_convolutions if channels_last is None else channels_last
    workers = len(batches.lengths_N)
    if engine == "measure":
        layouts = [layout] if channels_last is not None or not has_convolutions else [True, False]
        names = ["graph", "loop"] if device.type == "cuda" else ["threads"]
        names += [] if has_convolutions else ["vmap"]
        return fastest(model, samples, batches, [(n, c) for n in names for c in layouts], threads, device, autocast)
    name = rule(model, workers, device.type, autocast) if engine == "auto" else engine
    if engine == "auto" and name == "graph":
        name = recordable(model, samples, batches, layout, threads, device, autocast)
    return name, layout


def rule(model: nn.Module, workers: int, device_type: str, autocast: torch.dtype | None = None) -> str:
    """The engine for so many workers with this network: many small linear networks are batched; other steps are
    recorded as a graph on a GPU, and spread over threads elsewhere (batched convolutions become grouped ones:
    half as fast on a CPU)."""
    only_linear = all(p.dim() <= 2 for p in model.parameters()) and not any(
        b.is_floating_point() for b in model.buffers()
    )
    small = sum(p.numel() for p in model.parameters()) <= BATCHED_PARAMETERS
    if only_linear and small and workers >= BATCHED_WORKERS and autocast is None:
        return "vmap"
    return "graph" if device_type == "cuda" else "threads"


def recordable(
    model: nn.Module,
    samples: Samples,
    batches: Batches,
    channels_last: bool,
    threads: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> str:
    """'graph' where this network's step can be recorded and a recorded one does what a plain one does; else 'loop',
    with a warning: a bad recording would train on in silence."""
    plain = time_step(model, samples, batches, ("loop", channels_last), threads, device, autocast)[1]
    try:
        recorded = time_step(model, samples, batches, ("graph", channels_last), threads, device, autocast)[1]
    except UsageError as error:
        warnings.warn(f"steps are not recorded: {error}", stacklevel=2)
        return "loop"
    if torch.allclose(recorded, plain, rtol=1e-2, atol=1e-4):
        return "graph"
    warnings.warn("a recorded step differs from a plain one: steps are not recorded", stacklevel=2)
    return "loop"


def fastest(
    model: nn.Module,
    samples: Samples,
    batches: Batches,
    candidates: list[tuple[str, bool]],
    threads: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> tuple[str, bool]:
    """The candidate whose step takes the least time; those that cannot run this network are left out."""
    seconds, problem = {}, None
    for candidate in candidates:
        try:
            seconds[candidate], _ = time_step(model, samples, batches, candidate, threads, device, autocast)
        except (UsageError, RuntimeError) as error:  # a network that cannot be recorded, or batched
            if isinstance(error, torch.OutOfMemoryError):
                raise
            problem = error
    if not seconds:
        raise problem
    return min(seconds, key=seconds.__getitem__)


def time_step(
    model: nn.Module,
    samples: Samples,
    batches: Batches,
    candidate: tuple[str, bool],
    threads: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> tuple[float, torch.Tensor]:
    """Seconds of a worker's step, timed on a part of the fleet: 2 workers a thread where each is a chunk of
    its own, up to 128 where they are batched, up to 64 on a GPU. The best of three; and the first row then."""
    name, channels_last = candidate
    layout = RowLayout(model, channels_last)
    engine = Engine(model, layout, name, threads, autocast)
    row_D = torch.empty(layout.D, dtype=samples.dtype)
    layout.write(model, row_D)
    trial = dataclasses.replace(samples, channels_last=channels_last).to(device)
    rows = GPU_TRIAL_ROWS if device.type == "cuda" else TRIAL_ROWS if name == "vmap" else 2 * threads
    rows = min(rows, len(batches.lengths_N))
    fleet = Fleet(engine, row_D.to(device), trial, batches, momentum=0.9, owned=range(rows))
    steps_N = torch.zeros(fleet.num_workers, dtype=torch.int64)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        fleet.step(steps_N, 1e-3)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    engine.close()
    return best / rows, fleet.rows_RD[0].clone()
