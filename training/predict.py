"""Apply a trained model to pictures: classes and probabilities.

    python -m training.predict results/NAME/stage1/model.safetensors PICTURES...    files, or folders of them
    python -m training.predict MODEL PICTURES... --top 3                            the three likeliest classes of each

The model's file says which network it is, what the pictures were (size, channels, mean and deviation) and what its
classes are called: nothing else is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.pictures import decode_pictures, displayable, find_pictures
from data.transforms import normalization, scale_and_shift
from networks import read_trained
from utils.errors import UsageError, refusal

# Legend: k pictures, C channels, K classes, H height, W width.
BATCH = 128
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, by which PIL makes grey pictures of coloured ones


@dataclass
class TrainedModel:
    """A network in evaluation mode, and what its file says of the pictures that it was trained on. ``mean_C`` and
    ``std_C``: of pixels scaled to [0, 1]."""

    network: nn.Module
    image_shape: tuple[int, int, int]
    mean_C: Tensor
    std_C: Tensor
    class_names: tuple[str, ...]

    @torch.no_grad()
    def probabilities(self, images_kCHW: Tensor) -> Tensor:
        """Probabilities [k, K] of pictures as they are decoded: uint8 [k, C, H, W].

        Raises :class:`UsageError` for other pictures than the network takes.
        """
        if images_kCHW.dtype != torch.uint8 or tuple(images_kCHW.shape[1:]) != self.image_shape:
            raise UsageError(
                f"the model takes uint8 pictures of shape {self.image_shape} (channels, height, width), not "
                f"{images_kCHW.dtype} of {tuple(images_kCHW.shape[1:])}."
            )
        affine = normalization(self.mean_C, self.std_C, torch.float32)
        parts = [self.network(scale_and_shift(part, *affine, torch.float32)) for part in images_kCHW.split(BATCH)]
        return torch.cat(parts).softmax(1) if parts else torch.empty(0, len(self.class_names))

    def decode(self, files: list[str]) -> Tensor:
        """Picture files as the network takes them, uint8 [k, C, H, W]: resized and cropped to its size, grey or in
        colour as its training pictures were."""
        channels, height, width = self.image_shape
        images = decode_pictures(files, height if height == width else None)
        if tuple(images.shape[2:]) != (height, width):
            raise UsageError(f"the model takes pictures of {width}x{height} pixels: resize {displayable(files[0])}.")
        if images.shape[1] < channels:
            return images.expand(-1, channels, -1, -1)
        if images.shape[1] > channels:
            weights_C = torch.tensor(LUMINANCE)[:, None, None]
            return (images * weights_C).sum(1, keepdim=True).round().to(torch.uint8)
        return images


def open_model(path: str | Path) -> TrainedModel:
    """The model of a run's ``model.safetensors``. Raises :class:`UsageError` where the file is missing, damaged or of a
    version that did not say what pictures it takes."""
    network, said = read_trained(path)
    try:
        mean_C, std_C = (torch.tensor([float(v) for v in said[name]]) for name in ("mean", "std"))
        names = tuple(str(name) for name in said["class_names"])
        whole = len(mean_C) == len(std_C) == said["image_shape"][0] and len(names) == said["num_classes"]
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or not bool((std_C > 0).all() & mean_C.isfinite().all()):
        raise UsageError(
            f"{path} does not say how its pictures were normalized and what its classes are called (an older version "
            "made it?): train it again."
        )
    return TrainedModel(network.float(), said["image_shape"], mean_C, std_C, names)


def picture_files(paths: list[str]) -> list[str]:
    """The pictures that are named, and those in the folders that are named."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            found, _ = find_pictures(path)
            if not found:
                raise UsageError(f"{displayable(path)} holds no pictures.")
            files += found
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise UsageError(f"there is no picture {displayable(path)}: check the path.")
    return files


def lines(model: TrainedModel, files: list[str], top: int) -> Iterator[str]:
    """A line a picture: its file, and the likeliest classes with their probabilities, separated by tabs."""
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        images = model.decode(part) if _square(model) else torch.cat([model.decode([file]) for file in part])
        best = model.probabilities(images).topk(min(top, len(model.class_names)))
        for file, values, classes in zip(part, best.values.tolist(), best.indices.tolist(), strict=True):
            said = (f"{displayable(model.class_names[c])}\t{p:.4f}" for c, p in zip(classes, values, strict=True))
            yield "\t".join([displayable(file), *said])


def _square(model: TrainedModel) -> bool:
    """Whether pictures of all sizes are brought to one."""
    return model.image_shape[1] == model.image_shape[2]


def main(argv: list[str] | None = None) -> int:
    """Print a line a picture. Returns the exit code: 0, or 2 where the user has to change something."""
    parser = argparse.ArgumentParser(
        prog="python -m training.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}; --help shows examples\n")  # one line, no usage
    parser.add_argument("model", help="model.safetensors of a run")
    parser.add_argument("pictures", nargs="+", help="picture files, or folders of them")
    parser.add_argument("--top", type=int, default=1, help="how many classes a line names (default: 1)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.top < 1:
            raise UsageError(f"--top {arguments.top}: name one class at least.")
        model = open_model(arguments.model)
        for line in lines(model, picture_files(arguments.pictures), arguments.top):
            print(line)
    except (UsageError, OSError) as error:
        return refusal(error)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
