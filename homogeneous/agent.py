"""The agent: a DQN (Mnih et al. 2015; Stable-Baselines3) that looks at a walk and names the next node.

Kept as safetensors: the weights of its network, and in the metadata what it can be used for. Nothing is unpickled.

Legend: M walks, N nodes, F features, H hidden units.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from homogeneous.paper import PaperAgent, read_agent
from homogeneous.world import Rules, Walking, World
from utils.errors import UsageError
from utils.files import read_bytes
from utils.random import derive_seed
from utils.records import write_atomically

HIDDEN = 64
CLOSED = -1e6  # the value of a node without a link
OF_NODE = 6  # features of a node: position, open, distance, visits, since, change


class Values(nn.Module):
    """What going to each node is worth. One network values all nodes alike, by what is seen of a node, of the model,
    and by a profile that is learned for each node: which classes' losses it is good for.

    ``nodes``: N; ``features``: F of an observation (:mod:`homogeneous.world`).
    """

    def __init__(self, nodes: int, features: int):
        super().__init__()
        self.nodes, self.features = nodes, features
        strata = features - OF_NODE * nodes - 2
        self.profile_NS = nn.Parameter(0.1 * torch.randn(nodes, strata))
        self.network = nn.Sequential(
            nn.Linear(OF_NODE + 2 + 2 * strata, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 1),
        )  # fmt: skip

    def forward(self, seen_MF: Tensor) -> Tensor:
        """Values [M, N]; a node without a link is worth nothing."""
        M, N = len(seen_MF), self.nodes
        of_node_MN6 = seen_MF[:, : OF_NODE * N].unflatten(1, (OF_NODE, N)).movedim(1, 2)
        loss_M1S, rest_M12 = seen_MF[:, None, OF_NODE * N : -2], seen_MF[:, None, -2:]
        profile_MNS = self.profile_NS.expand(M, -1, -1)
        parts = [of_node_MN6, rest_M12.expand(-1, N, -1), profile_MNS, profile_MNS * loss_M1S]
        values_MN = self.network(torch.cat(parts, 2))[..., 0]
        return values_MN.masked_fill(seen_MF[:, N : 2 * N] < 0.5, CLOSED)


class Agent:
    """A policy (:mod:`homogeneous.policies`): the node of the greatest value. ``rules``: those it has learned under."""

    def __init__(self, values: Values, rules: Rules):
        self.values, self.rules = values, rules

    @torch.no_grad()
    def __call__(self, walking: Walking, walks: Sequence[int]) -> list[int]:
        """The next node of each. Raises :class:`UsageError` in a world of other nodes or observations."""
        if (self.values.nodes, self.values.features) != (walking.N, walking.features):
            raise UsageError(
                f"the agent knows {self.values.nodes} nodes and {self.values.features} features of a walk; here there "
                f"are {walking.N} and {walking.features}."
            )
        return self.values(torch.from_numpy(walking.observations()[list(walks)])).argmax(1).tolist()

    def save(self, path: Path) -> None:
        """Write it."""
        about = {"nodes": self.values.nodes, "features": self.values.features, "rules": self.rules.to_json()}
        metadata = {"agent": json.dumps(about, sort_keys=True)}
        data = save({name: tensor.contiguous() for name, tensor in self.values.state_dict().items()}, metadata)
        write_atomically(path, lambda file: file.write(data))


def load_agent(path: Path) -> Agent | PaperAgent:
    """Read one back. Raises :class:`UsageError` where the file is none."""
    read_bytes(path, "--policy")  # refuses what is no file: opening a pipe would wait for ever
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
            metadata = file.metadata()
            if "paper_agent" in metadata:
                return read_agent(json.loads(metadata["paper_agent"]), tensors)
            about = json.loads(metadata["agent"])
            values = Values(int(about["nodes"]), int(about["features"]))
            values.load_state_dict(tensors)
            rules = Rules.from_json(about["rules"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} is no agent ({str(error).splitlines()[0]}).") from error
    return Agent(values, rules)


def learn(
    world: World, episodes: int, side_by_side: int, seed: int, known: Sequence[dict[str, Any]],
    told: Callable[[dict[str, Any]], object],
) -> Agent:
    """A DQN learns from so many walks. ``told``: gets each walk that has ended. ``known``: what an earlier call was
    told: the agent learns anew, and makes the same walks, whose models need not be trained again."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.dqn.policies import DQNPolicy, QNetwork

    from homogeneous.environment import GAMMA, WalkVecEnv

    N = world.num_nodes

    class OpenPolicy(DQNPolicy):
        def make_q_net(self) -> QNetwork:
            network = super().make_q_net()
            network.q_net = Values(N, env.walking.features)
            return network

    class OpenDQN(DQN):
        """Explores among the nodes that are open."""

        def predict(self, observation, state=None, episode_start=None, deterministic=False):  # noqa: ANN001, ANN202
            chosen_M = self.policy.predict(observation, state, episode_start, True)[0]
            if deterministic:
                return chosen_M, state
            for m, open_n in enumerate(observation[:, N : 2 * N] > 0.5):
                if self.draw.random() < self.exploration_rate:
                    chosen_M[m] = self.draw.choice(np.flatnonzero(open_n))
            return chosen_M, state

        def _sample_action(self, learning_starts, action_noise=None, n_envs=1):  # noqa: ANN001, ANN202
            early = self.num_timesteps < learning_starts
            rate, self.exploration_rate = self.exploration_rate, 1.0 if early else self.exploration_rate
            chosen_M, _ = self.predict(self._last_obs)
            self.exploration_rate = rate
            return chosen_M, chosen_M

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            while env.ended and self.told < episodes:
                told({"round": self.told, "exploration": self.model.exploration_rate, **env.ended.pop(0)})
                self.told += 1
            return self.told < episodes

        told = 0

    env = WalkVecEnv(world, min(side_by_side, episodes), derive_seed(seed, "agent's walks"))
    for walk in known:
        env.walking.remember(walk)
    steps = episodes * world.rules.max_hops
    torch.manual_seed(derive_seed(seed, "agent") % 2**63)
    model = OpenDQN(
        OpenPolicy,
        env,
        learning_rate=1e-3,
        buffer_size=50_000,
        learning_starts=5 * world.rules.max_hops,
        batch_size=128,
        gamma=GAMMA,
        n_steps=3,
        train_freq=1,
        gradient_steps=env.num_envs,
        target_update_interval=max(1, 200 // env.num_envs),
        exploration_fraction=0.4,
        exploration_final_eps=0.05,
        replay_buffer_kwargs={"handle_timeout_termination": False},  # an observation tells how many hops are left
        seed=derive_seed(seed, "agent") % 2**31,
        device="cpu",
    )
    model.draw = np.random.default_rng(derive_seed(seed, "exploration"))
    model.learn(steps, callback=Watch(), log_interval=None)
    return Agent(model.q_net.q_net.cpu(), world.rules)
