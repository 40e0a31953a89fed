"""Choosing the execution of a run by measuring once at its start.

The default strategy stays unless another one is clearly faster, so that noise does not flip the choice
(and with it the last bits of a run) from one start to the next.
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

CLEARLY_FASTER = 1.3
LARGE = 2_000_000  # parameters from which batching over workers is not even tried on a CPU
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

    ``engine`` 'auto' and ``channels_last`` None are decided by timing SGD steps of a part of the fleet.
    """
    has_convolutions = any(p.dim() == 4 for p in model.parameters())
    layouts = [channels_last] if channels_last is not None else ([True, False] if has_convolutions else [False])
    names = [engine] if engine != "auto" else ["threads", "vmap"]
    if engine == "graph" and device.type != "cuda":
        raise UsageError(f"--engine graph records steps for a GPU, and this run is on '{device}': use --engine auto.")
    if engine == "auto" and device.type == "cuda":
        names = ["graph", "vmap", "loop"]  # what cannot be captured or batched is left out below
    elif engine == "auto":
        large = sum(p.numel() for p in model.parameters()) > LARGE
        has_buffers = any(b.is_floating_point() for b in model.buffers())
        # Batched over workers, convolutions become grouped ones: half as fast on a CPU, and hungry.
        slow_here = large or has_convolutions or autocast is not None
        if slow_here or (has_buffers and batches.ragged):
            names = ["threads"]
    candidates = [(name, layout) for name in names for layout in layouts]
    if len(candidates) == 1:
        return candidates[0]
    seconds, ends = {}, {}
    for candidate in candidates:
        try:
            seconds[candidate], ends[candidate] = time_step(
                model, samples, batches, candidate, threads, device, autocast
            )
        except (UsageError, RuntimeError) as error:  # this network cannot run that way
            if candidate == candidates[-1] and not seconds:
                raise
            if candidate[0] == "graph":
                warnings.warn(f"steps are not recorded: {error}", stacklevel=2)
    for candidate in [c for c in seconds if c[0] == "graph"]:  # a bad recording would train on in silence
        plain = ends.get(("loop", candidate[1]))
        if plain is not None and not torch.allclose(ends[candidate], plain, rtol=1e-2, atol=1e-4):
            warnings.warn("a recorded step differs from a plain one: steps are not recorded", stacklevel=2)
            del seconds[candidate]
    first = next(iter(seconds))
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[first] > CLEARLY_FASTER * seconds[best] else first


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
