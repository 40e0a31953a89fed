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
from utils.registry import CHAIN_ORDERS, load
from workers.worker_vision import Fleet

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

    def check(self, job: Job) -> None:
        """An order that looks at the model may need more than the configuration says."""
        order = load(CHAIN_ORDERS, job.config.chain_order, "order")
        if hasattr(order, "check"):
            order.check(job)

    def decide(self, fleet: Fleet, job: Job, r: int) -> None:
        """Whom an order that looks at the model would visit."""
        order = load(CHAIN_ORDERS, job.config.chain_order, "order")
        if hasattr(order, "decide"):
            order.decide(fleet, job, r)

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
            first_N=visits_before(job, r) * epoch_steps_N,
            lr=job.learning_rate(r, self.rounds(job)),
            mixing=None if alone else hand_on,
            messages=0 if alone else 1,
            seconds=float(clock.compute_N(steps_N.numpy()).max()) + clock.transfer(0 if alone else 1),
            mix_momentum=True,
        )


def visits_before(job: Job, r: int) -> int:
    """How often the worker of this hop has trained before."""
    if "visits" in job.decisions:
        return job.decisions["visits"][:r].count(worker_at(job, r))
    return r // job.config.num_workers  # every worker trains once a cycle, whatever the order


def worker_at(job: Job, hop: int) -> int:
    """Who trains at this hop, by ``--chain_order``: a function of the job and the hop. One that has a ``decide`` is
    asked, with the fleet, before the hop, and puts its answer into ``job.decisions["visits"]``."""
    return load(CHAIN_ORDERS, job.config.chain_order, "order")(job, hop)


def fixed(job: Job, hop: int) -> int:
    """0 .. N-1 in turn."""
    return hop % job.config.num_workers


def random(job: Job, hop: int) -> int:
    """A new permutation every cycle."""
    N, cycle = job.config.num_workers, hop // job.config.num_workers
    order = job.once(f"chain {cycle}", lambda: permutations(torch.tensor([N]), job.config.seed, "chain", cycle)[0])
    return int(order[hop % N])


def shortest(job: Job, hop: int) -> int:
    """The shortest tour."""
    return job.once("chain tour", lambda: shortest_tour(job.topology.matrices[0]))[hop % job.config.num_workers]


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
