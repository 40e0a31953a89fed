"""Quasi-global momentum (Lin et al., ICML 2021, arXiv 2102.04761, Algorithm 1).

Local momentum remembers a worker's own gradients, which pull away from its neighbours' where shards differ. Here what
is remembered is how the averaged model moved:

    V  =  beta M + G;   X' = X - lr V;   X+ = W X';   M+ = mu M + (1 - mu) (X - X+) / lr

(``--optimizer nesterov``: X' = X - lr (G + beta V), the paper's QG-DSGDm-N.) With tau local steps V goes on within the
round, and what is remembered is the move a step, (X - X+) / (tau lr).

X - X+ also holds what averaging changed, (I - W) X', and dividing it by a rate that falls to 0 makes M as large as one
likes. The steps stay bounded all the same: a round that lies s rounds back adds at most beta (1 - mu) nu^s lr / lr_back
times its disagreement |(I - W) X'| to the next step, with nu = mu + (1 - mu) beta (what is remembered is part of the
next move, and so is remembered again), and lr / lr_back is at most 1 while the rate falls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scipy import sparse

from training.protocols.gossip import Gossip, per_rate
from utils.errors import UsageError
from utils.linear import Line, Lines

if TYPE_CHECKING:
    from training.build import Job


class QuasiGlobalMomentum(Gossip):
    """Gossip whose momentum follows the averaged model."""

    further_rows = 2

    def check(self, job: Job) -> None:
        """It is about the momentum of SGD."""
        if job.config.optimizer not in ("sgd", "nesterov") or not job.config.momentum:
            raise UsageError(
                "--protocol qg replaces the momentum of SGD: it needs --optimizer sgd or nesterov, and --momentum "
                "above 0."
            )

    def after(self, job: Job, r: int, W: sparse.csr_array, lr: float) -> Lines:
        """The end of a round."""
        mu, move = job.config.qg_momentum, per_rate(lr) / job.config.local_steps
        return (
            Line("rows", rows=W),
            Line("momentum", momentum_before=mu, before=(1 - mu) * move, rows=-(1 - mu) * move),
        )
