"""DiLoCo: many local steps, and an outer step with Nesterov momentum (Douillard et al. 2023, arXiv 2311.08105,
Algorithm 1).

Every worker makes ``--local_steps`` steps from the common model theta (the paper's H, about 500, by AdamW:
``--optimizer adamw``), and keeps what its optimizer remembers; the mean of their moves is the gradient of the outer
step:

    delta = mean over k of (theta - theta_k);   V <- mu V + delta;   theta <- theta - alpha (delta + mu V)

Every worker makes the outer step itself, from the same average, so that all hold theta and V. The statistics of
BatchNorm are averaged, and no step is taken along them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from scipy import sparse

from training.protocols import RoundPlan
from training.protocols.gossip import Gossip
from utils.errors import UsageError
from utils.linear import Line, Lines, averaging

if TYPE_CHECKING:
    from torch import Tensor

    from training.build import Job
    from workers.worker_vision import Fleet


class DiLoCo(Gossip):
    """Every row is the common model between rounds."""

    further_rows = 4
    shared, has_edges = True, False

    def check(self, job: Job) -> None:
        """One model, from the start."""
        if job.config.init == "per_worker":
            raise UsageError("--protocol diloco moves one common model: leave out --init per_worker.")

    def mixing(self, job: Job, r: int) -> sparse.csr_array:
        """Everybody gets the mean."""
        return job.once("mean", lambda: averaging(job.config.num_workers))

    def plan(self, job: Job, r: int) -> RoundPlan:
        """All train and average: a row up and one down for each, as over a server."""
        plan, clock = super().plan(job, r), job.virtual_time
        messages = 2 * job.config.num_workers if job.config.num_workers > 1 else 0
        seconds = float(clock.compute_N(plan.steps_N.numpy()).max()) + (2 * clock.transfer() if messages else 0.0)
        return dataclasses.replace(plan, messages=messages, sent_bytes=None, seconds=seconds)

    def states(self, fleet: Fleet, job: Job) -> dict[str, Tensor]:
        """V."""
        return {"velocity": fleet.zeros()}

    def after(self, job: Job, r: int, W: sparse.csr_array, lr: float) -> Lines:
        """The outer step."""
        alpha, mu = job.config.outer_lr, job.config.outer_momentum
        return (
            Line("average", rows=W),
            Line("delta", before=1, average=-1),
            Line("velocity", velocity=mu, delta=1),
            Line("rows", before=1, delta=-alpha, velocity=-alpha * mu),
        )
