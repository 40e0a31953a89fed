"""DenseNet-121 (Huang et al., CVPR 2017) from torchvision, with a stem for small images: as for ResNet, up to 32
pixels a 3x3 convolution of stride 1 without max-pool, up to 64 pixels with it, above torchvision's."""

from __future__ import annotations

from torch import nn


def densenet121(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """DenseNet-121: 7.0 million parameters."""
    from utils.torchvision_shim import torchvision  # takes seconds: only where it is needed

    channels, *size = image_shape
    model = torchvision.models.densenet121(num_classes=num_classes)
    kernel, stride = (3, 1) if max(size) <= 64 else (7, 2)
    model.features.conv0 = nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)  # as torchvision does
    if max(size) <= 32:
        model.features.pool0 = nn.Identity()
    return model
