"""SqueezeNet 1.1 (Iandola et al., 2016) from torchvision, with a linear head and a stem for small images.

Differences from torchvision:

- The classifier is a global average pool and a linear layer. Without the published ReLU on its output
  (which would make the smallest logit zero, and its gradient too) this is the 1x1 convolution and pool of
  the paper with the two exchanged; and the head is linear, as influence methods want it.
- No dropout: a run is a pure function of (config, seed, step), and dropout's masks come from a hidden
  generator, so that a resumed or replayed run would see others.
- Up to 64 pixels the stem has stride 1 and keeps the border (the three max-pools stay: 32 pixels end as a
  4 x 4 map). It is a 3x3 convolution in each case: pretrained weights fit.
- ReLU is not in place: each follows a convolution directly, and a hook on the convolution would see an
  output that was overwritten.
"""

from __future__ import annotations

from torch import nn


def squeezenet(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """SqueezeNet 1.1: 0.73 million parameters with 10 classes."""
    from utils.torchvision_shim import torchvision  # takes seconds: only where it is needed

    channels, *size = image_shape
    model = torchvision.models.squeezenet1_1(num_classes=num_classes)
    stride, padding = (1, 1) if max(size) <= 64 else (2, 0)
    model.features[0] = nn.Conv2d(channels, 64, kernel_size=3, stride=stride, padding=padding)
    nn.init.kaiming_uniform_(model.features[0].weight)  # this and the two below as torchvision does
    nn.init.zeros_(model.features[0].bias)

    head = nn.Linear(512, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    model.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    model.blocks = ("features", "classifier")
    return model
