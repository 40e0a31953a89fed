"""The backward recursion that ``cascade`` and ``dice`` share: the transposed derivative of one step.

Reverse-mode differentiation of a local step with momentum and of the lines of its round (:mod:`utils.linear`). With
lambda the adjoint of the rows after the step and nu that of the momentum, for "adapt, then combine":

    mu    = W' lambda                     (the gossip step, transposed; parameters and statistics)
    rho   = nu - lr mu                    (adjoint of the gradient; Nesterov: nu - lr (1 + beta) mu)
    lambda <- mu + H rho + wd rho,  nu <- beta rho        (Nesterov: nu <- beta (rho + lr mu))

Other lines at the end of a round give other mu and nu, and adjoints of the protocol's own matrices; what was added to
all gradients of a round (drift) has the sum of its rho as adjoint.

Legend: N workers, P trainable floats, D floats a row, S = D - P statistics, B batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from utils.devices import send
from utils.influence.trajectory import Step, StepAdjoint, Trajectory
from utils.linear import KEPT, Line, transposed

# Of PyTorch's sparse tensors, whose matrices here are valid by construction.
warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)", UserWarning)


@dataclass
class Adjoint:
    """Adjoints of the rows [N, D], of the momentum [N, P] and of a protocol's other matrices [., P] at one instant of
    the run."""

    rows_ND: Tensor
    momentum_NP: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)

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


def times(line: Line, source: str, adjoint: Tensor) -> Tensor:
    """The product of an adjoint with the transposed coefficient that a line has for a source."""
    coefficient = line.sources[source]
    if isinstance(coefficient, sparse.csr_array):
        return transpose_mix(coefficient, adjoint)
    if isinstance(coefficient, np.ndarray):
        return send(torch.as_tensor(coefficient, dtype=adjoint.dtype), adjoint.device)[:, None] * adjoint
    return coefficient * adjoint


def round_end_adjoint(step: Step, adjoint: Adjoint, P: int, product: Callable = times) -> Adjoint:
    """Through what follows the last local step of a round, to mu and nu; ``adjoint`` stays as it is."""
    if not step.last:
        return adjoint
    around = step.round
    if around.end is None and not around.mix_momentum and product is times:  # parameters and statistics at once
        return Adjoint(transpose_mix(around.mixing, adjoint.rows_ND), adjoint.momentum_NP, adjoint.others)
    named = {"rows": adjoint.rows_ND[:, :P], "momentum": adjoint.momentum_NP, **adjoint.others}
    before = transposed(around.lines, named, product)
    rows_ND = transpose_mix(around.mixing, adjoint.rows_ND) if P < adjoint.rows_ND.shape[1] else None
    mu_NP, nu_NP = (before.pop(name, None) for name in ("rows", "momentum"))
    mu_NP = torch.zeros_like(named["rows"]) if mu_NP is None else mu_NP
    nu_NP = torch.zeros_like(named["momentum"]) if nu_NP is None else nu_NP
    if rows_ND is None:
        rows_ND = mu_NP
    else:
        rows_ND = rows_ND.clone() if rows_ND is adjoint.rows_ND else rows_ND
        rows_ND[:, :P] = mu_NP
    return Adjoint(rows_ND, nu_NP, before)


def momentum_adjoint(trajectory: Trajectory, t: int, adjoint: Adjoint) -> tuple[Adjoint, Tensor]:
    """The first half of a step back: through the end of the round to (mu, nu), and rho [N, P], zero for
    workers that did not train."""
    step, P = trajectory.step(t), trajectory.P
    mixed = round_end_adjoint(step, adjoint, P)
    factor = step.lr * (1 + trajectory.momentum * trajectory.nesterov)
    rho_NP = torch.sub(mixed.momentum_NP, mixed.rows_ND[:, :P], alpha=factor)
    if step.active is not None:
        idle_N = torch.ones(len(rho_NP), dtype=torch.bool, device=rho_NP.device)
        idle_N[list(step.active)] = False
        rho_NP.masked_fill_(idle_N[:, None], 0.0)
    return mixed, rho_NP


def step_back(trajectory: Trajectory, t: int, rows_ND: Tensor, adjoint: Adjoint) -> tuple[Adjoint, StepAdjoint]:
    """From the adjoints after step t to those before it (``rows_ND``: the rows before it).

    ``adjoint`` is used up: a large fleet's row is tens of megabytes, and fresh memory costs more than the
    arithmetic on it."""
    step, P = trajectory.step(t), trajectory.P
    mixed, rho_NP = momentum_adjoint(trajectory, t, adjoint)
    back = trajectory.step_adjoint(t, rows_ND, rho_NP, mixed.rows_ND[:, P:])
    lambda_ND, others = mixed.rows_ND, dict(mixed.others)
    if step.round.drifts:
        others["drift"] = others["drift"] + rho_NP if "drift" in others else rho_NP.clone()
    nu_NP = rho_NP
    if trajectory.nesterov:  # of the momentum after its update
        nu_NP = torch.sub(mixed.momentum_NP, lambda_ND[:, :P], alpha=step.lr * trajectory.momentum)
    lambda_ND[:, :P].add_(back.rows_ND[:, :P]).add_(rho_NP, alpha=trajectory.weight_decay)
    lambda_ND[:, P:] = back.rows_ND[:, P:]
    nu_NP.mul_(trajectory.momentum)
    if step.active is not None:  # who did not train kept its momentum
        idle = [k for k in range(len(nu_NP)) if k not in set(step.active)]
        nu_NP[idle] = mixed.momentum_NP[idle]
    if step.reset:
        nu_NP[list(step.reset)] = 0.0
    before = Adjoint(lambda_ND, nu_NP, others)
    return (_round_begin_adjoint(step, before, P) if step.first else before), back


def _round_begin_adjoint(step: Step, adjoint: Adjoint, P: int) -> Adjoint:
    """Through what precedes the first local step of a round: what was kept from its start, and its drift."""
    if not adjoint.others:  # nothing was kept, and nothing is asked of what a protocol holds
        return adjoint
    rows_NP = adjoint.rows_ND[:, :P]
    named = {"rows": rows_NP, "momentum": adjoint.momentum_NP, **adjoint.others}
    for name, of in KEPT.items():
        if name in named:
            named[of] = named[of] + named.pop(name)
    named = transposed(step.round.begin, named, times)
    if named["rows"] is not rows_NP:
        rows_NP.copy_(named["rows"])
    momentum_NP = named["momentum"]
    return Adjoint(adjoint.rows_ND, momentum_NP, {n: a for n, a in named.items() if n not in ("rows", "momentum")})
