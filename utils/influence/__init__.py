"""Influence: what every training sample did to the trained models.

One sign and one unit for all methods: a score estimates -dF/dw_i over the whole run, so positive means
that the sample lowers the validation loss, and the sum over a set of samples predicts by how much F
rises when they get weight 0. Methods differ in horizon, so across methods compare ranks.

To add a method: a function ``(trajectory, options, progress) -> scores [n]`` and one line in INFLUENCE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UsageError
from utils.influence.cascade import cascade
from utils.influence.cascade import ticks as cascade_ticks
from utils.influence.delete import delete
from utils.influence.dice import dice, scored_steps
from utils.influence.trajectory import Trajectory
from utils.progress import Progress, ignored
from utils.pruning_args import check_target
from utils.random import uniform


@dataclass(frozen=True)
class Options:
    """What a score depends on besides the run; kept with the scores."""

    target: str = "nodes"
    dice_hops: int = 1
    dice_rounds: int = 5
    delete_checkpoints: int = 10
    seed: int = 0


def _if(trajectory: Trajectory, options: Options, progress: Progress) -> Tensor:
    from utils.influence.last_layer import last_layer_influence  # pyDVL takes seconds to import

    ids_n = (trajectory.worker_of_n >= 0).nonzero()[:, 0].cpu()
    scores_n = torch.zeros(len(trajectory.worker_of_n), dtype=torch.float64)
    scores_n[ids_n] = last_layer_influence(*trajectory.last_layer()).cpu()
    progress(1)
    return scores_n


def _random(trajectory: Trajectory, options: Options, progress: Progress) -> Tensor:
    progress(1)
    worker_n = trajectory.worker_of_n.cpu()
    draws_n = uniform(options.seed, "random scores", torch.arange(len(worker_n))).double()
    return torch.where(worker_n >= 0, draws_n, 0.0)


INFLUENCE: dict[str, Callable[[Trajectory, Options, Progress], Tensor]] = {
    "if": _if,
    "dice": lambda t, o, p: dice(t, o.dice_hops, o.dice_rounds, o.target, p),
    "delete": lambda t, o, p: delete(t, o.delete_checkpoints, progress=p),
    "cascade": lambda t, o, p: cascade(t, o.target, p),
    "random": _random,
}

# The options that each method reads: a cache made under other values of these is not used.
READS: dict[str, tuple[str, ...]] = {
    "if": (),
    "dice": ("target", "dice_hops", "dice_rounds"),
    "delete": ("delete_checkpoints",),
    "cascade": ("target",),
    "random": ("seed",),
}


def ticks(method: str, trajectory: Trajectory, options: Options) -> int:
    """How far a method's ``progress`` counts: the length of its bar."""
    lengths = {
        "cascade": lambda: cascade_ticks(trajectory),
        "dice": lambda: len(scored_steps(trajectory.num_steps, options.dice_hops, options.dice_rounds)),
        "delete": lambda: len(trajectory.checkpoints(options.delete_checkpoints)),
    }
    return lengths.get(method, lambda: 1)()


def score(method: str, trajectory: Trajectory, options: Options, progress: Progress = ignored) -> Tensor:
    """Scores [n], float64, positive = helpful, zero for samples outside training."""
    if method not in INFLUENCE:
        raise UsageError(f"unknown influence method '{method}'. Choose from: {', '.join(INFLUENCE)}.")
    check_target(options.target, trajectory.num_workers)
    return INFLUENCE[method](trajectory, options, progress).cpu()
