"""Small data and fleets that several tests use."""

from __future__ import annotations

import torch
from torch import nn

from data.batches import Batches, Samples
from networks import load_model
from workers.engine import Engine
from workers.optimizers import SGD
from workers.row_layout import RowLayout
from workers.worker_vision import Fleet


def small_samples(n=60, shape=(1, 8, 8), classes=4, dtype=torch.float64, **options) -> Samples:
    """Random images whose label shows: one quadrant of the image is brighter."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 100, (n, *shape), generator=generator, dtype=torch.uint8)
    labels_n = torch.arange(n) % classes
    half = shape[1] // 2
    for i, label in enumerate(labels_n.tolist()):
        row, column = half * (label // 2 % 2), half * (label % 2)
        images[i, :, row : row + half, column : column + half] += 120
    mean, std = torch.full((shape[0],), 0.35, dtype=dtype), torch.full((shape[0],), 0.25, dtype=dtype)
    return Samples(images, labels_n, mean, std, dtype=dtype, **options)


def shards_of(samples: Samples, lengths: list[int]) -> list[torch.Tensor]:
    """Consecutive shards of these lengths."""
    return list(torch.arange(sum(lengths)).split(lengths))


def small_fleet(
    model: nn.Module | str = "mlp",
    lengths=(15, 15, 15, 15),
    batch_size=5,
    engine="loop",
    threads=1,
    channels_last=False,
    momentum=0.9,
    weight_decay=1e-3,
    samples: Samples | None = None,
    seed=3,
    dtype=torch.float64,
    weights_Mn=None,
    align=1,
    optimizer=None,
    **options,
) -> Fleet:
    """A fleet of len(lengths) workers on small_samples; ``options`` as of :class:`Fleet`."""
    samples = samples or small_samples(dtype=dtype, channels_last=channels_last)
    if isinstance(model, str):
        model = load_model(model, 4, tuple(samples.inputs_n.shape[1:]), seed=seed).to(dtype)
    layout = RowLayout(model, channels_last, align)
    row_D = torch.zeros(layout.D, dtype=dtype)
    layout.write(model, row_D)
    batches = Batches(shards_of(samples, list(lengths)), batch_size, seed)
    return Fleet(
        Engine(model, layout, engine, threads),
        row_D,
        samples,
        batches,
        optimizer=optimizer or SGD(momentum, weight_decay),
        seed=seed,
        weights_Mn=weights_Mn,
        **options,
    )


def run_steps(fleet: Fleet, steps: int, lr=0.05, mixing=None, first=0) -> Fleet:
    """So many local steps of all workers, each followed by a gossip step if a matrix is given."""
    for t in range(first, first + steps):
        fleet.step(torch.full((fleet.num_workers,), t), lr)
        if mixing is not None:
            fleet.mix(mixing)
    return fleet
