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
from safetensors.torch import save_file
from torch import Tensor, nn

from homogeneous.world import Walking, World
from utils.errors import UsageError
from utils.random import derive_seed

HIDDEN = (128, 128)
CLOSED = -1e6  # the value of a node without a link


class Agent:
    """Weights and biases of the value network, layer by layer; a policy (:mod:`homogeneous.policies`)."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], nodes: int):
        self.layers, self.nodes = list(layers), nodes

    def values(self, seen_MF: Tensor) -> Tensor:
        """The value of each node [M, N]; a node without a link is worth nothing."""
        x = seen_MF
        for i, (weight, bias) in enumerate(self.layers):
            x = nn.functional.linear(x if i == 0 else x.relu(), weight, bias)
        return x.masked_fill(seen_MF[:, self.nodes : 2 * self.nodes] < 0.5, CLOSED)

    def __call__(self, walking: Walking, walks: Sequence[int]) -> list[int]:
        """The node of the greatest value."""
        if self.nodes != walking.N or self.layers[0][0].shape[1] != walking.features:
            raise UsageError(
                f"the agent knows {self.nodes} nodes and {self.layers[0][0].shape[1]} features of a walk; here there are "
                f"{walking.N} and {walking.features}."
            )
        return self.values(torch.from_numpy(walking.observations()[list(walks)])).argmax(1).tolist()

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write it. ``about``: JSON-able, what it has learned from."""
        tensors = {f"{kind}_{i}": t.contiguous() for i, pair in enumerate(self.layers)
                   for kind, t in zip(("weight", "bias"), pair, strict=True)}  # fmt: skip
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, {"agent": json.dumps({"nodes": self.nodes, **about}, sort_keys=True)})
        temporary.replace(path)


def load_agent(path: Path) -> Agent:
    """Read one back. Raises :class:`UsageError` where the file is none."""
    try:
        with safe_open(str(path), "pt") as file:
            nodes = int(json.loads(file.metadata()["agent"])["nodes"])
            layers = [(file.get_tensor(f"weight_{i}"), file.get_tensor(f"bias_{i}")) for i in range(len(file.keys()) // 2)]
        widths = [layers[0][0].shape[1], *(weight.shape[0] for weight, _ in layers)]
        fits = all(weight.shape == (b, a) and bias.shape == (b,)
                   for (weight, bias), a, b in zip(layers, widths, widths[1:], strict=False))  # fmt: skip
        if not fits or widths[-1] != nodes:
            raise ValueError("its layers do not fit")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UsageError(f"{path} is no agent ({error}).") from error
    return Agent(layers, nodes)


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

    N = world.config.num_workers

    class OpenNetwork(QNetwork):
        def forward(self, obs: Tensor) -> Tensor:
            return super().forward(obs).masked_fill(obs[:, N : 2 * N] < 0.5, CLOSED)

    class OpenPolicy(DQNPolicy):
        def make_q_net(self) -> QNetwork:
            return OpenNetwork(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)

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
        for hops, values in enumerate(walk["measured"]):
            measured = tuple(float("nan") if value is None else value for value in values)
            env.walking.known[(walk["seed"], *walk["nodes"][:hops])] = measured
    steps = episodes * world.config.max_hops
    torch.manual_seed(derive_seed(seed, "agent") % 2**63)
    model = OpenDQN(
        OpenPolicy, env, learning_rate=1e-3, buffer_size=50_000, learning_starts=5 * world.config.max_hops, batch_size=128,
        gamma=GAMMA, train_freq=1, gradient_steps=env.num_envs, target_update_interval=max(1, 300 // env.num_envs),
        exploration_fraction=0.5, exploration_final_eps=0.05, policy_kwargs={"net_arch": list(HIDDEN)},
        replay_buffer_kwargs={"handle_timeout_termination": False}, seed=derive_seed(seed, "agent") % 2**31, device="cpu",
    )  # fmt: skip
    model.draw = np.random.default_rng(derive_seed(seed, "exploration"))
    model.learn(steps, callback=Watch(), log_interval=None)
    linear = [layer for layer in model.q_net.q_net if isinstance(layer, nn.Linear)]
    return Agent([(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in linear], N)
