"""The world of a walk: nodes, links and distances, a goal, and what is seen on the way.

An observation is float32 [F], each part about as large as 1:

| part | numbers | what |
| --- | --- | --- |
| position | N | 1 at the node where the model is |
| open | N | 1 at nodes that it may go to next |
| distance | N | to each node, over the largest distance there is |
| visits | N | how often each node has trained it, v / (1 + v) |
| since | N | hops since each node's last visit over the most hops; 1 for nodes that were never visited |
| change | N | what each node's last visit did to the validation loss, over the loss at the start |
| loss | S | validation loss of each class (or stratum) over the loss at the start |
| goal | 1 | how far the metric is from the goal |
| hops | 1 | share of the hops that are used |

Legend: M walks, N nodes, S strata, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse.csgraph import shortest_path

from homogeneous.args import WalkConfig
from training.build import Job, build
from training.walk import Walks
from utils.errors import UsageError
from utils.files import read_lines

LOSSES = 3.0  # times the first loss; a model that diverges is no further away than this


@dataclass(frozen=True)
class Rules:
    """Where a walk ends and what it costs: ``goal`` of the metric, ``max_hops``, ``cost_weight`` (hops that a distance
    of 1 is worth), and the ``distance_NN`` of every two nodes."""

    goal: float
    max_hops: int
    cost_weight: float
    distance_NN: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return vars(self) | {"distance_NN": self.distance_NN.tolist()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Rules:
        """What :meth:`to_json` gave. Raises KeyError, TypeError or ValueError where it is damaged."""
        distance_NN = np.array(record["distance_NN"], dtype=np.float64)
        if distance_NN.ndim != 2 or not np.isfinite(distance_NN).all():
            raise ValueError("its distances are no matrix")
        return cls(float(record["goal"]), int(record["max_hops"]), float(record["cost_weight"]), distance_NN)


class World:
    """Nodes with their data (a chained :class:`training.build.Job`), rules, and who may follow whom ``open_NN``: a
    model may stay. Raises :class:`UsageError` where some nodes cannot be reached.

    ``published``: walks are those of :mod:`homogeneous.paper`. They begin with a visit of node ``first``, nodes keep
    their optimizer's state, and of a model its metric, its loss and how far its last visit moved it are measured.
    """

    def __init__(self, job: Job, rules: Rules, published: bool = False):
        self.job, self.rules, N = job, rules, job.config.num_workers
        self.published, self.first = published, 0 if published else None
        self.visit_steps: int | None = None  # of every visit (None: an epoch of the node's samples)
        if rules.distance_NN.shape != (N, N):
            raise UsageError(f"the distances are those of {len(rules.distance_NN)} nodes; here there are {N}.")
        linked_NN = sum(matrix.toarray() != 0 for matrix in job.topology.matrices) > 0
        self.open_NN = linked_NN | linked_NN.T | np.eye(N, dtype=bool)
        if np.isinf(shortest_path(self.open_NN, directed=False, unweighted=True)).any():
            raise UsageError(f"--mode {job.config.mode}: some nodes cannot be reached, and the walk gets stuck.")

    @classmethod
    def of(cls, config: WalkConfig) -> World:
        """The world that the configuration describes."""
        if config.paper:
            from homogeneous.paper import paper_world

            return paper_world(config)
        distance_NN = distances(config.distances, config.num_workers)
        return cls(build(config.training()), Rules(config.goal, config.max_hops, config.cost_weight, distance_NN))

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.open_NN)

    def walks(self, count: int) -> Walking:
        """So many walks side by side."""
        return Walking(self, count)


def distances(what: str, N: int) -> np.ndarray:
    """The distance [N, N] of every two nodes. 'random' is the paper's draw: uniform numbers below 0.1, made
    symmetric, seed 0."""
    if what == "even":
        return 1.0 - np.eye(N)
    if what == "random":
        drawn_NN = np.random.RandomState(0).random_sample((N, N)) / 10
        distance_NN = (drawn_NN + drawn_NN.T) / 2
        np.fill_diagonal(distance_NN, 0.0)
        return distance_NN
    rows = [[_number(word, what) for word in line.split()] for _, line in read_lines(what, "--distances")]
    if len(rows) != N or any(len(row) != N for row in rows):
        raise UsageError(f"--distances {what}: {N} lines of {N} numbers are needed, one for each node.")
    return np.array(rows)


def _number(word: str, file: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"--distances {Path(file)}: {word!r} is no distance (a number from 0).")
    return value


Measured = tuple[float, ...]  # of a walk: the metric, the loss, and the loss of every stratum


class Walking:
    """M walks in a world, and what is seen of them.

    ``seeds``: what each walk starts from and how it goes on. ``nodes``: where it was, in order; ``measured``: what its
    model was worth at the start and after every visit; ``cost_M``: distance travelled. ``known``: what walks that were
    made before measured, by seed and nodes. A walk that follows one of them is not trained until it leaves it.
    """

    def __init__(self, world: World, count: int):
        self.world, self.rules = world, world.rules
        self.walks = Walks(world.job, count, world.rules.max_hops, world.published)
        if world.published:
            self.walks.strata = []
        if world.visit_steps is not None:
            self.walks.steps_N.fill_(world.visit_steps)
        self.metric = self.walks.metric
        self.N = world.num_nodes
        self.seeds = [0] * count
        self.nodes: list[list[int]] = [[] for _ in range(count)]
        self.measured: list[list[Measured]] = [[(0.0, 1.0)] for _ in range(count)]
        self.known: dict[tuple[int, ...], Measured] = {}
        self.at_M, self.hop_M = (np.zeros(count, dtype=np.int64) for _ in range(2))
        self.visits_MN = np.zeros((count, self.N), dtype=np.int64)
        self.last_MN, self.change_MN = (np.zeros((count, self.N)) for _ in range(2))
        self.cost_M = np.zeros(count)
        self._trained = [-1] * count  # visits that the model has made; -1: it has no start yet

    @property
    def features(self) -> int:
        """F."""
        return 6 * self.N + len(self.walks.strata) + 2

    @property
    def figure_M(self) -> np.ndarray:
        """The task's first metric of each walk's model."""
        return np.array([measured[-1][0] for measured in self.measured])

    @property
    def loss_M(self) -> np.ndarray:
        """The validation loss of each."""
        return np.array([measured[-1][1] for measured in self.measured])

    def remember(self, walk: dict[str, Any]) -> None:
        """What a walk that has ended measured, as its line in episodes.jsonl has it."""
        for hops, values in enumerate(walk["measured"]):
            measured = tuple(float("nan") if value is None else value for value in values)
            self.known[(walk["seed"], *walk["nodes"][:hops])] = measured

    def start(self, walks: Sequence[int], seeds: Sequence[int]) -> None:
        """These walks begin anew at node 0."""
        walks = list(walks)
        for m, seed in zip(walks, seeds, strict=True):
            self.seeds[m], self.nodes[m], self.measured[m], self._trained[m] = int(seed), [], [], -1
        self.at_M[walks], self.hop_M[walks], self.visits_MN[walks], self.cost_M[walks] = 0, 0, 0, 0.0
        self.last_MN[walks], self.change_MN[walks] = -1.0, 0.0
        self._measure(walks)

    def go(self, walks: Sequence[int], nodes: Sequence[int]) -> np.ndarray:
        """These walks go to these nodes; what each hop cost, hops and weighted distance together. Raises
        :class:`UsageError` where there is no link."""
        walks, nodes = list(walks), [int(k) for k in nodes]
        before = self.at_M[walks].copy()
        for a, b in zip(before, nodes, strict=True):
            if not self.world.open_NN[a, b]:
                raise UsageError(f"a walk cannot go from node {a} to node {b}: they have no link.")
        for m, k in zip(walks, nodes, strict=True):
            self.nodes[m].append(k)
        distance = self.rules.distance_NN[before, nodes]
        self.at_M[walks] = nodes
        self.hop_M[walks] += 1
        self.visits_MN[walks, nodes] += 1
        self.cost_M[walks] += distance
        self._measure(walks)
        self.last_MN[walks, nodes] = self.hop_M[walks]
        for m, k in zip(walks, nodes, strict=True):
            self.change_MN[m, k] = (self.measured[m][-1][1] - self.measured[m][-2][1]) / self.measured[m][0][1]
        return 1 + self.rules.cost_weight * distance

    def _measure(self, walks: list[int]) -> None:
        """What these walks' models are worth where they are now: remembered, or trained and measured."""
        unknown = [m for m in walks if (self.seeds[m], *self.nodes[m]) not in self.known]
        self._train(unknown)
        found = self.walks.measure(unknown) if unknown else []
        if self.world.published:
            moved = self.walks.moved_M[unknown].tolist()
            found = [(*figures, step) for figures, step in zip(found, moved, strict=True)]
        values = iter(found)
        for m in walks:
            known = self.known.get((self.seeds[m], *self.nodes[m]))
            self.measured[m].append(next(values) if known is None else known)

    def _train(self, walks: list[int]) -> None:
        """All visits of these walks that their models have not made yet."""
        if new := [m for m in walks if self._trained[m] < 0]:
            self.walks.start(new, [self.seeds[m] for m in new])
            for m in new:
                self._trained[m] = 0
        while behind := [m for m in walks if self._trained[m] < len(self.nodes[m])]:
            self.walks.visit(behind, [self.nodes[m][self._trained[m]] for m in behind])
            for m in behind:
                self._trained[m] += 1

    def looked_ahead(self, m: int, nodes: Sequence[int]) -> np.ndarray:
        """The validation loss of walk ``m`` after each of these nodes has trained it."""
        self._train([m])
        world = self.world
        trial = world.job.once(
            "look-ahead walks", lambda: Walks(world.job, self.N, self.rules.max_hops, world.published)
        )
        return trial.tried_from(self.walks, m, nodes)

    def distance_to_goal(self) -> np.ndarray:
        """How far each walk's metric is from the goal [M]; 0 where it is reached."""
        gap_M = self.rules.goal - self.figure_M
        gap_M = gap_M if self.metric.higher_is_better else -gap_M
        return np.maximum(np.nan_to_num(gap_M, nan=1e3), 0.0)

    def reached_M(self) -> np.ndarray:
        """Whether each walk is at the goal."""
        return (self.distance_to_goal() == 0) & np.isfinite(self.figure_M)

    def over_M(self) -> np.ndarray:
        """Whether each walk has ended: at the goal, or after its last hop."""
        return self.reached_M() | (self.hop_M >= self.rules.max_hops)

    def open_MN(self) -> np.ndarray:
        """Where each walk may go next."""
        return self.world.open_NN[self.at_M]

    def observations(self) -> np.ndarray:
        """What is seen of each walk, float32 [M, F]: the table above."""
        since_MN = np.where(self.last_MN < 0, 1.0, (self.hop_M[:, None] - self.last_MN) / self.rules.max_hops)
        distance_MN = self.rules.distance_NN[self.at_M] / max(self.rules.distance_NN.max(), 1e-12)
        loss_MS = np.array([measured[-1][2:] for measured in self.measured])
        first_M = np.array([measured[0][1] for measured in self.measured])
        parts = [
            np.eye(self.N)[self.at_M],
            self.open_MN(),
            distance_MN,
            self.visits_MN / (1 + self.visits_MN),
            since_MN,
            self.change_MN,
            loss_MS / first_M[:, None],
            self.distance_to_goal()[:, None],
            self.hop_M[:, None] / self.rules.max_hops,
        ]
        seen_MF = np.concatenate([np.asarray(p, dtype=np.float64) for p in parts], 1)
        return np.clip(np.nan_to_num(seen_MF, nan=LOSSES), -LOSSES, LOSSES).astype(np.float32)
