"""A walk as a Gymnasium environment, and as many side by side for Stable-Baselines3.

An action is the next node. The reward of a hop is what it brought the metric nearer to the goal, less what it cost:

    r = 2 (gap before - gamma gap after) - (1 + w distance) / most hops - [the walk ends here and has not arrived]

The first part is potential-based shaping (Ng, Harada and Russell 1999) with the potential -2 gap, kept at the end of a
walk. Not arriving costs as much as all hops, which is how policies are compared (:mod:`homogeneous.evaluation`). An
episode is ``terminated`` at the goal and ``truncated`` at the last hop.

Legend: M walks, N nodes, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from homogeneous.world import LOSSES, Walking, World
from utils.random import derive_seed

GAMMA = 0.99
SHAPING = 2.0


def action_space(walking: Walking) -> spaces.Discrete:
    """The nodes."""
    return spaces.Discrete(walking.N)


def observation_space(walking: Walking) -> spaces.Box:
    """The table of :mod:`homogeneous.world`."""
    return spaces.Box(-LOSSES, LOSSES, (walking.features,), np.float32)


def move(walking: Walking, walks: Sequence[int], nodes: Sequence[int]) -> np.ndarray:
    """Go, and what it is worth: the rewards of these walks."""
    before = walking.distance_to_goal()[list(walks)]
    cost = walking.go(walks, nodes)
    after = walking.distance_to_goal()[list(walks)]
    lost = walking.over_M()[list(walks)] & ~walking.reached_M()[list(walks)]
    return SHAPING * (before - GAMMA * after) - cost / walking.rules.max_hops - lost


class WalkEnv(gymnasium.Env):
    """One walk. ``reset(seed=s)`` decides everything: the model's start, and the batches at every node."""

    metadata = {"render_modes": []}  # noqa: RUF012, Gymnasium's own declaration

    def __init__(self, world: World):
        self.walking = world.walks(1)
        self.action_space, self.observation_space = action_space(self.walking), observation_space(self.walking)
        self._episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """A new walk at node 0; without a seed the next one of the last seed's."""
        super().reset(seed=seed)
        if seed is not None:
            self._first, self._episode = seed, 0
        elif not hasattr(self, "_first"):
            self._first = int(self.np_random.integers(1 << 31))
        self.walking.start([0], [derive_seed(self._first, "walk", self._episode)])
        self._episode += 1
        return self.walking.observations()[0], self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """To a node. Raises :class:`UsageError` where there is no link to it."""
        reward = move(self.walking, [0], [int(action)])[0]
        reached = bool(self.walking.reached_M()[0])
        last = bool(self.walking.over_M()[0])
        return self.walking.observations()[0], float(reward), reached, last and not reached, self._info()

    def action_masks(self) -> np.ndarray:
        """Which nodes are open, bool [N]."""
        return self.walking.open_MN()[0]

    def _info(self) -> dict[str, Any]:
        return {"figure": self.walking.measured[0][-1][0], "cost": float(self.walking.cost_M[0])}


class WalkVecEnv(VecEnv):
    """M walks of one fleet, each begun anew as soon as it ends. Walk number e of a training has seed
    ``derive_seed(seed, 'walk', e)``, whichever row it runs in. ``ended``: the walks that have ended, in order."""

    def __init__(self, world: World, count: int, seed: int):
        self.walking = world.walks(count)
        self.render_mode = None
        self.returned_M = np.zeros(count)
        super().__init__(count, observation_space(self.walking), action_space(self.walking))
        self._seed, self._next = seed, 0
        self.ended: list[dict[str, Any]] = []

    def reset(self) -> np.ndarray:
        """All begin."""
        self._start(range(self.num_envs))
        return self.walking.observations()

    def _start(self, walks: Sequence[int]) -> None:
        seeds = [derive_seed(self._seed, "walk", self._next + i) for i in range(len(walks))]
        self._next += len(seeds)
        self.walking.start(walks, seeds)
        self.returned_M[list(walks)] = 0.0

    def step_async(self, actions: np.ndarray) -> None:
        """Remember where they go."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """All hop at once."""
        walking, everyone = self.walking, list(range(self.num_envs))
        rewards = move(walking, everyone, self._actions)
        self.returned_M += rewards
        over_M, infos = walking.over_M(), [{} for _ in everyone]
        if over_M.any():
            seen_MF, reached_M = walking.observations(), walking.reached_M()
            over = np.flatnonzero(over_M).tolist()
            for m in over:
                infos[m] = {"terminal_observation": seen_MF[m]}
                self.ended.append(
                    {
                        "seed": walking.seeds[m], "nodes": walking.nodes[m], "measured": walking.measured[m],
                        "cost": float(walking.cost_M[m]), "reached": bool(reached_M[m]),
                        "return": float(self.returned_M[m]),
                    }
                )  # fmt: skip
            self._start(over)
        return walking.observations(), rewards.astype(np.float32), over_M, infos

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The same of each."""
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Of all."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **named: Any) -> list[Any]:
        """There are no methods of a single one."""
        raise NotImplementedError(method_name)

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """None is."""
        return [False] * self.num_envs
