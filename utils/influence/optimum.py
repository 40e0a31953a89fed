"""How far a last linear layer is from the optimum that influence functions assume.

Legend: n training samples, F features, A = F + 1 with a bias, C outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FAR = 0.08  # from here on ``if`` foretold retraining badly (benchmarks.trust; docs/trust.md)


@torch.no_grad()
def gradient_ratio(head: nn.Linear, features_nF: Tensor, residuals_nC: Tensor, weight_decay: float = 0.0) -> float:
    """The norm of the gradient of the training objective in the layer, over the root mean square of the samples' own.

    0 at an optimum, where the samples' gradients cancel; 1 where all of them pull the same way. ``residuals_nC``: the
    derivatives of each sample's loss with respect to the outputs, so that its gradient is their outer product with
    its features (and a 1 for the bias)."""
    features_nF, residuals_nC = features_nF.double(), residuals_nC.double()
    weights, sizes_n = [head.weight], (features_nF**2).sum(1)
    mean = [residuals_nC.T @ features_nF / len(features_nF)]
    if head.bias is not None:
        weights, sizes_n = [*weights, head.bias], sizes_n + 1
        mean.append(residuals_nC.mean(0))
    pulls = [(g + weight_decay * w.double()).flatten() for g, w in zip(mean, weights, strict=True)]
    typical = ((residuals_nC**2).sum(1) * sizes_n).mean().sqrt()
    return torch.where(typical > 0, torch.cat(pulls).norm() / typical, 0.0).item()  # 0: every sample fits
