"""Batches of pictures: resize, normalize, augment. No hidden state; normalize and augment are the hot path
of training, vectorized and alike on CPU and CUDA.

Legend: B batch, C channels, H height, W width, Q pixels (H * W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.random import integers, uniform


def normalize(images_BCHW: Tensor, mean_C: Tensor, std_C: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(images / 255 - mean) / std`` for uint8 images, any leading dims ([N, B, C, H, W] as well).

    Mean and std are in [0, 1] units. The memory layout of the images is kept (channels_last stays
    channels_last), and the values are the same to the bit in either layout. float16 and bfloat16
    are rounded once, from a float32 result.
    """
    return scale_and_shift(images_BCHW, *normalization(mean_C.to(images_BCHW.device), std_C, dtype), dtype)


def normalization(mean_C: Tensor, std_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] that map bytes to normalized values."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    mean_C, std_C = mean_C.to(compute), std_C.to(mean_C.device, compute)
    return 1 / (255 * std_C), -mean_C / std_C


def scale_and_shift(images_BCHW: Tensor, scale_C: Tensor, shift_C: Tensor, dtype: torch.dtype) -> Tensor:
    """``images * scale + shift`` by channel; see :func:`normalize`."""
    images_BHWC = images_BCHW.movedim(-3, -1)
    if images_BHWC.is_contiguous() and not images_BCHW.is_contiguous():
        # Broadcasting over an innermost dimension of 3 is ten times slower than over whole rows.
        width = images_BCHW.shape[-1]
        rows = images_BHWC.flatten(-2).to(scale_C.dtype).mul_(scale_C.repeat(width)).add_(shift_C.repeat(width))
        return rows.view(images_BHWC.shape).movedim(-1, -3).to(dtype)
    return images_BCHW.to(scale_C.dtype).mul_(scale_C[:, None, None]).add_(shift_C[:, None, None]).to(dtype)


def augment(images_BCHW: Tensor, keys_B: Tensor, pad: int = 4, flip: bool = True) -> Tensor:
    """Random crop out of the zero-padded image, then a horizontal flip with probability 1/2.

    ``keys_B`` (int64, on the images' device) holds one hash per sample; what happens to a sample is
    a pure function of its key. uint8 in, uint8 out, same shape and memory layout.
    """
    _, _, height, width = images_BCHW.shape
    shifts, device = 2 * pad + 1, images_BCHW.device
    # One draw a sample decides all three: hashing costs as much as moving the pixels of a small batch.
    draw_B1 = integers(shifts * shifts * (2 if flip else 1), "augment", keys_B)[:, None]
    column_W = torch.arange(width, device=device)
    row_BH = draw_B1 % shifts + torch.arange(height, device=device)
    column_BW = torch.where(draw_B1 < shifts * shifts, column_W, column_W.flip(0))
    column_BW = column_BW + draw_B1 // shifts % shifts

    pixel_BQ = (row_BH[:, :, None] * (width + 2 * pad) + column_BW[:, None, :]).flatten(1)
    padded_BCQ = F.pad(images_BCHW, (pad, pad, pad, pad)).flatten(2)
    index_BCQ = pixel_BQ[:, None, :].expand(-1, images_BCHW.shape[1], -1)
    augmented_BCHW = padded_BCQ.gather(2, index_BCQ).view(images_BCHW.shape)
    if not images_BCHW.is_contiguous() and images_BCHW.is_contiguous(memory_format=torch.channels_last):
        return augmented_BCHW.contiguous(memory_format=torch.channels_last)
    return augmented_BCHW


NOISE = 0.1  # of a feature's deviation
MASKED_STEPS, MASKED_FEATURES = 0.2, 0.2  # the longest mask, as a share


def augment_sequences(inputs_BTF: Tensor, keys_B: Tensor, kind: str) -> Tensor:
    """'noise': normal noise of a tenth of a deviation on every feature; 'mask': a stretch of steps and a band of
    features set to 0, the mean (SpecAugment; Park et al. 2019). Any leading dims; the last column stays as it is. A
    pure function of each sample's key."""
    *_, T, F1 = inputs_BTF.shape
    device = inputs_BTF.device
    if kind == "noise":
        place_TF = torch.arange(T * (F1 - 1), device=device).view(T, F1 - 1)
        keys = keys_B[..., None, None]
        radius, angle = (uniform(name, keys, place_TF) for name in ("radius", "angle"))  # Box and Muller 1958
        noise = (-2 * (1 - radius).log()).sqrt() * (2 * torch.pi * angle).cos()
        there = inputs_BTF[..., -1:]
        return torch.cat([inputs_BTF[..., :-1] + NOISE * (noise * there).to(inputs_BTF.dtype), there], -1)
    kept = []
    for name, size, share in (("steps", T, MASKED_STEPS), ("features", F1 - 1, MASKED_FEATURES)):
        length_B = integers(int(share * size) + 1, name, "length", keys_B)
        start_B = (uniform(name, "start", keys_B) * (size - length_B + 1)).long()
        place = torch.arange(size, device=device)
        kept.append((place < start_B[..., None]) | (place >= (start_B + length_B)[..., None]))
    kept_BTF = kept[0][..., None] & kept[1][..., None, :]
    return torch.cat([inputs_BTF[..., :-1] * kept_BTF, inputs_BTF[..., -1:]], -1)


def resize(images_BCHW: Tensor, size: int) -> Tensor:
    """uint8 [B, C, H, W] -> uint8 [B, C, size, size], on the CPU: the shorter side becomes ``size``
    (bilinear, antialiased, in PyTorch's integer arithmetic), then the centre is cropped."""
    height, width = images_BCHW.shape[-2:]
    if height == width == size:
        return images_BCHW
    scale = size / min(height, width)
    shape = round(height * scale), round(width * scale)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    resized_BCHW = F.interpolate(images_BCHW, shape, mode="bilinear", antialias=True)
    return resized_BCHW[..., top : top + size, left : left + size].contiguous()
