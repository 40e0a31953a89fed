"""What runs in the measuring processes of ``benchmarks.training``: bare PyTorch loops, and fleets.

Each function here builds something and returns the function that measures it (see common.Probe).

Legend: N workers, D floats a row, B batch, C channels.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import Stopwatch, peak_memory, repeat_for, synchronize
from data.batches import Batches, Samples
from networks import load_model
from networks.mlp import mlp
from utils.errors import choose
from utils.topology import build_topology
from workers.engine import Engine
from workers.optimizers import SGD
from workers.row_layout import RowLayout
from workers.tuning import batch_parts, choose_execution
from workers.worker_vision import Fleet

BATCH = 32
SAMPLES, SHARD = 4096, 512  # shards share samples, so that a thousand workers need no gigabytes of images
AT_ONCE = {"cpu": 1, "cuda": 10}  # rounds between looks at the clock: a GPU has to be waited for
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
IMAGE_SHAPES = {"mlp": (1, 8, 8), "mlp_wide": (1, 28, 28), "cnn": (3, 32, 32), "resnet18": (3, 32, 32)}


@dataclass(frozen=True)
class Setting:
    """How a model is trained, by a fleet's ``engine`` or bare (no engine)."""

    model: str
    device: str
    engine: str = ""
    channels_last: bool = False
    amp: bool = False
    augmentation: str = "none"
    parts: int = 1

    @property
    def layout(self) -> str:
        """Memory layout, precision and parts of a batch, for people."""
        layout = ("channels_last" if self.channels_last else "nchw") + (" bf16" if self.amp else "")
        return layout + (f" {self.parts} parts" if self.parts > 1 else "")

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of mixed precision."""
        return torch.bfloat16 if self.amp else None

    def bare(self, **changes: Any) -> Setting:
        """The bare loop to compare with: the same layout and precision but for ``changes``."""
        return dataclasses.replace(self, engine="", augmentation="none", parts=1, **changes)


def build_model(name: str) -> nn.Module:
    """The network of that name, the same at every call."""
    shape = choose(IMAGE_SHAPES, name, "model (--models)")
    if name == "mlp_wide":  # 784-1024-1024-10
        return mlp(10, shape, hidden=(1024, 1024))
    return load_model(name, 10, shape, seed=0)


def bare_loop(setting: Setting, num_models: int = 1, batch_size: int = BATCH) -> Callable[[float], dict]:
    """The loop that everybody writes, over one model or several in turn, as a function of the seconds to run.
    It returns node-steps per second (samples / 32), processor seconds of one, and the peak memory in MiB."""
    device = torch.device(setting.device)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    models = [build_model(setting.model).to(device, memory_format=layout) for _ in range(num_models)]
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY) for m in models
    ]
    shape = IMAGE_SHAPES[setting.model]
    batches = [
        (
            torch.randn(batch_size, *shape).to(device, memory_format=layout),
            torch.randint(10, (batch_size,), device=device),
        )
        for _ in range(8)
    ]
    count = 0

    def step() -> None:
        nonlocal count
        images, labels = batches[count % len(batches)]
        count += 1
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=setting.amp):
                loss = F.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()

    def measure(seconds: float) -> dict:
        before = time.process_time()
        steps, elapsed = repeat_for(seconds, step, device, AT_ONCE[device.type])
        node_steps = steps * num_models * batch_size / BATCH
        return {
            "rate": node_steps / elapsed,
            "processor_seconds": (time.process_time() - before) / node_steps,
            "peak_memory": peak_memory(device),
        }

    for _ in range(2):
        step()
    return measure


def synthetic_data(setting: Setting, num_workers: int) -> tuple[Samples, Batches]:
    """Random images, and IID shards of them."""
    shape = IMAGE_SHAPES[setting.model]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (SAMPLES, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (SAMPLES,), generator=generator)
    half_C = torch.full((shape[0],), 0.5)
    shards = [torch.randperm(SAMPLES, generator=generator)[:SHARD] for _ in range(num_workers)]
    samples = Samples(
        images, labels, half_C, half_C, setting.augmentation, channels_last=setting.channels_last
    )
    return samples, Batches(shards, BATCH, seed=0)


def automatic(setting: Setting, num_workers: int, threads: int) -> Callable[[], Setting]:
    """A function that returns the setting with the engine and layout that a run would choose by itself."""

    def choose_setting() -> Setting:
        samples, batches = synthetic_data(setting, num_workers)
        engine, channels_last = choose_execution(
            build_model(setting.model), samples, batches, "auto", None, threads,
            torch.device(setting.device), setting.autocast,
        )  # fmt: skip
        shape = IMAGE_SHAPES[setting.model]
        parts = batch_parts(build_model(setting.model), shape, BATCH, num_workers, threads, engine)
        return dataclasses.replace(setting, engine=engine, channels_last=channels_last, parts=parts)

    return choose_setting


def make_fleet(
    setting: Setting, model: nn.Module, samples: Samples, batches: Batches, threads: int = 1, **options: Any
) -> Fleet:
    """A fleet with that engine and layout, in the dtype of the samples; ``options`` as of :class:`Fleet`."""
    device = torch.device(setting.device)
    layout = RowLayout(model, setting.channels_last)
    row_D = torch.empty(layout.D, dtype=samples.dtype)
    layout.write(model, row_D)
    engine = Engine(model, layout, setting.engine, threads, setting.autocast, parts=setting.parts)
    options = {"optimizer": SGD(MOMENTUM, WEIGHT_DECAY), "seed": 0} | options
    return Fleet(engine, row_D.to(device), samples.to(device), batches, **options)


def fleet_rounds(setting: Setting, num_workers: int, threads: int) -> Callable[[float], dict]:
    """Rounds of a fleet on a ring, as a function of the seconds to run (one round at least). It returns
    node-steps per second, seconds of a round's gossip and of a plain copy of the matrix, bytes that a
    gossip reads and writes, peak memory in MiB, and that before the fleet was built."""
    device = torch.device(setting.device)
    memory_before = peak_memory(device)
    fleet = make_fleet(setting, build_model(setting.model), *synthetic_data(setting, num_workers), threads)
    ring = build_topology("ring", num_workers).mixing(0)
    step = 0

    def round_of_training(gossip: Stopwatch) -> None:
        nonlocal step
        fleet.step(torch.full((num_workers,), step), LR)
        with gossip:
            fleet.mix(ring)
        step += 1

    def measure(seconds: float) -> dict:
        gossip, copying = Stopwatch(device), Stopwatch(device)
        count, elapsed = repeat_for(seconds, lambda: round_of_training(gossip), device, AT_ONCE[device.type])
        source_RD = fleet.rows_RD
        target_RD = source_RD.clone()  # once untimed: its memory has to be had first
        with copying:
            fleet.engine.map(lambda t, s: t.copy_(s), target_RD.chunk(threads), source_RD.chunk(threads))
        return {
            "rate": count * num_workers / elapsed,
            "round_seconds": elapsed / count,
            "gossip_seconds": gossip.seconds() / count,
            "copy_seconds": copying.seconds(),
            "gossip_bytes": (ring.nnz + num_workers) * fleet.layout.D * source_RD.itemsize,
            "copy_bytes": 2 * source_RD.nbytes,
            "peak_memory": memory,
            "memory_before": memory_before,
        }

    for _ in range(1 if device.type == "cpu" else 2):  # steps are recorded once for each of the two matrices
        round_of_training(Stopwatch(device))
    synchronize(device)
    memory = peak_memory(device)
    return measure
