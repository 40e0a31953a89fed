"""ResNet-18, -34 and -50 (He et al., CVPR 2016) from torchvision, with a stem for small images.

torchvision's stem (7x7 stride 2, max-pool) shrinks an image fourfold before the first block, which leaves
8 x 8 of a CIFAR image. As usual for such images:

- up to 32 pixels: 3x3 convolution of stride 1, no max-pool;
- up to 64 pixels: 3x3 convolution of stride 1, then the max-pool, so that the blocks see 32 x 32 and a
  step costs what it costs on CIFAR;
- above: torchvision's stem.
"""

from __future__ import annotations

from torch import nn


def _resnet(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    from utils.torchvision_shim import torchvision  # takes seconds: only where it is needed

    channels, *size = image_shape
    model = getattr(torchvision.models, name)(num_classes=num_classes)
    kernel, stride = (3, 1) if max(size) <= 64 else (7, 2)
    model.conv1 = nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    if max(size) <= 32:
        model.maxpool = nn.Identity()
    model.flatten = nn.Flatten()  # as forward() does
    layers = ("layer1", "layer2", "layer3", "layer4")
    model.blocks = ("conv1", "bn1", "relu", "maxpool", *layers, "avgpool", "flatten", "fc")
    return model


def resnet18(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-18: 11.2 million parameters."""
    return _resnet("resnet18", num_classes, image_shape)


def resnet34(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-34: 21.3 million parameters."""
    return _resnet("resnet34", num_classes, image_shape)


def resnet50(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """ResNet-50: 23.5 million parameters."""
    return _resnet("resnet50", num_classes, image_shape)
