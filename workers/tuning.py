"""Which execution a run gets: by rule, so that the same command gives the same bits on a busy machine too.

The rule reads shapes, device and the number of workers, never a clock; ``benchmarks.training --rule`` keeps it
honest. Only ``--engine measure`` times the candidates. Whatever was chosen is recorded, and reused by resume,
replay, audit and stage 2.
"""

from __future__ import annotations

import copy
import dataclasses
import time

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from data.batches import Batches, Samples
from utils.errors import UsageError
from workers.engine import DEVICE_ERRORS, Engine, cuts_batches
from workers.optimizers import SGD, Optimizer
from workers.step_graph import RecordingFailed
from workers.worker_vision import Fleet

# Linear layers of all workers as one batched product: measured on MLPs of 5 thousand to 2 million parameters and
# 1 to 64 workers, two threads. With 8 workers 2.5 x one by one at 5 thousand, 1.25 x at 100 thousand, 0.8 x at 200.
BATCHED_PARAMETERS, BATCHED_WORKERS = 150_000, 8
# Recurrent networks have a fused kernel that vmap does not know. Processor time of a worker's step, kernel on threads
# over plain operators batched (air, 14 steps, 64 units, 2 threads): LSTM at 32 samples 0.56 with 1 worker, 1.13 with 8,
# 1.26 with 69; at 64 samples 1.06 with 8; at 128 0.78 with 8 and 0.68 with 69. GRU at 32: 1.74 with 8, 2.6 with 69.
RECURRENT_BATCH = 64
# A part of a batch must be worth handing to a thread: at least these multiplications in all, and for each weight,
# since each part makes gradients of all weights, which have to be added.
PART_PRODUCTS, PART_PRODUCTS_A_WEIGHT = 20_000_000, 64
TRIAL_ROWS, GPU_TRIAL_ROWS = 128, 64
TRIAL = SGD(0.9)  # what a step is timed with unless somebody says otherwise
MOST_DEVIATION = 0.01  # of a recorded step from a plain one; a step left out would be 0.3


def choose_execution(
    model: nn.Module,
    samples: Samples,
    batches: Batches,
    engine: str,
    channels_last: bool | None,
    threads: int,
    device: torch.device,
    autocast: torch.dtype | None,
    optimizer: Optimizer = TRIAL,
    private: bool = False,
) -> tuple[str, bool]:
    """The engine's name and whether convolutions are laid out channels_last.

    ``engine`` 'auto' and ``channels_last`` None follow the rule; 'measure' times local steps of a part of the fleet.
    ``private``: whether steps are (:mod:`workers.private`).
    """
    if private and engine in ("graph", "measure"):
        raise UsageError(f"--engine {engine} knows no private steps (--dp_noise): use --engine auto.")
    if engine == "graph" and device.type != "cuda":
        raise UsageError(f"--engine graph records steps for a GPU, and this run is on '{device}': use --engine auto.")
    has_convolutions = any(p.dim() == 4 for p in model.parameters())
    layout = has_convolutions if channels_last is None else channels_last
    workers = len(batches.lengths_N)
    if engine == "measure":
        layouts = [layout] if channels_last is not None or not has_convolutions else [True, False]
        names = ["graph", "loop"] if device.type == "cuda" else ["threads"]
        names += [] if has_convolutions else ["vmap"]
        candidates = [(n, c) for n in names for c in layouts]
        name, layout = fastest(model, samples, batches, candidates, threads, device, autocast, optimizer)
    else:
        batch_size = int(batches.sizes_N.max())
        auto = engine == "auto"
        name = rule(model, workers, device.type, autocast, batch_size, private) if auto else engine
    if name == "graph":
        check_recording(model, samples, batches, layout, device, autocast, optimizer)
    return name, layout


def rule(
    model: nn.Module, workers: int, device_type: str, autocast: torch.dtype | None = None, batch_size: int = 1,
    private: bool = False,
) -> str:
    """The engine for this number of workers with this network: many small linear networks are batched, recurrent
    ones where batches are small; other steps are recorded as a graph on a GPU, unless they are private, and spread
    over threads elsewhere (batched convolutions become grouped ones: half as fast on a CPU)."""
    only_linear = all(p.dim() <= 2 for p in model.parameters()) and not any(
        b.is_floating_point() for b in model.buffers()
    )
    small = sum(p.numel() for p in model.parameters()) <= BATCHED_PARAMETERS
    kernel = device_type == "cpu" and batch_size > RECURRENT_BATCH and any(hasattr(m, "fused") for m in model.modules())
    if only_linear and small and workers >= BATCHED_WORKERS and autocast is None and not kernel:
        return "vmap"
    if device_type == "cuda":
        return "loop" if private else "graph"
    return "threads"


def batch_parts(
    model: nn.Module, image_shape: tuple[int, ...], batch_size: int, at_once: int, threads: int, engine: str
) -> int:
    """Parts that every batch is cut into, for threads that would idle where only ``at_once`` workers train at a time:
    as many as each of these workers has threads, if a part is worth one."""
    parts = threads // at_once
    if parts < 2 or not cuts_batches(engine) or not splits(model):
        return 1
    weights = sum(p.numel() for p in model.parameters())
    least = max(PART_PRODUCTS, PART_PRODUCTS_A_WEIGHT * weights)
    return max(1, min(parts, batch_size * products(model, image_shape) // least))


def splits(model: nn.Module) -> bool:
    """Whether the gradient of a batch is the sum of its parts': BatchNorm's statistics need the whole batch."""
    return not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def products(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Multiplications of a forward pass of one sample by weights of at least two dimensions: each is used once for
    every float of a layer's output but those of the channels that it makes."""
    counts: list[int] = []

    def count(module: nn.Module, _: object, output_1: Tensor) -> None:
        counts.extend(output_1.numel() // p.shape[0] * p.numel() for p in module.parameters(False) if p.dim() > 1)

    model = copy.deepcopy(model).eval()
    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, *image_shape, dtype=next(model.parameters()).dtype))
    return sum(counts)


def check_recording(
    model: nn.Module,
    samples: Samples,
    batches: Batches,
    channels_last: bool,
    device: torch.device,
    autocast: torch.dtype | None,
    optimizer: Optimizer = TRIAL,
) -> None:
    """Raises :class:`UsageError` where this network's steps cannot be recorded, or recorded ones do not do what plain
    ones do: a bad recording would train on in silence. Compared are all rows of a part of the fleet, and their
    optimizers' state, after three steps and two mixes, by how far they moved."""
    ends = {}
    for name in ("loop", "graph"):
        fleet = trial_fleet(model, samples, batches, (name, channels_last), 1, device, autocast, optimizer)
        start_RD, rows = fleet.rows_RD.clone(), fleet.num_rows
        ring = sparse.csr_array((np.eye(rows) + np.roll(np.eye(rows), 1, 1)) / 2)
        for t in range(3):
            fleet.step(torch.full((fleet.num_workers,), t), 1e-3)
            if t < 2:
                fleet.mix(ring)
        ends[name] = torch.cat([fleet.rows_RD - start_RD, fleet.state_RS], 1)
    error_R, moved_R = (ends["graph"] - ends["loop"]).norm(dim=1), ends["loop"].norm(dim=1)
    if not bool((error_R <= MOST_DEVIATION * moved_R).all()):
        raise UsageError("recorded steps of this network differ from plain ones: use --engine loop.")


def fastest(
    model: nn.Module,
    samples: Samples,
    batches: Batches,
    candidates: list[tuple[str, bool]],
    threads: int,
    device: torch.device,
    autocast: torch.dtype | None,
    optimizer: Optimizer = TRIAL,
) -> tuple[str, bool]:
    """The candidate whose step takes the least time; those that cannot run this network are left out."""
    seconds, problem = {}, None
    for candidate in candidates:
        try:
            seconds[candidate] = time_step(model, samples, batches, candidate, threads, device, autocast, optimizer)
        except RecordingFailed:  # not to be followed by anything in this process
            raise
        except UsageError as error:
            problem = error
        except RuntimeError as error:  # a network that cannot be batched; nothing else may be hidden
            if candidate[0] != "vmap" or isinstance(error, DEVICE_ERRORS):
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
    optimizer: Optimizer = TRIAL,
) -> float:
    """Seconds of a worker's step, timed on a part of the fleet: the best of three after one that is not timed."""
    fleet = trial_fleet(model, samples, batches, candidate, threads, device, autocast, optimizer)
    steps_N = torch.zeros(fleet.num_workers, dtype=torch.int64)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        fleet.step(steps_N, 1e-3)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    fleet.engine.close()
    return best / fleet.num_rows


def trial_fleet(
    model: nn.Module,
    samples: Samples,
    batches: Batches,
    candidate: tuple[str, bool],
    threads: int,
    device: torch.device,
    autocast: torch.dtype | None,
    optimizer: Optimizer = TRIAL,
) -> Fleet:
    """A part of the fleet: 2 workers a thread where each is a chunk of its own, up to 128 where they are batched, up
    to 64 on a GPU."""
    name, channels_last = candidate
    engine = Engine.on(device, model, name, threads, channels_last, autocast)
    row_D = torch.zeros(engine.layout.D, dtype=samples.dtype)
    engine.layout.write(model, row_D)
    trial = dataclasses.replace(samples, channels_last=channels_last).to(device)  # no copy where it is there already
    rows = GPU_TRIAL_ROWS if device.type == "cuda" else TRIAL_ROWS if name == "vmap" else 2 * threads
    rows = min(rows, len(batches.lengths_N))
    part = Batches(batches.shards[:rows], batches.batch_size, batches.seed)
    return Fleet(engine, row_D.to(device), trial, part, optimizer=optimizer)
