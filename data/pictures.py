"""Picture files: which ones lie in a folder, and their pixels.

Legend: k files, C channels, H height, W width.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from utils.errors import UsageError

PICTURE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM")


def decode_pictures(files: list[str], image_size: int | None = None, progress: bool = False) -> Tensor:
    """uint8 [k, C, H, W] of picture files, large ones decoded in threads: C = 1 if all are grey, 3 otherwise.

    With ``image_size`` the shorter side is resized to it (bilinear, antialiased) and the centre cropped.
    Raises UsageError naming a damaged file, or when the pictures differ in size and no size is given.
    """
    shape_HW = _decode(files[0], image_size).shape[1:]
    images_kCHW = np.empty((len(files), 3, *shape_HW), np.uint8)
    grey_k = np.zeros(len(files), bool)

    def decode_part(part: range) -> int:
        for i in part:
            picture_CHW = _decode(files[i], image_size)
            if picture_CHW.shape[1:] != shape_HW:
                (height, width), (other_height, other_width) = shape_HW, picture_CHW.shape[1:]
                raise UsageError(
                    f"pictures differ in size ({files[0]} is {width}x{height}, {files[i]} is "
                    f"{other_width}x{other_height}); give one size to all with --image_size"
                )
            grey_k[i] = len(picture_CHW) == 1
            images_kCHW[i, : len(picture_CHW)] = picture_CHW
        return len(part)

    # PIL frees the interpreter lock only while it decodes: for small files one thread is the fastest.
    threads = 1 if os.path.getsize(files[0]) < 8192 else min(16, os.cpu_count() or 1)
    parts = [range(start, min(start + 64, len(files))) for start in range(0, len(files), 64)]
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(files), desc="decoding", unit="picture", disable=not progress) as bar,
    ):
        for done in pool.map(decode_part, parts):
            bar.update(done)
    if grey_k.all():
        return torch.from_numpy(images_kCHW[:, :1].copy())
    images_kCHW[grey_k, 1:] = images_kCHW[grey_k, :1]
    return torch.from_numpy(images_kCHW)


def _decode(file: str, image_size: int | None) -> np.ndarray:
    """One picture as uint8 [C, H, W], C = 1 for grey ones; turned upright; transparency is dropped."""
    try:
        # from memory: PIL's many small reads cost more than the decoding of a small JPEG
        with open(file, "rb") as handle:
            content = io.BytesIO(handle.read())
        with Image.open(content, formats=PICTURE_FORMATS) as picture:
            if image_size:
                picture.draft(None, (2 * image_size,) * 2)  # a large JPEG is decoded at 1/2, 1/4, 1/8
            if "exif" in picture.info:
                picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip it
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            elif picture.mode in ("1", "L", "LA", "La"):
                picture = picture.convert("L")
            else:
                picture = picture.convert("RGB")
            if image_size:
                picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BILINEAR)
            pixels = np.asarray(picture)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... for bad files
        raise UsageError(f"cannot read the picture {file}: {error}; replace or remove it") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
