"""Gradient tracking (Di Lorenzo and Scutari 2016; stochastic: Zhang and You 2019, arXiv 1909.02712; Pu and Nedic,
arXiv 1805.11454; local momentum is ours).

    X+ = W X - lr Y,   Y+ = W Y + G+ - G,   Y = G in the first round

Y follows the mean gradient of all workers: with a doubly stochastic W its mean is that of G at every step. A worker
keeps T = W Y - G, so that Y+ = T + G+, and G is read off its local step, (X - X') / lr: with ``--momentum`` it is M.
Two rows cross each link. One local step a round: with more, T would have to enter each of them (K-GT, Liu et al. 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scipy import sparse

from training.protocols.gossip import (
    Gossip,
    check_doubly_stochastic,
    check_one_local_step,
    minus_identity,
    per_rate,
)
from utils.linear import Line, Lines

if TYPE_CHECKING:
    from torch import Tensor

    from training.build import Job
    from workers.worker_vision import Fleet


class GradientTracking(Gossip):
    """Gossip along an estimate of the mean gradient."""

    further_rows = 3
    rows_a_message = 2

    def check(self, job: Job) -> None:
        """Its mean is the mean gradient only where averaging keeps the mean."""
        check_one_local_step(job, "with more, what is tracked would have to enter each of them.")
        check_doubly_stochastic(job)

    def message_bytes(self, job: Job) -> int:
        """X and Y; the statistics of BatchNorm once."""
        return job.virtual_time.row_bytes + job.parameter_bytes

    def states(self, fleet: Fleet, job: Job) -> dict[str, Tensor]:
        """T."""
        return {"tracked": fleet.zeros()}

    def after(self, job: Job, r: int, W: sparse.csr_array, lr: float) -> Lines:
        """The end of a round."""
        return (
            Line("direction", tracked=1, before=per_rate(lr), rows=-per_rate(lr)),  # Y = T + G
            Line("rows", before=W, direction=-lr),
            Line("tracked", direction=minus_identity(job, W), tracked=1),  # W Y - G, and G = Y - T
        )
