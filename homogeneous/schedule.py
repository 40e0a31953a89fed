"""A schedule of visits that is improved by the exact gradient of what it leads to.

Training is differentiable, so the final validation loss F has a derivative with respect to the weight of every visit,
and to that of a visit that was not made: with rho the adjoint of the momentum (:mod:`utils.influence.recursion`) at hop
r and g_k the mean gradient of node k's samples at the model that hop r starts from, a step on node k's data with weight
w changes F by

    dF / dw = <rho, g_k>

So one pass back through a walk tells for every hop which node would have helped most, the one that was visited and
those that were not alike. Visits are exchanged where that promises to save the most hops and distance, the new schedule
is walked on the seeds that it is learned on, and kept if it needs less there. Nobody is asked on the way: the result is
a fixed order, which needs no agent.

Legend: N nodes, H hops, P trainable floats, S walks to learn from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from data.batches import Batches
from homogeneous.evaluation import record
from homogeneous.policies import FIXED, POLICIES, run
from homogeneous.world import Walking, World
from training.build import Job, initial_model
from training.trajectory import RecordedRun
from utils.influence.recursion import Adjoint, momentum_adjoint, step_back
from utils.influence.targets import objective
from utils.random import derive_seed

ROUNDS = 16  # of improvement
WALKS, DIFFERENTIATED = 8, 3  # walks that a schedule is judged by, and those of them that are differentiated
SHARE = 1 / 4  # of the visits are exchanged at a time, and half as many after a failure


class Schedule:
    """A policy: so many visits, in this order, and then again from the beginning."""

    def __init__(self, visits: Sequence[int]):
        self.visits = list(visits)

    def __call__(self, walking: Walking, walks: Sequence[int]) -> list[int]:
        """The next node of each."""
        return [self.visits[int(walking.hop_M[m]) % len(self.visits)] for m in walks]


def improved(world: World, seed: int, told: Callable[[dict], object]) -> Schedule:
    """The best of the policies that do not look at the model, improved. ``told``: gets the visits and what they needed,
    after every attempt. Raises :class:`UsageError` where influence methods cannot differentiate the walks."""
    seeds = [derive_seed(seed, "walk of the schedule", s) for s in range(WALKS)]
    started = [judged(world, unrolled(world, POLICIES[name]), seeds) for name in FIXED]
    best = min(started, key=lambda found: found["total"])
    visits = best["visits"]
    count = max(1, round(SHARE * min(best["hops"], len(visits))))
    told(best | {"exchanged": 0, "kept": True})
    for _ in range(ROUNDS):
        horizon = int(np.clip(round(best["hops"]), 2, len(visits)))
        worth_HN = np.mean([worth(world, s, visits[:horizon]) for s in seeds[:DIFFERENTIATED]], 0)
        tried = exchanged(world, visits, worth_HN, count)
        if tried == visits:
            break
        found = judged(world, tried, seeds)
        kept = found["total"] < best["total"]
        told(found | {"exchanged": count, "kept": kept})
        if kept:
            visits, best = tried, found
        elif count == 1:
            break
        else:
            count //= 2
    return Schedule(visits)


def unrolled(world: World, policy: Callable) -> list[int]:
    """Where a policy goes that does not look at the model."""
    walking = world.walks(1)
    walking.known = _Anything()
    walking.start([0], [0])
    while walking.hop_M[0] < world.rules.max_hops:
        walking.go([0], policy(walking, [0]))
    return walking.nodes[0]


class _Anything(dict):
    """Walks of which it does not matter what they measure."""

    def __contains__(self, key: object) -> bool:
        return True

    def get(self, key: object, default: object = None) -> tuple[float, float]:
        return (0.0, 1.0)


def judged(world: World, visits: Sequence[int], seeds: Sequence[int]) -> dict:
    """What the visits need on these walks, on average."""
    found = record(run(world, Schedule(visits), seeds, lambda hops: None))
    means = {name: float(np.mean(found[name])) for name in ("counted", "cost", "total")}
    return {"visits": list(visits), "hops": float(np.mean(found["hops"])), **means}


def worth(world: World, seed: int, visits: Sequence[int]) -> np.ndarray:
    """-dF/dw [H, N] of the walk that starts from this seed: what a visit of each node at each hop would lower the final
    validation loss by, to first order."""
    trajectory = RecordedRun(walk_as_run(world.job, seed, visits), len(visits))
    _, gradient_ND = objective(trajectory, trajectory.final(), "consensus")
    adjoint = Adjoint.of_rows(gradient_ND, trajectory.P)
    sizes_N, worth_HN = trajectory.shard_sizes_N, np.zeros((len(visits), world.num_nodes))
    hop, last = len(visits), None
    for t, rows_ND in trajectory.backwards():
        step = trajectory.step(t)
        if step.mixing is not None:  # the last step of a visit, which is the first that is met on the way back
            hop, steps = hop - 1, 0
        steps += 1
        _, rho_NP = momentum_adjoint(trajectory, t, adjoint)
        last = rho_NP[step.active[0]].clone()
        if t == 0 or trajectory.step(t - 1).mixing is not None:
            gradient_NP = trajectory.shard_gradient(rows_ND) / sizes_N[:, None].to(rows_ND)
            worth_HN[hop] = -steps * (gradient_NP @ last).double().cpu().numpy()
        adjoint, _ = step_back(trajectory, t, rows_ND, adjoint)
    return worth_HN


def walk_as_run(job: Job, seed: int, visits: Sequence[int]) -> Job:
    """The chained run that a walk is: its start and batches, and its visits as decisions."""
    config = dataclasses.replace(job.config, chain_order="policy", policy="a schedule")
    model = initial_model(config, job.dataset.task, job.samples.shape, seed)
    return dataclasses.replace(
        job,
        config=config,
        initial_ND=job.engine.rows([model], job.initial_ND.dtype).to(job.initial_ND.device),
        batches=Batches(job.shards, config.batch_size, derive_seed(seed, "batches")),
        decisions={"visits": list(visits)},
        _kept={},
    )


def exchanged(world: World, visits: Sequence[int], worth_HN: np.ndarray, count: int) -> list[int]:
    """The schedule with so many visits exchanged, no two of them neighbours: those that promise the most. A hop is
    worth what a visit of the schedule lowers the loss by, on average."""
    rules, open_NN, visits = world.rules, world.open_NN, list(visits)
    H, N = worth_HN.shape
    a_hop = max(float(np.mean([worth_HN[r, visits[r]] for r in range(H)])), 1e-12)
    gain_HN = np.full((H, N), -np.inf)
    for r in range(H):
        before, now = visits[r - 1] if r else 0, visits[r]
        after = visits[r + 1] if r + 1 < len(visits) else None
        for k in range(N):
            if k == now or not open_NN[before, k] or after is not None and not open_NN[k, after]:
                continue
            distance = rules.distance_NN[before, k] - rules.distance_NN[before, now]
            if after is not None:
                distance += rules.distance_NN[k, after] - rules.distance_NN[now, after]
            gain_HN[r, k] = (worth_HN[r, k] - worth_HN[r, now]) / a_hop - rules.cost_weight * distance
    for _ in range(count):
        r, k = np.unravel_index(int(gain_HN.argmax()), gain_HN.shape)
        if not gain_HN[r, k] > 0:
            break
        visits[r] = int(k)
        gain_HN[max(0, r - 1) : r + 2] = -np.inf
    return visits
