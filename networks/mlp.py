"""Multi-layer perceptrons: 64-64-10 on the digits, the smallest network of the benchmarks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn


def mlp(
    num_classes: int,
    input_shape: tuple[int, ...],
    hidden: Sequence[int] = (64,),
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Flatten, then linear layers of widths ``hidden`` with an activation after each, then the head."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise([math.prod(input_shape), *hidden]):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    width = hidden[-1] if hidden else math.prod(input_shape)
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def mlp_smooth(num_classes: int, input_shape: tuple[int, ...], hidden: Sequence[int] = (64,)) -> nn.Sequential:
    """:func:`mlp` with tanh: smooth in its parameters, as influence functions assume."""
    return mlp(num_classes, input_shape, hidden, activation=nn.Tanh)


class Residual(nn.Module):
    """x + (W relu(x) + b) / sqrt(depth), [B, width] to [B, width]: so neither the size of x nor what a step of SGD
    changes of it grows with the depth (Yang et al. 2023, Tensor Programs VI)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.linear, self.scale = nn.Linear(width, width), depth**-0.5

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs [B, width]."""
        return inputs + self.scale * self.linear(inputs.relu())


def mlp_deep(num_classes: int, input_shape: tuple[int, ...], layers: int = 1000, width: int = 64) -> nn.Sequential:
    """A residual MLP of so many linear layers: too deep for one node, and what ``--stages`` is for."""
    inside = [Residual(width, layers) for _ in range(layers - 2)]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(input_shape), width), *inside, nn.Linear(width, num_classes)
    )


mlp_deep.takes = mlp_smooth.takes = "anything"
