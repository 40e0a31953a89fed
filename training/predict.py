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

from data.batches import Samples, SequenceSamples
from data.pictures import decode_pictures, displayable, find_pictures
from data.task import Task, task_of
from networks import read_trained
from utils.errors import UsageError, refusal

# Legend: k pictures, C channels, K classes, H height, W width.
BATCH = 128
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, by which PIL makes grey pictures of coloured ones


@dataclass
class TrainedModel:
    """A network in evaluation mode, and what its file says of the samples that it was trained on. ``mean_C`` and
    ``std_C``: of pixels scaled to [0, 1] by channel, or of the features of sequences."""

    network: nn.Module
    input_shape: tuple[int, ...]
    mean_C: Tensor
    std_C: Tensor
    task: Task

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """What the network says [k, K] of samples as data sets hold them: pictures, uint8 [k, C, H, W], or sequences,
        float32 [k, T, F].

        Raises :class:`UsageError` for other samples than the network takes.
        """
        pictures = len(self.input_shape) == 3
        kind, dtype = (Samples, torch.uint8) if pictures else (SequenceSamples, torch.float32)
        shape = self.input_shape if pictures else (self.input_shape[0], self.input_shape[1] - 1)
        if inputs.dtype != dtype or tuple(inputs.shape[1:]) != shape:
            raise UsageError(
                f"the model takes {str(dtype).removeprefix('torch.')} samples of shape {shape}, not {inputs.dtype} of "
                f"{tuple(inputs.shape[1:])}."
            )
        samples = kind(inputs, torch.zeros(len(inputs)), self.mean_C, self.std_C)
        parts = [self.network(samples.plain(ids)[0]) for ids in torch.arange(len(inputs)).split(BATCH)]
        return torch.cat(parts) if parts else torch.empty(0, self.task.num_outputs)

    def predicted(self, inputs: Tensor) -> Tensor:
        """What a person reads: classes [k], probabilities of findings [k, K], or values in the unit of the data."""
        return self.task.predicted(self.outputs(inputs))

    def probabilities(self, inputs: Tensor) -> Tensor | None:
        """Probabilities [k, K] of classes, or of findings; None of a model that gives values."""
        return self.task.probabilities(self.outputs(inputs))

    def decode(self, files: list[str]) -> Tensor:
        """Picture files as the network takes them, uint8 [k, C, H, W]: resized and cropped to its size, grey or in
        colour as its training pictures were."""
        channels, height, width = self.input_shape
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
    version that did not say what samples it takes."""
    network, said = read_trained(path)
    try:
        mean_C, std_C = (torch.tensor([float(v) for v in said[name]]) for name in ("mean", "std"))
        record = said.get("task") or {"kind": "classification", "names": said["class_names"]}  # that of older versions
        task, shape = task_of({**record, "names": [str(name) for name in record["names"]]}), said["input_shape"]
        channels = shape[0] if len(shape) == 3 else shape[1] - 1
        whole = len(mean_C) == len(std_C) == channels and task.num_outputs == said["num_outputs"]
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or not bool((std_C > 0).all() & mean_C.isfinite().all()):
        raise UsageError(
            f"{path} does not say how its samples were normalized and what its outputs are called (an older version "
            "made it?): train it again."
        )
    return TrainedModel(network.float(), shape, mean_C, std_C, task)


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
        best = model.probabilities(images).topk(min(top, len(model.task.names)))
        for file, values, classes in zip(part, best.values.tolist(), best.indices.tolist(), strict=True):
            said = (f"{displayable(model.task.names[c])}\t{p:.4f}" for c, p in zip(classes, values, strict=True))
            yield "\t".join([displayable(file), *said])


def _square(model: TrainedModel) -> bool:
    """Whether pictures of all sizes are brought to one."""
    return model.input_shape[1] == model.input_shape[2]


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
        if len(model.input_shape) != 3 or model.task.probabilities(torch.zeros(1, model.task.num_outputs)) is None:
            raise UsageError(f"{arguments.model} takes no pictures or gives no classes: apply it in Python (README).")
        for line in lines(model, picture_files(arguments.pictures), arguments.top):
            print(line)
    except (UsageError, OSError) as error:
        return refusal(error)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
