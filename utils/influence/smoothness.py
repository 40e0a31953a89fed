"""Metasmoothness: how straight the way is on which trained models move as weights of samples change.

A derivative predicts retraining where that way is nearly straight. Engstrom et al. 2025 (arXiv 2503.13751, definition
2) train at z, z + h v and z + 2 h v and ask whether consecutive finite differences of the parameters have the same
signs, each parameter weighted by how far it moved:

    S = sum_d |a_d| sign(a_d) sign(b_d) / sum_d |a_d|
    a = theta(z + h v) - theta(z),   b = theta(z + 2 h v) - theta(z + h v)

1: straight; 0: the second half of the way knows nothing of the first. Here z are the weights of the training samples,
v = -1 on a random group and h = 1/2: the group is switched off in two halves, which is the step that the audit takes.
The size of the step matters: gradients of a ReLU network jump where a unit switches, so that with smaller steps the
jumps, not the slope, decide (digits, MLP: 0.9 at the size of a group, 0.4 at a thousandth of it).

Legend: N workers, P trainable floats.
"""

from __future__ import annotations

from torch import Tensor


def metasmoothness(whole_NP: Tensor, half_NP: Tensor, without_NP: Tensor) -> float:
    """S in [-1, 1] of the final parameters of three trainings, the group at full weight, at half of it, and at none;
    NaN where the first step moved nothing, or a training diverged."""
    first_NP, second_NP = (half_NP - whole_NP).double(), (without_NP - half_NP).double()
    return float((first_NP * second_NP.sign()).sum() / first_NP.abs().sum())
