"""RelaySGD: the exact average of a tree, a few rounds late (Vogels et al., NeurIPS 2021, arXiv 2110.04175).

After its local step a worker i sends to each neighbour j in a tree what it got from the others, and its own:

    m_ij  <-  x'_i + sum over k != j of m_ki (of the round before),      c_ij alike, with 1 for x'_i
    x_i+  =   (x'_i + sum over j of m_ji + (N - 1 - sum over j of c_ji) x'_i) / N

So a model reaches everybody once, a hop a round, with weight 1 / N whatever the distance, and one's own stands for
those that are not here yet. With x' held fixed the result is the exact average once there have been as many rounds as
the tree's diameter. The counts follow from the tree. The statistics of BatchNorm are averaged with the neighbours',
with the weights of ``--mode``.

Legend: N workers, E = 2 (N - 1) messages, ordered by receiver.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from training.protocols.gossip import Gossip
from utils.errors import UsageError
from utils.linear import Line, Lines
from utils.topology import metropolis_hastings
from utils.topology_file import ROW_SUM_TOLERANCE

if TYPE_CHECKING:
    from torch import Tensor

    from training.build import Job
    from workers.worker_vision import Fleet


@dataclass(frozen=True, eq=False)
class Relays:
    """A tree's messages. ``receiver_E``; ``own_EN``: what a message has of its sender; ``relayed_EE``: the messages of
    the round before that it passes on; ``got_NE``: who gets it."""

    further_rows = 8
    receiver_E: np.ndarray
    own_EN: sparse.csr_array
    relayed_EE: sparse.csr_array
    got_NE: sparse.csr_array

    @classmethod
    def of(cls, W: sparse.csr_array) -> Relays:
        """Those of the tree whose links are the nonzero weights off the diagonal."""
        links = W.tocoo()
        apart = links.row != links.col
        receiver_E, sender_E = links.row[apart], links.col[apart]
        order = np.lexsort((sender_E, receiver_E))
        receiver_E, sender_E = receiver_E[order], sender_E[order]
        N, E, e = W.shape[0], len(receiver_E), np.arange(len(receiver_E))
        own_EN = sparse.csr_array((np.ones(E), (e, sender_E)), shape=(E, N))
        got_NE = sparse.csr_array((np.ones(E), (receiver_E, e)), shape=(N, E))
        relayed = (own_EN @ got_NE).tocoo()  # all that the sender got ...
        onward = sender_E[relayed.col] != receiver_E[relayed.row]  # ... but from the receiver
        relayed_EE = sparse.csr_array((relayed.data[onward], (relayed.row[onward], relayed.col[onward])), shape=(E, E))
        return cls(receiver_E, own_EN, relayed_EE, got_NE)

    def counts(self, r: int) -> np.ndarray:
        """How many models a worker has got with round r [N], from 0."""
        count_E = np.zeros(len(self.receiver_E))
        for _ in range(min(r + 1, len(self.receiver_E))):  # no tree has a longer way
            count_E = 1 + self.relayed_EE @ count_E
        return self.got_NE @ count_E


class RelaySGD(Gossip):
    """Everybody's model reaches everybody, hop by hop."""

    has_edges = False

    def check(self, job: Job) -> None:
        """It needs a tree."""
        W = job.topology.matrices[0]
        N, links = job.topology.num_workers, W.nnz - np.count_nonzero(W.diagonal())
        if job.topology.period > 1 or job.topology.directed or links != 2 * (N - 1) or not job.topology.is_connected:
            raise UsageError(f"--protocol relay needs a tree, which --mode {job.config.mode} is not: take --mode tree, "
                             "line or star.")  # fmt: skip
        if abs(W - metropolis_hastings(W)).max() > ROW_SUM_TOLERANCE:
            warnings.warn("--protocol relay gives all models of a tree the same weight: those of --topology_file weigh "
                          "the statistics of BatchNorm alone", stacklevel=2)  # fmt: skip

    def relays(self, job: Job) -> Relays:
        """The messages of the run."""
        return job.once("relays", lambda: Relays.of(job.topology.matrices[0]))

    def states(self, fleet: Fleet, job: Job) -> dict[str, Tensor]:
        """The messages of the round before: none."""
        receiver_E = self.relays(job).receiver_E
        fleet.divide(receiver_E)
        return {"messages": fleet.zeros(len(receiver_E))} if len(receiver_E) else {}

    def after(self, job: Job, r: int, W: sparse.csr_array, lr: float) -> Lines | None:
        """The end of a round."""
        N, relays = W.shape[0], self.relays(job)
        if N == 1:
            return None
        r = min(r, N)  # by then everybody's model has arrived
        own_N = job.once(f"relay weights {r}", lambda: (N - relays.counts(r)) / N)
        return (
            Line("messages", rows=relays.own_EN, messages=relays.relayed_EE),
            Line("arrived", messages=relays.got_NE),
            Line("rows", rows=own_N, arrived=1 / N),
        )
