"""``delete``: first-order deletion, summed over training.

score_i = (q_j / n_j) sum_c S_c lr_c <grad L(x_j^c or the consensus; V), grad loss_i(x_j^c)> over the
checkpoints c; j the worker that holds i, n_j its shard, S_c the steps that checkpoint c stands for (a
step visits i with probability B / n_j and then counts it 1 / B). The family of TracIn (Pruthi et al.,
NeurIPS 2020); local in time and in space: it knows neither curvature nor neighbours.

Legend: N workers, P trainable floats, n samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.influence.dice import shares
from utils.influence.method import Method
from utils.influence.targets import node_weights
from utils.influence.trajectory import Trajectory
from utils.progress import Progress, ignored


def delete(
    trajectory: Trajectory,
    checkpoints: int = 10,
    target: str = "nodes",
    progress: Progress = ignored,
) -> Tensor:
    """Scores [n], float64. The validation gradient is taken once a checkpoint, at the consensus model, which stands
    for the nodes (``target`` 'worker:K': at worker K's)."""
    steps = trajectory.checkpoints(checkpoints)
    stands_for = trajectory.num_steps / len(steps)
    q_N = node_weights(trajectory.num_workers, target)
    worker_n = trajectory.worker_of_n.cpu()
    weight_n = shares(trajectory, stands_for) / trajectory.num_workers
    scores_n = torch.zeros(len(worker_n), dtype=torch.float64)
    for t, rows_ND in trajectory.forwards(steps):
        model_1D = (q_N.to(rows_ND)[:, None] * rows_ND).sum(0, keepdim=True)
        _, gradient_1D = trajectory.validation_gradient(model_1D)
        direction_NP = gradient_1D[:, : trajectory.P].expand(len(rows_ND), -1)
        products_n = trajectory.sample_products(rows_ND, direction_NP).double().cpu()
        scores_n += trajectory.step(t).lr * products_n * weight_n
        progress(1)
    return scores_n


METHOD = Method(
    lambda run, options, progress: delete(run, options.delete_checkpoints, options.target, progress),
    ("target", "delete_checkpoints"),
    lambda run, options: len(run.checkpoints(options.delete_checkpoints)),
)
