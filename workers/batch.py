"""What a chunk of workers trains on at one step, and what that asks of their parameters.

Legend: n workers of a chunk, B batch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from torch import Tensor


@dataclass
class Batch:
    """What one chunk trains on at one step: inputs [n, B, ...], targets [n, B, ...], weights [n, B]
    (0 on padding and on samples that are switched off), sizes [n] (samples, whatever their weight), ids [n, B].
    ``keys``: hashes [n] of (seed, worker, step), where the step adds noise."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    sizes: Tensor
    ids: Tensor
    keys: Tensor | None = None

    def cut(self, parts: int) -> list[Batch]:
        """At most ``parts`` parts, as even as can be, whose losses add up to that of the whole."""
        if parts == 1:
            return [self]
        pieces = zip(*(t.chunk(parts, 1) for t in (self.inputs, self.targets, self.weights, self.ids)), strict=True)
        return [
            Batch(inputs, targets, weights, self.sizes, ids, self.keys) for inputs, targets, weights, ids in pieces
        ]

    def mean(self, losses_nB: Tensor) -> Tensor:
        """Weighted mean loss [n]: sum of w_i loss_i over the batch size."""
        return (losses_nB * self.weights).sum(1) / self.sizes


class Gradients(NamedTuple):
    """A chunk's parameters as the engine's leaves, the gradient of each, and the losses [n]."""

    leaves: list[Tensor]
    gradients: Sequence[Tensor]
    loss_n: Tensor


def added(parts: list[Gradients]) -> Gradients:
    """The gradients and losses of the parts of a batch as those of the whole, added in the order of the parts."""
    if len(parts) == 1:
        return parts[0]
    gradients = [reduce(operator.add, same) for same in zip(*(p.gradients for p in parts), strict=True)]
    return Gradients(parts[0].leaves, gradients, reduce(operator.add, [p.loss_n for p in parts]))
