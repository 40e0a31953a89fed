"""``cascade``: the exact influence of every sample through the whole decentralized run.

Reverse-mode differentiation of the entire training, mixing matrices included. With w_i the weight of
sample i in its batch, x_k the rows, m_k the momentum:

    lambda = dF/dX^T,  nu = 0
    for t = T-1 .. 0:
        mu    = W_t' lambda
        rho   = nu - lr_t mu
        dF/dw_i += <rho_k, grad loss_i(x_k^t)> / B_kt        for i in the batch of worker k at t
        lambda <- mu + H_k^t rho + wd rho
        nu    <- beta rho

The closest published method is MAGIC (Ilyas and Engstrom 2025) for one centralized model. Exact as a
derivative where training is differentiable: momentum, weight decay, schedules, time-varying graphs,
local steps, augmentation and BatchNorm (its running statistics carry an adjoint of their own) included.
ReLU, max-pooling and large steps make the map from weights to models rough, so that a derivative
predicts removal less well: the audit measures how well. With early stopping the recorded number of
steps is differentiated, not the decision to stop.

Legend: N workers, P trainable floats, D floats a row, n samples, T local steps.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from utils.influence.method import Method
from utils.influence.recursion import Adjoint, step_back
from utils.influence.targets import objective
from utils.influence.trajectory import Trajectory
from utils.progress import Progress, ignored

MASKED = 0.05  # a mask whose foretold effect is held against the loss itself
STEP_BACK = 3  # what a step back costs, in steps of the training; each is replayed once as well (ticks of the bar)


def cascade(trajectory: Trajectory, target: str = "nodes", progress: Progress = ignored) -> Tensor:
    """Scores [n], float64: -dF/dw_i over the whole run; positive = the sample lowers the validation
    loss. Zero for samples outside training. ``progress`` gets :func:`ticks` in all."""
    value, gradient_ND = objective(trajectory, trajectory.final(), target)
    adjoint = Adjoint.of_rows(gradient_ND, trajectory.P)
    scores_n = torch.zeros(len(trajectory.worker_of_n), dtype=torch.float64, device=gradient_ND.device)
    for t, rows_ND in trajectory.backwards(progress=progress):
        adjoint, back = step_back(trajectory, t, rows_ND, adjoint)
        accumulate(scores_n, back.ids_NB, back.products_NB)
        progress(STEP_BACK)
    told = torch.cat([scores_n, value.detach().double().reshape(1)]).cpu()  # the device is waited for once
    scores_n, value = -told[:-1], told[-1].item()
    warn_where_impossible(scores_n, value)
    return scores_n


def warn_where_impossible(scores_n: Tensor, value: float) -> None:
    """A loss above 0 falls by no more than itself: where a random mask would typically have it do so, sensitivities
    grew exponentially through a chaotic training (ResNet18 with BatchNorm: 4 million times the loss; docs/trust.md)."""
    typical = (MASKED * (1 - MASKED)) ** 0.5 * scores_n.norm().item()  # deviation, each sample off with that chance
    if value > 0 and not typical <= value:
        warnings.warn(
            f"'cascade' says that switching off a random {MASKED:.0%} of the samples moves the validation loss of "
            f"{value:.2g} by some {typical:.2g}: so rough a training has no derivative that foretells its retraining. "
            "Take a smaller --lr, fewer --epochs, or a smooth --model: cnn_smooth_stem, mlp_smooth (docs/trust.md)",
            stacklevel=2,
        )


def ticks(trajectory: Trajectory) -> int:
    """How far ``progress`` counts."""
    return (1 + STEP_BACK) * trajectory.num_steps


def accumulate(scores_n: Tensor, ids_NB: Tensor, products_NB: Tensor) -> None:
    """Add the products to their samples' scores; ids of -1 are padding, which adds nothing to sample 0."""
    products_NB = products_NB.to(scores_n.dtype).masked_fill(ids_NB < 0, 0.0)
    scores_n.index_add_(0, ids_NB.clamp(min=0).flatten(), products_NB.flatten())


METHOD = Method(lambda run, options, progress: cascade(run, options.target, progress), ("target",),
                lambda run, options: ticks(run))  # fmt: skip
