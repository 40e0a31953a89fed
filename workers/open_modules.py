"""Networks whose derivatives can be taken: BatchNorm without hidden state, GroupNorm and recurrent cells of plain
operators, convolutions that know what has tangents."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from workers.row_layout import without_counters


class OpenBatchNorm(nn.Module):
    """BatchNorm whose running statistics are inputs and outputs instead of hidden state.

    Training: normalizes as usual, updates nothing, and leaves the batch's (mean, unbiased variance) in
    ``batch_statistics``. Evaluation: normalizes by the running statistics, differentiably (PyTorch's own
    kernel treats them as constants).
    """

    def __init__(self, original: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        self.weight, self.bias, self.eps = original.weight, original.bias, original.eps
        self.register_buffer("running_mean", original.running_mean)
        self.register_buffer("running_var", original.running_var)
        self.batch_statistics: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        if not self.training:
            mean, variance = self.running_mean, self.running_var
        else:  # from plain operations: the forward-mode rule of F.batch_norm takes its statistics for constants
            dims = [d for d in range(x.dim()) if d != 1]
            wide = x if x.dtype == torch.float64 else x.float()
            variance, mean = torch.var_mean(wide, dims, correction=0)
            count = x.numel() // x.shape[1]
            self.batch_statistics = (mean, variance * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)


class OpenConv2d(nn.Conv2d):
    """A convolution that knows when its input has no tangent, as images have none: PyTorch's rule would
    convolve zeros, and lose the memory layout over it."""

    def forward(self, x: Tensor) -> Tensor:
        weight, weight_tangent = forward_ad.unpack_dual(self.weight)
        if weight_tangent is None or forward_ad.unpack_dual(x).tangent is not None:
            return super().forward(x)
        bias, bias_tangent = (None, None) if self.bias is None else forward_ad.unpack_dual(self.bias)
        tangent = self._conv_forward(x, weight_tangent, bias_tangent)
        return forward_ad.make_dual(self._conv_forward(x, weight, bias), tangent)


class OpenGroupNorm(nn.GroupNorm):
    """GroupNorm of plain operators: PyTorch's forward-mode rule views its input as if it were NCHW, and raises in
    channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        grouped = wide.reshape(len(x), self.num_groups, -1)
        variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        normalized = ((grouped - mean) * (variance + self.eps).rsqrt()).view(x.shape)
        if self.affine:
            shape = (1, -1) + (1,) * (x.dim() - 2)
            normalized = normalized * self.weight.view(shape) + self.bias.view(shape)
        return normalized.to(x.dtype)


def opened(model: nn.Module, vmapped: bool = False) -> nn.Module:
    """A copy of the network with the Open modules in place of PyTorch's (same names)."""
    model = without_counters(copy.deepcopy(model)).to("meta")
    for name, module in list(model.named_modules()):
        if hasattr(module, "fused"):
            module.fused = False
        if type(module) is nn.Conv2d and not vmapped:  # vmap cannot look at tangents
            module.__class__ = OpenConv2d
        if type(module) is nn.GroupNorm:
            module.__class__ = OpenGroupNorm
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, OpenBatchNorm(module))
    return model
