"""Small data of other tasks than classification: series with gaps and padding, pictures with findings."""

from __future__ import annotations

import numpy as np
import torch

from data.arrays import Arrays, Owners
from data.multilabel import UNKNOWN, Multilabel
from data.regression import Regression

FINDINGS = ("bright", "left", "rare")


def series(count: int = 160, steps: int = 7, features: int = 2, values: int = 2, seed: int = 0) -> Arrays:
    """Sequences of different lengths, some features missing, and values that follow from them; four owners."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, steps, features, generator=generator)
    lengths = torch.randint(3, steps + 1, (count,), generator=generator)
    means = torch.stack([x[:k].mean(0) for x, k in zip(inputs, lengths, strict=True)])
    ahead = 5 + 3 * means[:, :1] - means[:, 1:2] * torch.arange(1, values + 1) + 0.1
    targets = torch.stack([ahead, inputs[:, 0, :1].expand(-1, values)], 1)
    targets[::7, 0, -1] = float("nan")
    inputs[torch.rand(inputs.shape, generator=generator) < 0.1] = float("nan")
    inputs[torch.arange(steps) >= lengths[:, None]] = float("nan")
    inputs[:, 0, 0] = means[:, 0]
    n = count * 3 // 4
    owners = Owners(torch.arange(n) % 4, tuple("abcd"), torch.tensor([[0.0], [1.0], [3.0], [7.0]]).double())
    task = Regression.of([f"y{c}" for c in range(values)], targets[:n], "m")
    return Arrays(inputs[:n], targets[:n], inputs[n:], targets[n:], task, owners=owners)


def findings(count: int = 200, side: int = 8, seed: int = 0) -> Arrays:
    """Pictures that are bright or not, and brighter on the left or not; a tenth of the findings are unknown."""
    rng = np.random.default_rng(seed)
    bright, left, rare = rng.random(count) < 0.5, rng.random(count) < 0.4, rng.random(count) < 0.08
    images = rng.integers(0, 60, (count, 1, side, side))
    images = images + 90 * bright[:, None, None, None] + 50 * rare[:, None, None, None]
    images[..., : side // 2] += 50 * left[:, None, None, None]
    labels = np.stack([bright, left, rare], 1).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = UNKNOWN
    images, labels = torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)
    n = count * 3 // 4
    return Arrays(images[:n], labels[:n], images[n:], labels[n:], Multilabel(FINDINGS))
