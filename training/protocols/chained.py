"""Chained training: one model walks from worker to worker (cyclic weight transfer; Chang et al. 2018).

Each worker trains it for E epochs on its own shard and hands it on, momentum included; a monitor
evaluates after every hop. All rows of the fleet hold the walking model between hops: handing on is a
mixing matrix whose rows all select the worker that trained, so the recursion of ``cascade`` follows
the walk.

Legend: N workers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import shortest_path

from training.protocols import Protocol, RoundPlan, local_epoch_steps
from utils.random import permutations

if TYPE_CHECKING:
    from training.build import Job
    from utils.args import Config


class Chained(Protocol):
    """Every row is the walking model, and one worker trains it. (With ``--init per_worker`` the first hop discards
    the others' models, which is linear too.)"""

    shared = True
    evaluate_every = 1  # the monitor looks after every hop

    def rounds(self, job: Job) -> int:
        """A round is one hop; N hops with E local epochs each are E epochs."""
        return max(1, math.ceil(job.config.epochs * job.config.num_workers / job.config.local_epochs))

    def workers_at_once(self, config: Config) -> int:
        """The one of this hop."""
        return 1

    def plan(self, job: Job, r: int) -> RoundPlan:
        """The worker of this hop trains; then every row is its row."""
        N, worker, clock = job.config.num_workers, worker_at(job, r), job.virtual_time
        epoch_steps_N = local_epoch_steps(job)
        steps_N = torch.zeros(N, dtype=torch.int64)
        steps_N[worker] = epoch_steps_N[worker]
        hand_on = sparse.csr_array((np.ones(N), np.full(N, worker), np.arange(N + 1)), shape=(N, N))
        alone = N == 1
        return RoundPlan(
            steps_N=steps_N,
            first_N=r // N * epoch_steps_N,  # every worker trains once a cycle, whatever the order
            lr=job.learning_rate(r, self.rounds(job)),
            mixing=None if alone else hand_on,
            messages=0 if alone else 1,
            seconds=float(clock.compute_N(steps_N.numpy()).max()) + clock.transfer(0 if alone else 1),
            mix_momentum=True,
        )


def worker_at(job: Job, hop: int) -> int:
    """Who trains at this hop: 0 .. N-1 in turn, a new permutation every cycle, or the shortest tour."""
    N, cycle, place = job.config.num_workers, hop // job.config.num_workers, hop % job.config.num_workers
    if job.config.chain_order == "random":
        order = job.once(f"chain {cycle}", lambda: permutations(torch.tensor([N]), job.config.seed, "chain", cycle)[0])
        return int(order[place])
    if job.config.chain_order == "shortest":
        return job.once("chain tour", lambda: shortest_tour(job.topology.matrices[0]))[place]
    return place


def shortest_tour(mixing: sparse.csr_array) -> list[int]:
    """A short round trip over all workers, by hops in the topology's graph: nearest neighbour, improved by
    2-opt until no exchange shortens it."""
    return improved_tour(shortest_path(mixing != 0, directed=False, unweighted=True))


def improved_tour(hops_NN: np.ndarray) -> list[int]:
    """The same for any distances."""
    tour, left = [0], set(range(1, len(hops_NN)))
    while left:
        nearest = min(left, key=lambda k: (hops_NN[tour[-1], k], k))
        tour.append(nearest)
        left.remove(nearest)
    size, improved = len(tour), True
    while improved:
        improved = False
        for i in range(size - 1):
            for j in range(i + 2, size - (i == 0)):
                a, b, c, d = tour[i], tour[i + 1], tour[j], tour[(j + 1) % size]
                if hops_NN[a, c] + hops_NN[b, d] < hops_NN[a, b] + hops_NN[c, d]:
                    tour[i + 1 : j + 1] = tour[i + 1 : j + 1][::-1]
                    improved = True
    return tour
