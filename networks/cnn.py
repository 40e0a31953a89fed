"""Small convolutional networks: 282k and 57k parameters on 3 x 32 x 32 with 10 classes, and 34k on 28 x 28."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def cnn(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Two blocks of 3x3 convolution, 2x2 max-pooling and ReLU, then 64 hidden units and the head.

    (ReLU after max-pooling gives the same numbers as before it, to the bit, on a quarter of the floats: a step in
    channels_last takes 0.84 of the time.)"""
    channels, height, width = image_shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def cnn_smooth(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """:func:`cnn` with SiLU and average pooling: smooth in its parameters, as influence functions assume
    (with ReLU and max-pooling a small change of the weights can switch a unit, which no derivative sees). PyTorch's
    initialization lets signals shrink from layer to layer, and averages shrink them more; this one keeps them."""
    return smooth_variant(num_classes, image_shape)


def cnn_smooth_group(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """:func:`cnn_smooth` with GroupNorm in 8 groups before the activations of its convolutions: more accurate at the
    same rate, and as smooth (docs/trust.md)."""
    return smooth_variant(num_classes, image_shape, groups=8)


def cnn_smooth_direct(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Two 3x3 convolutions with GroupNorm, GELU and average pooling, as in :func:`cnn_smooth_group`, and the head
    straight on their normalized feature map (50k parameters on 28 x 28): its 3,136 inputs make small rates go far, and
    a model that moves little moves straight (docs/trust.md)."""
    return smooth_variant(num_classes, image_shape, activation=nn.GELU, groups=8, hidden=False)


def cnn_smooth_stem(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """:func:`cnn_smooth_direct` behind a convolution of 16 channels without pooling, so that features are seen at full
    size first: on Fashion-MNIST a point more accurate, and nearly as smooth (docs/trust.md)."""
    return smooth_variant(num_classes, image_shape, activation=nn.GELU, groups=8, hidden=False, stem=16)


def smooth_variant(
    num_classes: int,
    image_shape: tuple[int, int, int],
    activation: Callable[[], nn.Module] = nn.SiLU,
    pooling: Callable[[int], nn.Module] = nn.AvgPool2d,
    groups: int = 0,
    gain: float = 1.3,
    width: float = 1.0,
    hidden: bool = True,
    stem: int = 0,
) -> nn.Sequential:
    """:func:`cnn_smooth` with other parts: GroupNorm in ``groups`` groups before each activation of a convolution (0:
    none), normal weights of deviation ``gain`` / sqrt(inputs of a unit) and biases of zero (``gain`` 0: PyTorch's
    initialization), ``width`` times its channels and hidden units; without ``hidden`` units the feature map is
    normalized as well, and the head is on it; ``stem``: channels of a convolution before all, without pooling."""
    (into, *size), (first, second, units) = image_shape, (round(width * units) for units in (32, 64, 64))
    layers: list[nn.Module] = []
    for out in (stem, first, second) if stem else (first, second):
        norm = [nn.GroupNorm(groups, out)] if groups else []
        pool = [pooling(2)] if layers or not stem else []
        layers += [nn.Conv2d(into, out, kernel_size=3, padding=1), *norm, activation(), *pool]
        into = out
    left = second * (size[0] // 4) * (size[1] // 4)
    if hidden:
        layers += [nn.Flatten(), nn.Linear(left, units), activation(), nn.Linear(units, num_classes)]
    else:
        layers += [*([nn.GroupNorm(groups, second)] if groups else []), nn.Flatten(), nn.Linear(left, num_classes)]
    for layer in layers if gain else ():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            scale = 1.0 if layer is layers[-1] else gain  # no activation follows the head
            nn.init.normal_(layer.weight, std=scale / layer.weight[0].numel() ** 0.5)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def cnn_group(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Three 3x3 convolutions of 32, 64 and 64 channels, each followed by GroupNorm, ReLU and pooling (the last over the
    whole picture), and the head: 57k parameters. GroupNorm (Wu and He 2018) in 8 groups normalizes each sample on its
    own, so that nothing of a batch is kept beside the parameters: what is usual where shards differ."""
    layers: list[nn.Module] = []
    for into, out, pool in ((image_shape[0], 32, nn.MaxPool2d(2)), (32, 64, nn.MaxPool2d(2)),
                            (64, 64, nn.AdaptiveAvgPool2d(1))):  # fmt: skip
        layers += [nn.Conv2d(into, out, kernel_size=3, padding=1, bias=False), nn.GroupNorm(8, out), nn.ReLU(), pool]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, num_classes))


def cnn_20_50(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """5x5 convolutions of 20 and 50 channels, each followed by ReLU and 2x2 max-pooling, and the head: 33,580
    parameters on 1 x 28 x 28 with 10 classes, Glorot's initialization (Sun and Ochiai, arXiv 2110.05290). Pictures of
    less than 16 pixels a side, which those convolutions leave nothing of, are padded."""
    channels, height, width = image_shape
    margin = 2 if min(height, width) < 16 else 0
    rows, columns = (((side + 2 * margin - 4) // 2 + 2 * margin - 4) // 2 for side in (height, width))
    network = nn.Sequential(
        nn.Conv2d(channels, 20, kernel_size=5, padding=margin),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(20, 50, kernel_size=5, padding=margin),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(50 * rows * columns, num_classes),
    )
    for layer in network[0], network[3], network[-1]:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network
