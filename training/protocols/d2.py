"""D2: decentralized training over decentralized data (Tang et al., ICML 2018, arXiv 1803.07068, Algorithm 1).

    X+ = W (2 X - X_prev - (lr G - lr_prev G_prev)),   first round: X+ = W (X - lr G)

The gradients of the round before cancel what makes workers disagree in the long run: their different shards. (The
products with the rates, because these change.) With X' = X - lr G this is

    X+ = W (X' + C),   C+ = X+ - X',   C = 0 at the start

so a worker keeps one matrix, and G may be whatever a local step takes: with ``--momentum`` it is M.

W must be symmetric, the same in all rounds, and its smallest eigenvalue above -1/3 (their Assumption 1): rings of an
even number of workers are at -1/3, tori below; then (I + W) / 2 takes its place. One local step a round: with more the
correction would have to enter each of them, which is another algorithm (local exact diffusion).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from training.protocols.gossip import Gossip, check_one_local_step
from utils.errors import UsageError
from utils.linear import Line, Lines
from utils.topology_file import ROW_SUM_TOLERANCE

if TYPE_CHECKING:
    from torch import Tensor

    from training.build import Job
    from workers.worker_vision import Fleet

SMALLEST = -1 / 3  # no eigenvalue of W may be as small


class D2(Gossip):
    """Gossip that corrects what different shards do to it."""

    further_rows = 4

    def check(self, job: Job) -> None:
        """The graph and the steps that it is proven for."""
        check_one_local_step(job, "with more its correction would have to enter each of them.")
        W = job.topology.matrices[0]
        if job.topology.period > 1 or np.abs((W - W.T).data).max(initial=0) > ROW_SUM_TOLERANCE:
            raise UsageError(
                f"--protocol d2 needs links in both directions that stay the same: --mode {job.config.mode} here has "
                "others (ring, grid, torus, tree, line, star and random will do)."
            )
        if self.mixing(job, 0) is not W:
            warnings.warn(
                f"--mode {job.config.mode} has a mixing matrix W with an eigenvalue of -1/3 or less, with which d2 "
                "does not converge: (I + W) / 2 takes its place",
                stacklevel=2,
            )

    def mixing(self, job: Job, r: int) -> sparse.csr_array:
        """W, or (I + W) / 2."""

        def safe() -> sparse.csr_array:
            W = job.topology.matrices[0]
            if np.linalg.eigvalsh(W.toarray())[0] > SMALLEST + 1e-9:
                return W
            return sparse.csr_array((W + sparse.eye_array(W.shape[0], format="csr")) / 2)

        return job.once("d2 mixing", safe)

    def states(self, fleet: Fleet, job: Job) -> dict[str, Tensor]:
        """C."""
        return {"correction": fleet.zeros()}

    def after(self, job: Job, r: int, W: sparse.csr_array, lr: float) -> Lines:
        """The end of a round."""
        return (
            Line("half", rows=1),
            Line("corrected", rows=1, correction=1),
            Line("rows", corrected=W),
            Line("correction", rows=1, half=-1),
        )
