"""The networks: ``load_model`` builds, pretrains or reads one; ``head`` and ``features`` cut it in two.

To add a network, write a function ``(num_outputs, input_shape) -> nn.Module`` whose last layer is an
``nn.Linear``, and add one line to ``utils.registry.NETWORKS``. It takes pictures, unless its attribute ``takes`` says
'sequences' or 'anything'. No layer may keep random state of its own (dropout): a run is a pure function of
(config, seed, step).

Legend: B batch, F inputs of the head, T steps; an input shape is (channels, height, width) of pictures, or
(T, features + 1) of sequences, whose last column says which steps are there.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from utils.digest import digest_json, digest_tensors
from utils.errors import UsageError
from utils.files import parse_json, replaced
from utils.registry import NETWORKS, load

# Networks that torchvision has ImageNet weights for, and what torchvision calls them.
PRETRAINED = {
    "squeezenet": "squeezenet1_1",
    "shufflenet": "shufflenet_v2_x1_0",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "densenet121": "densenet121",
}

# torchvision's files of DenseNet say 'denselayer1.norm.1', its modules 'denselayer1.norm1'.
DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])(?=\.)")

SHOWN_LAYERS = 24  # of a network that lacks the one that was asked for
SMALLEST_IMAGE = 8  # pixels a side: the deepest networks shrink a small image eightfold


def load_model(
    name: str | Path,
    num_outputs: int | None = None,
    input_shape: Sequence[int] | None = None,
    pretrained: bool = False,
    seed: int | None = None,
) -> nn.Module:
    """A network on the CPU: a fresh one by its name in ``NETWORKS``, or a trained one by its file.

    A ``name`` that ends in ``.safetensors`` is a file of :func:`save_model`: see :func:`load_trained`
    (``num_outputs`` and ``input_shape`` may be left out, and must fit where they are given).

    With a ``seed`` the initialization is a pure function of it, and the global generators are neither
    read nor changed; without one it draws from torch's global generator.

    ``pretrained`` starts from torchvision's ImageNet weights. Not loaded, hence fresh: the head, always;
    and the first convolution where its shape differs from the published one (images that are not of
    3 channels; ResNets for images of up to 64 pixels, whose stem is 3x3).

    Raises UsageError: unknown name, impossible shape, weights that cannot be had, a damaged file.
    """
    if str(name).endswith(".safetensors"):
        model, said = read_trained(name)
        saved_classes, saved_shape = said["num_outputs"], said["input_shape"]
        if num_outputs not in (None, saved_classes):
            raise UsageError(f"{name} is a network of {saved_classes} outputs, the data need {num_outputs}.")
        if input_shape is not None and tuple(input_shape) != saved_shape:
            raise UsageError(
                f"{name} is a network for samples of shape {saved_shape}, the data have {tuple(input_shape)}: "
                f"pass --image_size {saved_shape[-1]} or train one for these."
            )
        return model

    build = load(NETWORKS, str(name), "model")
    if num_outputs is None or input_shape is None:
        raise UsageError(f"network '{name}' has to be told num_outputs and input_shape.")
    shape = _taken_shape(str(name), getattr(build, "takes", "pictures"), num_outputs, tuple(input_shape))
    if pretrained and name not in PRETRAINED:
        raise UsageError(
            f"there are no pretrained weights for '{name}': leave out --pretrained, or choose from: "
            f"{', '.join(PRETRAINED)}."
        )
    with ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        if seed is not None:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        model = build(num_outputs, shape)
    if len(shape) > len(input_shape):
        model = SequenceAsPicture(model)
    if pretrained:
        _load_pretrained(model, PRETRAINED[name])
    return model


def head(model: nn.Module) -> nn.Linear:
    """The last linear layer, which turns :func:`features` into logits. Raises UsageError without one."""
    return _head(model)[1]


def features(model: nn.Module, images: Tensor, layer: str | None = None) -> Tensor:
    """The inputs [B, F] of the head: ``head(model)(features(model, images)) == model(images)``; or, flattened, the
    output of the ``layer`` of that name among the model's ``named_modules()``.

    Runs the whole forward pass, in the mode (train or eval) that the model is in. Two threads may call it
    at once on two copies of a model, not on the same one. Raises UsageError: no such layer, or one that gives no
    tensor with a row for each sample.
    """
    seen: list[Tensor] = []
    if layer is None:
        hook = head(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        hook = _layer(model, layer).register_forward_hook(lambda _, __, output: seen.append(_rows(output, images)))
    try:
        model(images)
    finally:
        hook.remove()
    if not seen or seen[-1] is None:
        what = "is not run" if not seen else "gives no tensor with a row for each sample"
        raise UsageError(f"layer '{layer}' {what}: take another.")
    return seen[-1]


def _rows(output: object, images: Tensor) -> Tensor | None:
    """A layer's output [B, F]; None where it is none. Copied: what comes next may change it in place."""
    if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != len(images):
        return None
    return output.clone().flatten(1) if output.dim() > 1 else output.clone()[:, None]


def _layer(model: nn.Module, name: str) -> nn.Module:
    layers = dict(model.named_modules())
    names = [known for known in layers if known]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=SHOWN_LAYERS, cutoff=0.3)
        shown = [*near, *(known for known in names if known not in near)]
        more = f" and {len(names) - SHOWN_LAYERS} more" if len(names) > SHOWN_LAYERS else ""
        raise UsageError(f"there is no layer '{name}'; there are: {', '.join(shown[:SHOWN_LAYERS])}{more}.")
    return layers[name]


def model_metadata(name: str, num_outputs: int, input_shape: Sequence[int], **notes: Any) -> dict[str, Any]:
    """What a file must say for :func:`load_trained` to rebuild the network; ``notes`` (JSON-able) ride along."""
    return notes | {"model": name, "num_outputs": num_outputs, "input_shape": list(input_shape)}


def save_model(model_state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write a ``state_dict`` as one safetensors file, atomically, in canonical layout.

    ``metadata`` comes from :func:`model_metadata` and is kept as JSON under one key: safetensors writes several
    keys in random order, and equal models should be equal files. Integer counters may be left out of the state.
    """
    missing = {"model", "num_outputs", "input_shape"} - set(metadata)
    if missing:
        raise ValueError(f"metadata lacks {sorted(missing)}: build it with model_metadata()")
    tensors = {key: value.detach().cpu().contiguous() for key, value in model_state.items()}
    metadata = {**metadata, "digest": _digest(tensors, metadata)}
    try:
        with replaced(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"network": json.dumps(metadata, sort_keys=True)})
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"cannot write {path}: {error}. Free some space or choose another folder.") from error


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Of everything that a file holds: safetensors keeps no checksum."""
    notes = {key: value for key, value in metadata.items() if key != "digest"}
    return digest_json({"tensors": digest_tensors(tensors), "notes": notes})


def load_trained(path: str | Path) -> nn.Module:
    """The network of a :func:`save_model` file, on the CPU and in eval mode.

    Nothing is unpickled. Raises UsageError if the file is missing, damaged or of another format.
    """
    return read_trained(path)[0]


class SequenceAsPicture(nn.Module):
    """A network for pictures, given sequences [B, T, F + 1] (a spectrogram, say): one channel of T x F pixels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, sequences: Tensor) -> Tensor:
        """Outputs [B, C]."""
        return self.network(sequences[..., :-1].unsqueeze(-3))


def _taken_shape(name: str, takes: str, num_outputs: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what the network gets; :class:`UsageError` where it cannot take such samples."""
    if num_outputs < 1:
        raise UsageError(f"a network needs at least one output, not {num_outputs}.")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise UsageError(f"shape {shape} is neither (channels, height, width) nor (steps, features + 1).")
    if takes == "sequences" and len(shape) == 3:
        raise UsageError(f"{name} takes sequences (time series, sound), and these are pictures: try cnn or mlp.")
    if len(shape) == 2:
        if takes != "pictures":
            return shape
        shape = 1, shape[0], shape[1] - 1
        if min(shape[1:]) < SMALLEST_IMAGE:
            raise UsageError(
                f"{name} takes pictures, and sequences as pictures of {SMALLEST_IMAGE} steps and features at least, "
                f"not {shape[1]} and {shape[2]}: try lstm, gru or mlp."
            )
    if min(shape[1:]) < SMALLEST_IMAGE:
        raise UsageError(
            f"images of {shape[1]} x {shape[2]} pixels are too small for the networks: "
            f"pass --image_size {SMALLEST_IMAGE} or more."
        )
    return shape


def _head(model: nn.Module) -> tuple[str, nn.Linear]:
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError(f"{type(model).__name__} has no nn.Linear: a network has to end in one.")
    return linear[-1]


def _is_counter(key: str) -> bool:
    """BatchNorm's count of batches: no network here uses it (momentum is constant)."""
    return key.endswith("num_batches_tracked")


def _load_pretrained(model: nn.Module, torchvision_name: str) -> None:
    """Copy torchvision's default ImageNet weights into ``model``, all but the head and an unlike stem."""
    from utils.torchvision_shim import torchvision

    url = torchvision.models.get_model_weights(torchvision_name).DEFAULT.url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    was_there = file.exists()
    try:
        weights = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # a damaged file can raise anything: KeyError, UnpicklingError, ...
        if was_there:
            raise UsageError(f"the weights in {file} cannot be read: delete the file and try again.") from error
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"cannot download the pretrained weights ({reason}): place {file.name} in {file.parent}, "
            f"or leave out --pretrained."
        ) from error

    weights = {DENSE_LAYER.sub(r"\1\2", key): value for key, value in weights.items()}
    head_name, _ = _head(model)
    stem_name = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    fitting = {
        key: weights[key]
        for key, value in model.state_dict().items()
        if key in weights and weights[key].shape == value.shape and not key.startswith(head_name + ".")
    }
    unlike = [
        key
        for key in model.state_dict().keys() - fitting
        if not key.startswith((head_name + ".", stem_name + ".")) and not _is_counter(key)
    ]
    if unlike:
        raise UsageError(f"{file} does not hold weights of {torchvision_name}: delete the file and try again.")
    model.load_state_dict(fitting, strict=False)


def read_trained(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a :func:`save_model` file in eval mode, and what the file says of it (``num_outputs``,
    ``input_shape`` and the notes that were given). Raises UsageError as :func:`load_trained` does."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no model file {path}: give the path of a run's model.safetensors.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("network", "")
            state = {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged or no safetensors file: write it anew or use another.") from error
    try:
        metadata = parse_json(text)
        older = {"num_outputs": "num_classes", "input_shape": "image_shape"}  # what older versions called them
        metadata = {key: metadata.get(old) for key, old in older.items()} | metadata
        name, num_outputs = str(metadata["model"]), int(metadata["num_outputs"])
        input_shape = tuple(int(size) for size in metadata["input_shape"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} does not say which network it holds: save it with networks.save_model.") from error

    if "digest" in metadata and metadata["digest"] != _digest(state, metadata):  # older versions wrote none
        raise UsageError(f"{path} is damaged (its digest is another): write it anew or use another.")
    model = load_model(name, num_outputs, input_shape, seed=0)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a tensor of another shape
        raise UsageError(f"{path} does not fit the '{name}' that it says it holds: write it anew.") from error
    if unexpected or not all(_is_counter(key) for key in missing):
        raise UsageError(f"{path} does not fit the '{name}' that it says it holds: write it anew.")
    return model.eval(), metadata | {"num_outputs": num_outputs, "input_shape": input_shape}
