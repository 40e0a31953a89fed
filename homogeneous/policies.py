"""Who decides without having learned. A policy is a function of walks: the next node of each of some of them.

To add one, write a function here and a line in POLICIES.

Legend: N nodes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from scipy.sparse.csgraph import shortest_path

from homogeneous.world import Walking, World
from training.protocols import local_epoch_steps
from training.protocols.chained import improved_tour
from utils.errors import choose
from utils.random import integers

Policy = Callable[[Walking, Sequence[int]], list[int]]


def random(walking: Walking, walks: Sequence[int]) -> list[int]:
    """Any node that is open, each as likely (the walk's own counts too); a function of the walk's seed and its hop."""
    chosen = []
    for m in walks:
        open_n = np.flatnonzero(walking.open_MN()[m])
        chosen.append(int(open_n[int(integers(len(open_n), walking.seeds[m], "random policy", int(walking.hop_M[m])))]))
    return chosen


def round_robin(walking: Walking, walks: Sequence[int]) -> list[int]:
    """0, 1, .., N - 1, and again."""
    return [_towards(walking, m, int(walking.hop_M[m]) % walking.N) for m in walks]


def nearest(walking: Walking, walks: Sequence[int]) -> list[int]:
    """The nearest node that was visited least."""
    chosen = []
    for m in walks:
        visits_N, at = walking.visits_MN[m], walking.at_M[m]
        wanted = min((visits_N[k], walking.rules.distance_NN[at, k], k) for k in range(walking.N) if k != at)[2]
        chosen.append(_towards(walking, m, wanted))
    return chosen


def tour(walking: Walking, walks: Sequence[int], stay: int = 1) -> list[int]:
    """Along a short round trip over all nodes, ``stay`` hops at each."""
    order = walking.world.job.once("homogeneous tour", lambda: improved_tour(walking.rules.distance_NN))
    return [_towards(walking, m, order[int(walking.hop_M[m]) // stay % walking.N]) for m in walks]


def look_ahead(walking: Walking, walks: Sequence[int]) -> list[int]:
    """The open node after whose visit the validation loss is lowest: every one of them trains the model first, so a hop
    costs as many trainings as there are nodes. What no policy can know, and none has to beat."""
    chosen = []
    for m in walks:
        nodes = np.flatnonzero(walking.open_MN()[m])
        losses = walking.looked_ahead(m, nodes.tolist())
        chosen.append(int(nodes[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]))
    return chosen


def centralized(walking: Walking, walks: Sequence[int]) -> list[int]:
    """There is one node (:func:`all_data_at_one`): what a model comes to that need not walk."""
    return [0 for _ in walks]


def all_data_at_one(world: World) -> World:
    """The world with all data at one node; a visit trains on as many batches as one of the nodes' does on average."""
    job = world.job
    pooled = copy.copy(world)
    everything = torch.cat(job.shards).unique()
    pooled.job = dataclasses.replace(job, shards=[everything], whole_N=torch.tensor([len(everything)]), _kept={})
    pooled.rules = dataclasses.replace(world.rules, distance_NN=np.zeros((1, 1)))
    pooled.open_NN = np.ones((1, 1), dtype=bool)
    pooled.visit_steps = round(float(local_epoch_steps(job).float().mean()))
    return pooled


def _towards(walking: Walking, m: int, node: int) -> int:
    """The node itself where there is a link, and else the next one on the way with the fewest hops."""
    at = int(walking.at_M[m])
    if walking.world.open_NN[at, node]:
        return node
    before_NN = walking.world.job.once(
        "homogeneous ways",
        lambda: shortest_path(walking.world.open_NN, directed=False, unweighted=True, return_predecessors=True)[1],
    )
    return int(before_NN[node, at])


POLICIES: dict[str, Policy] = {
    "random": random,
    "round_robin": round_robin,
    "nearest": nearest,
    "tour": tour,
    "stay_2": partial(tour, stay=2),
    "stay_3": partial(tour, stay=3),
    "stay_6": partial(tour, stay=6),
    "look_ahead": look_ahead,
    "centralized": centralized,
}
ORACLES = {  # what nobody can have: measures of what there is to be had
    "look_ahead": "trains at every node before each hop",
    "centralized": "all data at one node",
}
LEARNED = ("gradient",)  # homogeneous/schedule.py
FIXED = ("round_robin", "tour", "stay_2", "stay_3", "stay_6")  # do not look at the model


def chosen(names: Sequence[str]) -> list[str]:
    """The policies of these names, or all. Raises :class:`UsageError` of an unknown one."""
    known = dict.fromkeys((*POLICIES, *LEARNED))
    for name in names:
        choose(known, name, "policy")
    return list(dict.fromkeys(names)) or list(known)


def run(world: World, policy: Policy, seeds: Sequence[int], tick: Callable[[int], object]) -> Walking:
    """A walk of every seed under a policy, side by side, each to its end."""
    walking = (all_data_at_one(world) if policy is centralized else world).walks(len(seeds))
    walking.start(range(len(seeds)), seeds)
    if world.first is not None:
        walking.go(range(len(seeds)), [world.first] * len(seeds))
    while len(going := np.flatnonzero(~walking.over_M()).tolist()):
        walking.go(going, policy(walking, going))
        tick(len(going))
    return walking
