"""What a score is about: the validation objective F, its value and its gradient with respect to all rows.

Legend: N workers, D floats a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.devices import send
from utils.influence.trajectory import Trajectory


def node_weights(num_workers: int, target: str) -> Tensor:
    """q_N: 1/N each, or all on worker K for ``worker:K``."""
    if target.startswith("worker:"):
        return torch.nn.functional.one_hot(torch.tensor(int(target[7:])), num_workers).double()
    return torch.full((num_workers,), 1.0 / num_workers, dtype=torch.float64)


def objective(trajectory: Trajectory, rows_ND: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """F [] and its gradient [N, D] at these rows.

    nodes: F = sum_k q_k L(x_k); consensus: F = L(sum_k q_k x_k); worker:K: F = L(x_K).
    """
    q_N = node_weights(trajectory.num_workers, target).to(rows_ND.dtype)
    q_N = send(q_N, rows_ND.device)
    if target == "consensus":
        value_1, gradient_1D = trajectory.validation_gradient((q_N[:, None] * rows_ND).sum(0, keepdim=True))
        return value_1[0], q_N[:, None] * gradient_1D
    if target == "nodes":
        value_N, gradient_ND = trajectory.validation_gradient(rows_ND)
        return (q_N * value_N).sum(), gradient_ND.mul_(q_N[:, None])
    worker = int(target[7:])
    value_1, gradient_1D = trajectory.validation_gradient(rows_ND[worker : worker + 1])
    gradient_ND = torch.zeros_like(rows_ND)
    gradient_ND[worker] = gradient_1D[0]
    return value_1[0], gradient_ND
