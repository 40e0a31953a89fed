"""The backward recursion that ``cascade`` and ``dice`` share: the transposed derivative of one step.

Reverse-mode differentiation of "adapt, then combine" with momentum (specified in the module
documentation of :mod:`utils.influence.cascade`). With lambda the adjoint of the rows after the step and
nu that of the momentum:

    mu    = W' lambda                     (the gossip step, transposed; parameters and statistics)
    rho   = nu - lr mu                    (adjoint of the momentum after its update)
    lambda <- mu + H rho + wd rho,  nu <- beta rho

Legend: N workers, P trainable floats, D floats a row, S = D - P statistics, B batch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from scipy import sparse
from torch import Tensor

from utils.devices import send
from utils.influence.trajectory import StepAdjoint, Trajectory

# Of PyTorch's sparse tensors, whose matrices here are valid by construction.
warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)", UserWarning)


@dataclass
class Adjoint:
    """Adjoints of the rows [N, D] and of the momentum [N, P] at one instant of the run."""

    rows_ND: Tensor
    momentum_NP: Tensor

    @classmethod
    def of_rows(cls, gradient_ND: Tensor, P: int) -> Adjoint:
        """An adjoint that starts from the gradient of an objective of the rows."""
        return cls(gradient_ND.clone(), torch.zeros_like(gradient_ND[:, :P]))


def transpose_mix(matrix: sparse.csr_array | None, adjoint_ND: Tensor) -> Tensor:
    """W' times the adjoint; the adjoint itself where nothing was mixed."""
    if matrix is None:
        return adjoint_ND
    device, dtype = adjoint_ND.device, adjoint_ND.dtype
    if matrix.shape[0] <= 64:
        return send(torch.as_tensor(matrix.T.toarray(), dtype=dtype), device) @ adjoint_ND
    transposed = matrix.T.tocsr()
    parts = transposed.indptr, transposed.indices, transposed.data.astype(str(dtype).removeprefix("torch."))
    return torch.sparse_csr_tensor(*(send(torch.from_numpy(p), device) for p in parts), transposed.shape) @ adjoint_ND


def momentum_adjoint(trajectory: Trajectory, t: int, adjoint: Adjoint) -> tuple[Adjoint, Tensor]:
    """The first half of a step back: through the gossip step to (mu, nu), and rho [N, P], zero for
    workers that did not train."""
    step, P = trajectory.step(t), trajectory.P
    mu_ND = transpose_mix(step.mixing, adjoint.rows_ND)
    nu_NP = transpose_mix(step.mixing, adjoint.momentum_NP) if step.mix_momentum else adjoint.momentum_NP
    rho_NP = torch.sub(nu_NP, mu_ND[:, :P], alpha=step.lr)
    if step.active is not None:
        idle_N = torch.ones(len(rho_NP), dtype=torch.bool, device=rho_NP.device)
        idle_N[list(step.active)] = False
        rho_NP.masked_fill_(idle_N[:, None], 0.0)
    return Adjoint(mu_ND, nu_NP), rho_NP


def step_back(trajectory: Trajectory, t: int, rows_ND: Tensor, adjoint: Adjoint) -> tuple[Adjoint, StepAdjoint]:
    """From the adjoints after step t to those before it (``rows_ND``: the rows before it).

    ``adjoint`` is used up: a large fleet's row is tens of megabytes, and fresh memory costs more than the
    arithmetic on it."""
    step, P = trajectory.step(t), trajectory.P
    mixed, rho_NP = momentum_adjoint(trajectory, t, adjoint)
    back = trajectory.step_adjoint(t, rows_ND, rho_NP, mixed.rows_ND[:, P:])
    lambda_ND = mixed.rows_ND
    lambda_ND[:, :P].add_(back.rows_ND[:, :P]).add_(rho_NP, alpha=trajectory.weight_decay)
    lambda_ND[:, P:] = back.rows_ND[:, P:]
    nu_NP = rho_NP.mul_(trajectory.momentum)
    if step.active is not None:  # who did not train kept its momentum
        idle = [k for k in range(len(nu_NP)) if k not in set(step.active)]
        nu_NP[idle] = mixed.momentum_NP[idle]
    if step.reset:
        nu_NP[list(step.reset)] = 0.0
    return Adjoint(lambda_ND, nu_NP), back
