"""Influence: what every training sample did to the trained models.

One sign and one unit for all methods: a score estimates -dF/dw_i over the whole run, so positive means
that the sample lowers the validation loss, and the sum over a set of samples predicts by how much F
rises when they get weight 0. Methods differ in horizon, so across methods compare ranks.

To add a method, write a :class:`utils.influence.method.Method` and add a line to ``utils.registry.INFLUENCE``.
"""

from __future__ import annotations

from torch import Tensor

from utils.influence.method import Method, Options
from utils.influence.trajectory import Trajectory
from utils.progress import Progress, ignored
from utils.pruning_args import check_target
from utils.registry import INFLUENCE, load


def load_method(name: str) -> Method:
    """The method of that name."""
    return load(INFLUENCE, name, "influence method")


def score(method: str, trajectory: Trajectory, options: Options, progress: Progress = ignored) -> Tensor:
    """Scores [n], float64, positive = helpful, zero for samples outside training."""
    check_target(options.target, trajectory.num_workers)
    return load_method(method).score(trajectory, options, progress).cpu()
