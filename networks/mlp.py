"""Multi-layer perceptrons: 64-64-10 on the digits, the smallest network of the benchmarks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import nn


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


mlp.takes = mlp_smooth.takes = "anything"
