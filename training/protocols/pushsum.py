"""Stochastic gradient push: averages over directed graphs (Assran et al., ICML 2019, arXiv 1811.10792, Algorithm 1).

Who only knows whom it sends to cannot make the rows of W sum to 1, but it can make its column: it splits what it has.
Then the mean stays, while weights w drift apart, and a worker's model is z = x / w:

    x' = x - lr G(z),   x+ = P x',   w+ = P w,   z+ = x+ / w+,   w = 1 at the start

Rows of the fleet are z, what is evaluated and differentiated. w follows from the graph alone, so the division is by
known numbers and a round is linear: z+ = (1 / w+) P (w z - lr G). P is the topology's W with every column divided by
its sum: W itself where that is doubly stochastic, and then this is gossip. w crosses each link as well. The statistics
of BatchNorm are averaged by W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from training.protocols.gossip import Gossip, check_one_local_step
from utils.linear import Line, Lines

if TYPE_CHECKING:
    from training.build import Job


class PushSum(Gossip):
    """Gossip with column-stochastic weights."""

    further_rows = 3
    has_edges = False

    def check(self, job: Job) -> None:
        """A step is taken at z and moves x."""
        check_one_local_step(job, "a second one would begin at x' / w, which nobody holds.")

    def push(self, job: Job, r: int) -> sparse.csr_array:
        """P of round r: W with columns that sum to 1."""

        def columns() -> sparse.csr_array:
            W = job.topology.mixing(r)
            return sparse.csr_array(W @ sparse.diags_array(1 / W.sum(axis=0)))

        return job.once(f"push {r % job.topology.period}", columns)

    def weights(self, job: Job, r: int) -> np.ndarray:
        """w before round r [N]."""
        known = job.once("push weights", lambda: [np.ones(job.config.num_workers)])
        while len(known) <= r:
            known.append(self.push(job, len(known) - 1) @ known[-1])
        return known[r]

    def message_bytes(self, job: Job) -> int:
        """x, and w."""
        return job.virtual_time.row_bytes + job.samples.dtype.itemsize

    def after(self, job: Job, r: int, W: sparse.csr_array, lr: float) -> Lines:
        """The end of a round."""
        return (
            Line("numerator", rows=1, before=self.weights(job, r) - 1),  # x' = w z - lr G = z' + (w - 1) z
            Line("pushed", numerator=self.push(job, r)),
            Line("rows", pushed=1 / self.weights(job, r + 1)),
        )
