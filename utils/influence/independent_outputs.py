"""``if`` where outputs do not depend on each other: squared error and binary cross-entropy.

With a_i the inputs of the last linear layer (and a 1 for its bias), r_ic the derivative of sample i's loss with respect
to output c and h_ic the second derivative, the Gauss-Newton matrix of the mean training loss falls into one block an
output, and the influence function (Koh and Liang, ICML 2017) is exact in closed form:

    G_c = (1/n) sum_i h_ic a_i a_i',   V_c = mean over validation of r_c a
    score_i = (1/n) sum_c r_ic a_i' (G_c + delta I)^-1 V_c          positive = helpful

As for cross-entropy, delta is a tenth of the mean eigenvalue.

Legend: n training samples, v validation samples, F features, A = F + 1 with a bias, C outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DAMPING = 0.1


@torch.no_grad()
def independent_influence(
    head: nn.Linear,
    train_features_nF: Tensor,
    train_residuals_nC: Tensor,
    train_curvatures_nC: Tensor,
    val_features_vF: Tensor,
    val_residuals_vC: Tensor,
    *,
    regularization: float | None = None,
) -> Tensor:
    """Influence of each training sample on the mean validation loss through the last layer: [n], float64."""
    train_nA, val_vA = (_with_ones(f, head.bias is not None) for f in (train_features_nF, val_features_vF))
    residuals_nC, curvatures_nC = train_residuals_nC.double(), train_curvatures_nC.double()
    validation_CA = val_residuals_vC.double().T @ val_vA / len(val_vA)
    blocks = [(train_nA * h_n[:, None]).T @ train_nA / len(train_nA) for h_n in curvatures_nC.unbind(1)]
    mean_eigenvalue = sum(block.trace() for block in blocks).item() / (len(blocks) * train_nA.shape[1])
    delta = DAMPING * mean_eigenvalue if regularization is None else regularization
    eye_AA = torch.eye(train_nA.shape[1], dtype=torch.float64, device=train_nA.device)
    solved_CA = torch.stack(
        [torch.linalg.solve(block + delta * eye_AA, v_A) for block, v_A in zip(blocks, validation_CA, strict=True)]
    )
    return (residuals_nC * (train_nA @ solved_CA.T)).sum(1) / len(train_nA)


def _with_ones(features_mF: Tensor, bias: bool) -> Tensor:
    features_mF = features_mF.double()
    return torch.cat([features_mF, torch.ones_like(features_mF[:, :1])], 1) if bias else features_mF
