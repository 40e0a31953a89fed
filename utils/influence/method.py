"""What a method of influence is, and the control that knows nothing.

Legend: n samples of the data set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.influence.trajectory import Trajectory
from utils.progress import Progress
from utils.random import uniform


@dataclass(frozen=True)
class Options:
    """What a score depends on besides the run; kept with the scores."""

    target: str = "nodes"
    dice_hops: int = 1
    dice_rounds: int = 5
    delete_checkpoints: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """A method of influence. ``score(trajectory, options, progress)``: scores [n], float64, positive = helpful, zero
    outside training. ``reads``: the options that it depends on, so that scores under others are not mixed up.
    ``ticks(trajectory, options)``: how far ``progress`` counts."""

    score: Callable[[Trajectory, Options, Progress], Tensor]
    reads: tuple[str, ...] = ()
    ticks: Callable[[Trajectory, Options], int] = lambda trajectory, options: 1


def random_scores(trajectory: Trajectory, options: Options, progress: Progress) -> Tensor:
    """Uniform draws by seed: what any method has to beat."""
    progress(1)
    worker_n = trajectory.worker_of_n.cpu()
    draws_n = uniform(options.seed, "random scores", torch.arange(len(worker_n))).double()
    return torch.where(worker_n >= 0, draws_n, 0.0)


RANDOM = Method(random_scores, reads=("seed",))
