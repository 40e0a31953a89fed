"""The paper's world, as the code that its authors published has it (``--paper``; Sun and Ochiai, IEEE Access 2022,
arXiv 2110.05290), to be measured against; what we think right is the default.

- A node holds 400 samples of its main class and the first 100 of all others (from the 11th node on the next 100; fewer
  of both, 4 : 1, where the data have fewer), which nodes share. Pixels are in [0, 1].
- A network of 33,580 parameters, Adam, an epoch a visit; a node keeps its own Adam moments through a walk.
- The goal is looked at on TEST samples: a leak, which is theirs.
- A walk begins with a visit of node 0, and ends at the goal or after 36 visits.
- The reward of a visit is 32^(accuracy - goal) - distance - 1.
- What is seen: the N nodes' models, flattened, as principal components that are fitted anew each time. They are taken
  before a visited node hands its model to the others, so N - 1 models are alike and one has moved: one component, on
  which that node has (1 - 1/N) |step| and the others -|step| / N, and nothing in the others. An agent sees where the
  model was trained last and how far that moved it, and nothing of what the model knows.
- The agent: 100-500-200-10, squared error, Adam; after each walk one pass over 128 remembered visits in batches of 16;
  the share of random visits is exp(-0.02 walks); no target network; targets are divided by the Frobenius norm of all of
  them, which is not Bellman's equation.

Legend: N nodes, M walks, n samples, B remembered visits, F features.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from data.batches import Batches
from homogeneous.args import PaperConfig
from homogeneous.world import Rules, Walking, World, distances
from training.build import Job, build
from utils.errors import UsageError
from utils.random import derive_seed, integers, numpy_rng
from utils.records import write_atomically

MAIN, OTHERS = 400, 100
COMPONENTS = 10
GAMMA, MEMORY, REMEMBERED, BATCH, DECAY = 0.9, 50_000, 128, 16, 0.02
BASE = 32.0  # of the reward


def paper_world(config: PaperConfig) -> World:
    """The world. Raises :class:`UsageError` where the data are no pictures of classes."""
    job = paper_job(build(config.training()), config.test_samples)
    rules = Rules(
        config.goal, config.max_hops, config.cost_weight, distances(config.distances, config.num_workers)
    )
    return World(job, rules, published=True)


def paper_job(job: Job, test_samples: int) -> Job:
    """The job with the paper's shards and pixels, and with test samples in the place of validation samples."""
    data = job.dataset
    if data.task.metric.name != "accuracy" or not data.pictures:
        raise UsageError("--paper is about pictures of one class each (mnist, fashionmnist, digits).")
    targets_n = data.targets_n
    shards = main_class_shards(targets_n, job.config.num_workers)
    inputs_n = torch.cat([data.inputs_n, data.test_inputs_m[:test_samples]])
    both_n = torch.cat([targets_n, data.test_targets_m[:test_samples]])
    channels = len(data.mean_C)
    samples = dataclasses.replace(
        job.samples,
        inputs_n=inputs_n.to(job.samples.inputs_n.device),
        targets_n=data.task.encoded(both_n).to(job.samples.targets_n.device),
        mean_C=torch.zeros(channels).to(job.samples.mean_C),
        std_C=torch.ones(channels).to(job.samples.std_C),
    )
    return dataclasses.replace(
        job,
        dataset=dataclasses.replace(data, inputs_n=inputs_n, targets_n=both_n),
        samples=samples,
        shards=shards,
        whole_N=torch.tensor([len(shard) for shard in shards]),
        batches=Batches(shards, job.config.batch_size, job.batches.seed),
        train_ids=torch.cat(shards).unique(),
        val_ids=torch.arange(len(targets_n), len(both_n)),
        _kept={},
    )


def main_class_shards(targets_n: Tensor, num_workers: int) -> list[Tensor]:
    """Node k's sample ids: of class k mod C the next samples that no node before it has, and the first of all other
    classes. 400 and 100, or as many fewer, 4 : 1, as the smallest class makes it."""
    classes = int(targets_n.max()) + 1
    rounds = -(-num_workers // classes)
    main = min(MAIN, int(torch.bincount(targets_n).min()) // rounds)
    others = main * OTHERS // MAIN
    if others < 1:
        raise UsageError(f"--paper: {num_workers} nodes need {rounds * MAIN // OTHERS} samples of each class at least.")
    shards = []
    for k in range(num_workers):
        own, place = (targets_n == k % classes).nonzero()[:, 0], k // classes
        rest = (targets_n != k % classes).nonzero()[:, 0]
        shards.append(
            torch.cat([own[place * main : (place + 1) * main], rest[place * others : (place + 1) * others]])
        )
    return shards


def seen(walking: Walking, walks: Sequence[int]) -> Tensor:
    """The principal components of the nodes' models in these walks, float32 [M, N * min(N, 10)]."""
    N = walking.N
    components_MNC = torch.zeros(len(walks), N, min(N, COMPONENTS))
    for i, m in enumerate(walks):
        if walking.nodes[m]:
            moved = walking.measured[m][-1][-1]
            components_MNC[i, :, 0] = -moved / N
            components_MNC[i, walking.nodes[m][-1], 0] = moved * (1 - 1 / N)
    return components_MNC.flatten(1)


def reward(walking: Walking, distance: float) -> float:
    """Of the last visit of the first walk, which came from so far away."""
    return BASE ** (walking.measured[0][-1][0] - walking.rules.goal) - distance - 1


def new_network(nodes: int, seed: int) -> nn.Sequential:
    """What going to each node is worth, from what is seen [*, F]: [*, N]. Glorot's initialization, as in Keras."""
    sizes = (nodes * min(nodes, COMPONENTS), 500, 200, nodes)
    network = nn.Sequential(
        nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:3]), nn.ReLU(), nn.Linear(*sizes[2:])
    )
    generator = torch.Generator().manual_seed(seed % 2**63)
    for layer in network[::2]:
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    return network


class PaperAgent:
    """A policy: the node of the greatest value. ``exploration``: the share of random visits after its last walk."""

    def __init__(self, network: nn.Sequential, rules: Rules, exploration: float):
        self.network, self.rules, self.exploration = network, rules, exploration

    @torch.no_grad()
    def __call__(self, walking: Walking, walks: Sequence[int]) -> list[int]:
        """The next node of each."""
        features = self.network[0].in_features
        if features != walking.N * min(walking.N, COMPONENTS):
            raise UsageError(f"the agent sees {features} numbers of a walk, which are none of {walking.N} nodes.")
        return self.network(seen(walking, walks)).argmax(1).tolist()

    def exploring(self, walking: Walking, walks: Sequence[int]) -> list[int]:
        """The same, with as many random visits as at the end of its training: what the paper's figures are of."""
        chosen = self(walking, walks)
        for i, m in enumerate(walks):
            hop, seed = int(walking.hop_M[m]), walking.seeds[m]
            if int(integers(1 << 30, seed, "exploring", hop)) < self.exploration * (1 << 30):
                chosen[i] = int(integers(walking.N, seed, "explored", hop))
        return chosen

    def save(self, path: Path) -> None:
        """Write it."""
        about = {"nodes": self.network[-1].out_features, "exploration": self.exploration, "rules": self.rules.to_json()}
        data = save(self.network.state_dict(), {"paper_agent": json.dumps(about, sort_keys=True)})
        write_atomically(path, lambda file: file.write(data))


def read_agent(about: dict[str, Any], tensors: dict[str, Tensor]) -> PaperAgent:
    """One from its file. Raises KeyError, TypeError, ValueError or RuntimeError where it is damaged."""
    network = new_network(int(about["nodes"]), 0)
    network.load_state_dict(tensors)
    return PaperAgent(network, Rules.from_json(about["rules"]), float(about["exploration"]))


def teach(
    world: World, episodes: int, seed: int, known: Sequence[dict[str, Any]], told: Callable[[dict[str, Any]], object]
) -> PaperAgent:
    """The agent learns from so many walks, one after the other, as the paper's does; ``known`` and ``told`` as in
    :func:`homogeneous.agent.learn`."""
    N, walking, draw = world.num_nodes, world.walks(1), numpy_rng(seed, "the paper's agent")
    for walk in known:
        walking.remember(walk)
    network = new_network(N, derive_seed(seed, "the paper's network"))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-7)
    memory, agent = deque(maxlen=MEMORY), PaperAgent(network, world.rules, 1.0)
    for e in range(episodes):
        walking.start([0], [derive_seed(seed, "the paper's walk", e)])
        walking.go([0], [world.first])
        returned = reward(walking, 0.0)
        while not walking.over_M()[0]:
            before_1F, at = seen(walking, [0]), int(walking.at_M[0])
            node = agent(walking, [0])[0] if draw.random() > agent.exploration else int(draw.integers(N))
            walking.go([0], [node])
            value = reward(walking, float(world.rules.distance_NN[at, node]))
            memory.append((before_1F[0], node, value, seen(walking, [0])[0], bool(walking.over_M()[0])))
            returned += value
        told(
            {"round": e, "exploration": agent.exploration, "return": returned, "seed": walking.seeds[0],
             "nodes": walking.nodes[0], "measured": walking.measured[0], "cost": float(walking.cost_M[0]),
             "reached": bool(walking.reached_M()[0])}
        )  # fmt: skip
        if len(memory) >= REMEMBERED:
            chosen = draw.choice(len(memory), REMEMBERED, replace=False)
            learn_from([memory[i] for i in chosen], network, optimizer)
        agent.exploration *= math.exp(-DECAY)
    return agent


def learn_from(visits: list[tuple], network: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """A pass over remembered visits."""
    before, nodes, values, after, last = zip(*visits, strict=True)
    before_BF, after_BF = torch.stack(before), torch.stack(after)
    with torch.no_grad():
        wanted_BN = network(before_BF)
        later_B = network(after_BF).max(1).values.where(~torch.tensor(last), torch.zeros(len(visits)))
        wanted_BN[torch.arange(len(visits)), list(nodes)] = torch.tensor(np.array(values)).float() + GAMMA * later_B
        wanted_BN /= wanted_BN.norm()
    for part in torch.arange(len(visits)).split(BATCH):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(before_BF[part]), wanted_BN[part]).backward()
        optimizer.step()
