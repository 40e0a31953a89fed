"""FedProx: federated averaging whose workers stay near the model they were sent (Li et al., MLSys 2020, arXiv
1812.06127): a worker lowers its loss plus (mu / 2) |x - x_server|^2.

The gradient of the second part, mu x - mu x_server, is more weight decay and something added to every gradient of the
round. Every sampled worker makes all its local steps (the paper's gamma = 0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.protocols.fedavg import FedAvg
from utils.errors import UsageError
from utils.linear import Line, Lines

if TYPE_CHECKING:
    from training.build import Job
    from utils.args import Config


class FedProx(FedAvg):
    """FedAvg with a proximal term."""

    further_rows = 2

    def check(self, job: Job) -> None:
        """The term is part of the gradient."""
        if job.config.optimizer == "adamw":
            raise UsageError("--protocol fedprox adds to the gradient, and adamw's weight decay is no part of it: take "
                             "--optimizer sgd, nesterov or adam.")  # fmt: skip

    def weight_decay(self, config: Config) -> float:
        """The part that grows with x."""
        return config.wd + config.prox

    def before(self, job: Job) -> Lines:
        """The part that does not."""
        return (Line("drift", rows=-job.config.prox),)
