"""The ripples of ``dice``: how much worker j's data helped worker k within r hops.

The DICE scores of worker j's samples, summed, and split by the node whose validation loss dropped. The
samples of a worker enter through the sum of their gradients alone, so the table costs one pass over the
data a scored step, and for r > 1 a recursion a receiver.

Legend: N workers, P trainable floats, r hops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.influence.dice import direction, scored_steps, states_from
from utils.influence.targets import objective
from utils.influence.trajectory import Trajectory
from utils.progress import Progress, ignored


def ripples(trajectory: Trajectory, hops: int = 1, rounds: int = 5, progress: Progress = ignored) -> Tensor:
    """The table [N, N], float64: row j, column k. Its sum over k is the sum of ``dice``'s scores (target
    'nodes') over worker j's samples. ``progress`` gets a tick a scored step."""
    N = trajectory.num_workers
    table_NN = torch.zeros(N, N, dtype=torch.float64)
    share_N = 1.0 / trajectory.shard_sizes_N.double()
    for t, stands_for in scored_steps(trajectory.num_steps, hops, rounds):
        states = states_from(trajectory, t, hops)
        gradients = [objective(trajectory, rows_ND, "nodes")[1] for rows_ND in states]
        data_NP = trajectory.shard_gradient(states[0])
        for k in range(N):
            only_k = [torch.zeros_like(g_ND) for g_ND in gradients]
            for masked_ND, g_ND in zip(only_k, gradients, strict=True):
                masked_ND[k] = g_ND[k]
            rho_NP = direction(trajectory, t, states, only_k)
            table_NN[:, k] -= (rho_NP * data_NP).sum(1).double().cpu() * share_N * stands_for
        progress(1)
    return table_NN
