"""What a local step does with a gradient: one fused kernel over the rows of a chunk.

What an optimizer remembers of a worker is a row as well: S floats, which are mixed, reset, kept and sent as one.

Legend: R rows, n workers of a chunk, P trainable floats, S floats of a row of the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.engine import Engine
from workers.row_layout import Entry, RowLayout


class Optimizer(Protocol):
    """A kind of local step. ``moments``: matrices [R, P] that it remembers. ``counts``: whether it knows how many
    steps each row has made."""

    moments: int
    counts: bool

    def update(
        self, parameters: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], steps: list[Tensor],
        lr: float | Tensor,
    ) -> None:
        """Change the parameters and moments in place. Tensors of a place in these lists belong together, and lie in
        memory alike; ``steps``: float32, this step counted."""


@dataclass(frozen=True)
class SGD:
    """m <- beta m + grad + wd x; x <- x - lr m. ``nesterov``: x <- x - lr (grad + wd x + beta m)."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    moments = 1
    counts = False

    def update(
        self, parameters: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], steps: list[Tensor],
        lr: float | Tensor,
    ) -> None:
        """See :class:`Optimizer`."""
        torch._fused_sgd_(
            parameters, gradients, moments[0] if self.momentum else [], weight_decay=self.weight_decay,
            momentum=self.momentum, lr=lr, dampening=0.0, nesterov=self.nesterov, maximize=False, is_first_step=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Adam:
    """Kingma and Ba 2015 (arXiv 1412.6980); ``decoupled``: AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), whose
    weight decay, x <- (1 - lr wd) x, is no part of the gradient. ``momentum``: their beta1."""

    momentum: float = 0.9
    weight_decay: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    decoupled: bool = False
    moments = 2
    counts = True

    def update(
        self, parameters: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], steps: list[Tensor],
        lr: float | Tensor,
    ) -> None:
        """See :class:`Optimizer`."""
        kernel = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        kernel(
            parameters, gradients, moments[0], moments[1], [], steps, lr=lr, beta1=self.momentum, beta2=self.beta2,
            weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip


def sgd(momentum: float, weight_decay: float) -> SGD:
    """``--optimizer sgd``."""
    return SGD(momentum, weight_decay)


def nesterov(momentum: float, weight_decay: float) -> SGD:
    """``--optimizer nesterov``: its accelerated gradient, as PyTorch has it (Sutskever et al. 2013)."""
    return SGD(momentum, weight_decay, nesterov=momentum > 0)


def adam(**settings: Any) -> Adam:
    """``--optimizer adam``: weight decay is part of the gradient, as in PyTorch."""
    return Adam(**settings)


def adamw(**settings: Any) -> Adam:
    """``--optimizer adamw``."""
    return Adam(**settings, decoupled=True)


def state_size(optimizer: Optimizer, layout: RowLayout) -> int:
    """S: the moments, and where steps are counted a last part (as wide as rows are aligned) that begins with how
    many they are."""
    return optimizer.moments * layout.P + optimizer.counts * layout.align


def canonical_state(optimizer: Optimizer, layout: RowLayout, state_RS: Tensor) -> Tensor:
    """The state as files hold it: every moment as :meth:`RowLayout.canonical` has it, then the steps."""
    moments, steps_R1 = moments_of(optimizer, layout.P, state_RS)
    parts = [layout.canonical(moment_RP) for moment_RP in moments]
    return parts[0] if len(parts) == 1 else torch.cat([*parts, steps_R1], 1)


def state_from_canonical(optimizer: Optimizer, layout: RowLayout, stored_R: Tensor) -> Tensor:
    """The inverse."""
    moments, steps_R1 = moments_of(optimizer, layout.num_parameters, stored_R)
    parts = [layout.from_canonical(moment_RP) for moment_RP in moments]
    rest = stored_R.new_zeros(len(stored_R), layout.align - 1)
    return parts[0] if len(parts) == 1 else torch.cat([*parts, steps_R1, rest], 1)


def moments_of(optimizer: Optimizer, width: int, state: Tensor) -> tuple[list[Tensor], Tensor]:
    """The moments, and the number of steps [R, 1] or [R, 0]."""
    if optimizer.moments == 1 and not optimizer.counts:  # SGD, many times a second
        return [state], state[:, :0]
    end = optimizer.moments * width
    return list(state[:, :end].split(width, 1)), state[:, end : end + optimizer.counts]


@torch.no_grad()
def descend(
    engine: Engine, optimizer: Optimizer, leaves: list[Tensor], gradients: Sequence[Tensor], rows_nD: Tensor,
    state_nS: Tensor, lr: float | Tensor, entries: Sequence[Entry] | None = None, drift_nP: Tensor | None = None,
) -> None:
    """A local step of a chunk. ``leaves``, ``gradients``: as :meth:`Engine.leaves` has them. ``entries``: what they are
    of the row (default: all of it; a part is for chunks of one worker). ``drift_nP``: added to the gradients. The
    kernels walk raw memory, so whatever they get must lie in memory alike."""
    layout = engine.layout
    moments, steps_n1 = moments_of(optimizer, layout.P, state_nS)
    if optimizer.counts:
        steps_n1 += 1
    if not engine.batched:
        parameters = [leaf.detach() for leaf in leaves]
        like = zip(gradients, parameters, strict=True)
        lying = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for g, p in like]
        if drift_nP is not None:
            lying = torch._foreach_add(lying, engine.views(layout.parameters, drift_nP))
        steps = [steps_n1[0, 0].float()] * len(parameters) if optimizer.counts else []
        optimizer.update(parameters, lying, [engine.views(entries or layout.parameters, m) for m in moments], steps, lr)
        return
    gradient_nP = layout.unfilled(moments[0])
    for entry, gradient in zip(layout.parameters, gradients, strict=True):
        entry.view(gradient_nP).copy_(gradient)
    if drift_nP is not None:
        gradient_nP += drift_nP
    parameters_nP = rows_nD[:, : layout.P]
    whole = [parameters_nP, gradient_nP, *moments]
    if not optimizer.counts and all(matrix.is_contiguous() for matrix in whole):
        optimizer.update([parameters_nP], [gradient_nP], [[m] for m in moments], [], lr)
        return
    # Statistics lie between the rows' parameters, or rows have made different numbers of steps: a row at a time.
    steps = [step.float() for step in steps_n1[:, 0]] if optimizer.counts else []
    optimizer.update(list(parameters_nP), list(gradient_nP), [list(m) for m in moments], steps, lr)
