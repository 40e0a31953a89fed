"""Private steps (DP-SGD) of a fleet, against its plain steps and against Opacus doing the same for one worker.

    python -m benchmarks.privacy                          digits, 16 workers, MLP and CNN
    python -m benchmarks.privacy --num_workers 64 --models mlp

All sides run in one process on one thread, on batches of 32, and take turns; the medians of the ratios of neighbouring
turns count, of the time of one worker's step. Without opacus (requirements-privacy.txt) its column stays empty.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.build import Job

os.environ.setdefault("OMP_NUM_THREADS", "1")


def fleet_steps(job: Job, steps: int) -> Callable[[], float]:
    """A function that makes so many steps of all workers, and returns the seconds of one of a worker."""
    import torch

    fleet = job.make_fleet()

    def turn() -> float:
        start = time.perf_counter()
        for t in range(steps):
            fleet.step(torch.full((fleet.num_workers,), t), job.config.lr)
        return (time.perf_counter() - start) / steps / fleet.num_workers

    return turn


def opacus_steps(job: Job, steps: int) -> Callable[[], float] | None:
    """The same of one worker by Opacus, on batches that are at hand already; None where it is not installed."""
    import copy

    import torch
    from torch.nn.functional import cross_entropy

    try:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ImportError:
        return None
    config, size = job.config, int(job.batches.sizes_N[0])
    ids = job.batches.ids(torch.zeros(config.num_workers, dtype=torch.int64))[0, :size]
    inputs, targets = job.samples.plain(ids)
    model = GradSampleModule(copy.deepcopy(job.model))
    sgd = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.wd)
    optimizer = DPOptimizer(sgd, noise_multiplier=1.1, max_grad_norm=1.0, expected_batch_size=size)

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        return (time.perf_counter() - start) / steps

    return turn


def main(argv: list[str] | None = None) -> int:
    """Parse, take turns, print."""
    from benchmarks.common import median_ratio, spread, take_turns
    from training.build import build
    from utils.args import Config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_workers", type=int, default=16, help="workers of the fleet (default: 16)")
    parser.add_argument("--steps", type=int, default=30, help="steps of a turn (default: 30)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], help="networks (default: mlp cnn)")
    asked = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of Opacus, on hooks
    print("| network | plain, ms | private, ms | Opacus, ms | private / plain | Opacus / private | spread |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in asked.models:
        common = dict(quiet=True, threads=1, model=model, num_workers=asked.num_workers, partition="iid")
        plain, private = build(Config(**common)), build(Config(**common, dp_noise=1.1))
        sides = {"plain": fleet_steps(plain, asked.steps), "private": fleet_steps(private, asked.steps)}
        theirs = opacus_steps(plain, asked.steps)
        if theirs is not None:
            sides["opacus"] = theirs
        found = take_turns(sides, asked.turns)
        cells = [f"{1e3 * min(found[name]):.2f}" if name in found else "-" for name in ("plain", "private", "opacus")]
        cells.append(f"{median_ratio(found['private'], found['plain']):.2f}")
        cells.append(f"{median_ratio(found['opacus'], found['private']):.2f}" if "opacus" in found else "-")
        cells.append(", ".join(f"{spread(values):.0%}" for values in found.values()))
        print(f"| {model} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
