"""Picture files: which ones lie in a folder, and their pixels.

PIL reads them, but only formats that are decoded inside this process and hold one picture or pages of it (the
first is taken): EPS and WMF start other programs.

Legend: k files, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from utils.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

PICTURE_FORMATS = (
    "JPEG", "PNG", "BMP", "DIB", "WEBP", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF", "PCX", "SGI", "SUN", "DDS", "QOI",
    "ICO", "TGA",
)  # fmt: skip
ORIENTATION = 0x0112  # the EXIF tag
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}  # what Windows leaves behind; hidden files are left out anyway


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """The endings of picture files, '.jpg' and so on. An MPO is a JPEG with more pictures behind the first."""
    return frozenset(s for s, name in Image.registered_extensions().items() if name in (*PICTURE_FORMATS, "MPO"))


def files_under(folder: Path | str, unreadable: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """All files in the folder and its subfolders, hidden ones left out. Links are followed, but each folder
    is read once, in the order of names, and those around the first one never: links may form circles.
    ``unreadable`` is told of folders that cannot be read."""
    if not os.path.isdir(folder):
        return
    seen = {_identity(parent) for parent in Path(os.path.realpath(folder)).parents}
    waiting = [os.fspath(folder)]
    while waiting:
        here = waiting.pop()
        identity = _identity(here)
        if identity in seen:
            continue
        seen.add(identity)
        # One level of os.walk at a time: as a whole it recurses, and Python ends that some hundred folders deep.
        _, folders, files = next(os.walk(here, onerror=unreadable), (here, [], []))
        waiting += [os.path.join(here, name) for name in sorted(folders, reverse=True) if not name.startswith(".")]
        yield from (os.path.join(here, name) for name in files if not name.startswith("."))


def _identity(folder: Path | str) -> tuple[int, int]:
    """What a folder has in common under all of its names."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def find_pictures(folder: Path | str) -> tuple[list[str], list[str]]:
    """The picture files in the folder and its subfolders, sorted by path, and the files that are none."""
    return find_files(folder, picture_suffixes())


def find_files(folder: Path | str, suffixes: Collection[str]) -> tuple[list[str], list[str]]:
    """The files in the folder and its subfolders that end so, sorted by path, and the others."""

    def refuse(error: OSError) -> None:
        raise UsageError(f"cannot read the folder {displayable(error.filename)}: {error.strerror}") from error

    wanted, others = [], []
    for file in sorted(files_under(folder, refuse)):
        # not a pipe or a device either: opening one may take forever
        fits = os.path.splitext(file)[1].lower() in suffixes and os.path.isfile(file)
        (wanted if fits else others).append(file)
    return wanted, others


def say_skipped(files: list[str], kind: str = "picture") -> tuple[str, ...]:
    """A note on files that were left out, since they are no ``kind``; no note where there are none."""
    names = [name for name in map(os.path.basename, files) if name.lower() not in SYSTEM_FILES]
    if not names:
        return ()
    what = f"file that is no readable {kind}" if len(names) == 1 else f"files that are no readable {kind}s"
    return (f"{len(names):,} {what} of a class ({listed(names, most=2)})",)


def listed(names: list[str], most: int) -> str:
    """The first ``most`` of these names in a row, with dots if there are more."""
    return ", ".join(map(displayable, names[:most])) + (", ..." if len(names) > most else "")


def displayable(name: str) -> str:
    """A file's name as one line of valid text: names may hold line breaks and bytes that are no UTF-8."""
    return " ".join(os.fsencode(name).decode("utf-8", "replace").splitlines())


def check_memory(count: int, channels: int, height: int, width: int) -> None:
    """Raises UsageError where ``count`` pictures take more bytes than the machine has, which would kill the
    process instead."""
    if count * channels * height * width > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UsageError(
            f"{count:,} pictures of {width}x{height} pixels do not fit into memory; give them a smaller --image_size"
        )


def decode_pictures(files: list[str], image_size: int | None = None, progress: bool = False) -> Tensor:
    """uint8 [k, C, H, W] of picture files, large ones decoded in threads: C = 1 if all are grey, 3 otherwise.

    With ``image_size`` the shorter side is resized to it (bilinear, antialiased) and the centre cropped.
    Raises UsageError naming a damaged file, or when the pictures differ in size and no size is given.
    """
    import torch  # takes seconds, and who only wants to know what files hold does without

    shape_HW = _decode(files[0], image_size).shape[1:]
    check_memory(len(files), 3, *shape_HW)
    images_kCHW = np.empty((len(files), 3, *shape_HW), np.uint8)
    grey_k = np.zeros(len(files), bool)

    def decode_part(part: range) -> int:
        for i in part:
            picture_CHW = _decode(files[i], image_size)
            if picture_CHW.shape[1:] != shape_HW:
                (height, width), (other_height, other_width) = shape_HW, picture_CHW.shape[1:]
                raise UsageError(
                    f"pictures differ in size ({displayable(files[0])} is {width}x{height}, {displayable(files[i])} "
                    f"is {other_width}x{other_height}); give one size to all with --image_size"
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
    picture = read_picture(file, 2 * image_size if image_size else None).image
    if image_size:
        picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture file: its bytes, its pixels (mode L or RGB, upright, no transparency), its format as PIL calls it, and
    its width and height (upright; the pixels may be fewer)."""

    content: bytes
    image: Image.Image
    format: str
    size: tuple[int, int]


def read_picture(file: str, enough: int | None = None) -> Picture:
    """A picture file, all of it decoded. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both sides keep
    ``enough`` pixels.

    Raises UsageError naming the file where it is damaged, or so large that decoding it could take all memory (PIL's
    limit, 179 million pixels).
    """
    with _naming(file):
        with open(file, "rb") as handle:  # from memory: PIL's many small reads cost more than to decode a small JPEG
            content = handle.read()
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as picture:
            size, kind = _upright_size(picture), picture.format
            if enough:
                picture.draft(None, (enough, enough))
            if "exif" in picture.info:
                picture = ImageOps.exif_transpose(picture)
            if picture.mode == "F":
                raise ValueError("its pixels are floating point numbers, whose black and white are not known")
            if picture.mode.startswith("I"):  # 16-bit grey, in 32 bits too; PIL's own conversion would clip it to 8
                picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
            else:
                picture = picture.convert("L" if _is_grey(picture) else "RGB")
    return Picture(content, picture, kind, size)


def upright_size(content: bytes) -> tuple[int, int]:
    """Width and height of a picture that is whole, by its bytes alone."""
    with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as picture:
        return _upright_size(picture)


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    on_its_side = "exif" in picture.info and picture.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    return picture.size[::-1] if on_its_side else picture.size


@contextlib.contextmanager
def _naming(file: str) -> Iterator[None]:
    """Whatever goes wrong inside is a UsageError that names the file."""
    try:
        yield
    except UnidentifiedImageError as error:  # its message names the buffer, not the file
        what = f"it is damaged, or in none of the formats that are read ({', '.join(PICTURE_FORMATS)})"
        raise UsageError(f"cannot read the picture {displayable(file)}: {what}; replace or remove it") from error
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ... for bad files
        cause = " ".join(str(error).split())
        raise UsageError(f"cannot read the picture {displayable(file)}: {cause}; replace or remove it") from error


def _is_grey(picture: Image.Image) -> bool:
    """Whether a picture has no colour by its mode, or by its palette."""
    palette = picture.getpalette("RGB")
    if palette:
        colours = np.reshape(palette, (-1, 3))
        return bool((colours == colours[:, :1]).all())
    return picture.mode in ("1", "L", "LA", "La")
