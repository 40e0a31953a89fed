"""Data sets as tensors: read once, cached, with a sample id (= row of ``inputs_n``) that never changes.

To add a data set, write a reader ``(path, options) -> Arrays`` and add a line to ``utils.registry.DATASETS``.

Legend: n train samples, m test samples, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.arrays import Arrays, ReadOptions
from data.cache import TENSORS, default_cache_dir, digest_of_files, read_cache, warn_damaged, write_cache
from data.classification import Classification
from data.pictures import check_memory
from data.transforms import resize
from utils.digest import digest_json, digest_tensors
from utils.errors import UsageError
from utils.random import hash64
from utils.registry import DATASETS, load

EMBEDDED = {"air": Path(__file__).parent.parent / "examples" / "air"}  # what the project's folder brings along
PACKAGED = {"elpv": ("elpv_dataset", "data")}  # an installed package, and the folder in it


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset(Arrays):
    """A whole data set in memory. Mean and deviation are those of the train inputs, by channel (pictures: of pixels
    scaled to [0, 1]) or by feature (sequences), float32; the deviation of a constant one is 1. ``fingerprint``:
    counts and digests of what was loaded, before any corruption."""

    name: str
    mean_C: Tensor
    std_C: Tensor
    fingerprint: dict[str, Any]


def load_dataset(
    name: str,
    path: str | os.PathLike | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    **asked: Any,
) -> Dataset:
    """The data set ``name`` from the folder ``path`` (default ./datasets/<name>; what is embedded or a package needs
    none).

    ``asked``: what :class:`ReadOptions` holds (image_size, download, progress, ...).
    cache_dir: where the decoded tensors are kept, by default decentralized-learning in $XDG_CACHE_HOME or
    ~/.cache. Raises UsageError when the name is unknown, or files are missing or damaged, or a download fails.
    """
    options = ReadOptions(**asked)
    reader = load(DATASETS, name, "data set")
    if options.image_size is not None and options.image_size < 1:
        raise UsageError(f"--image_size must be at least 1 pixel, not {options.image_size}")
    path = Path(os.path.abspath(os.path.expanduser(path or _usual_folder(name))))
    try:
        path.lstat()
    except ValueError as error:  # a zero byte, or half a character
        raise UsageError(f"--dataset_path {str(path)!r} is no path: {error}") from error
    except OSError:
        pass  # the reader says what is missing
    # Digits come with scikit-learn, and read faster than a cache; arrays of a program without files may change unseen.
    if name == "digits" or (not isinstance(DATASETS[name], str) and not path.exists()):
        arrays = _decoded(name, reader(path, options), options)
        return _dataset(name, arrays, _fingerprint(arrays))

    shape = [options.image_size, options.history, options.horizon, options.seconds]
    key = hashlib.sha256(json.dumps([name, str(path), *shape]).encode()).hexdigest()[:16]
    cache_file = Path(os.path.expanduser(cache_dir or default_cache_dir())) / f"{name}-{key}.safetensors"
    files = digest_of_files(path)
    found = read_cache(cache_file, files)
    if found is not None:
        arrays, written = found
        fingerprint = _fingerprint(arrays)
        if fingerprint == written:
            return _dataset(name, arrays, fingerprint)
        warn_damaged(cache_file, "it does not hold what was written")
    arrays = _decoded(name, reader(path, options), options)
    fingerprint = _fingerprint(arrays)
    write_cache(cache_file, arrays, fingerprint, digest_of_files(path) if options.download else files)
    return _dataset(name, arrays, fingerprint)


def _usual_folder(name: str) -> Path:
    """Where a data set lies unless somebody says otherwise."""
    if name in PACKAGED:
        package, folder = PACKAGED[name]
        found = importlib.util.find_spec(package)  # imports nothing
        if found is not None and found.submodule_search_locations:
            return Path(found.submodule_search_locations[0]) / folder
    return EMBEDDED.get(name, Path("datasets") / name)


def data_differences(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In what two data sets differ, by their fingerprints, in a few words; None if they are the same."""
    for key, what in (("samples", "training samples"), ("test_samples", "test samples"), ("classes", "classes")):
        if then[key] != now[key]:
            return f"{then[key]:,} {what} then, {now[key]:,} now"
    if then["shape"] != now["shape"]:
        return f"samples of shape {then['shape']} then, {now['shape']} now"
    for key, what in (
        ("inputs", "inputs"),
        ("labels", "labels"),
        ("class_names", "classes"),
        ("test_inputs", "test data"),
        ("test_labels", "test data"),
    ):
        if then[key] != now[key]:
            return f"other {what}"
    for key in ("task", "owners", "order", "validation"):  # where there are any
        if then.get(key) != now.get(key):
            return f"another {key}" if key != "owners" else "other owners"
    return None


def validation_split(dataset: Arrays, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(train_ids, val_ids), sorted int64, disjoint: as the data set itself says; or stratified and drawn by seed; or,
    where samples have an order, the latest ``fraction`` for validation, and for training what shares no data with it.
    """
    if dataset.val_n is not None:
        return (~dataset.val_n).nonzero().squeeze(1), dataset.val_n.nonzero().squeeze(1)
    if dataset.order_n is None:
        return split_validation(dataset.task.strata(dataset.targets_n), fraction, seed)
    order_n = dataset.order_n
    first = order_n.sort().values[min(len(order_n) - 1, int((1 - fraction) * len(order_n)))]
    train_ids, val_ids = ((part).nonzero().squeeze(1) for part in (order_n <= first - dataset.gap, order_n >= first))
    if len(train_ids) == 0:
        raise UsageError(
            f"--val_fraction {fraction:g} leaves no training sample that ends before the validation begins: take less, "
            "or a longer series"
        )
    return train_ids, val_ids


def split_validation(labels_n: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split sample ids 0..n-1 into (train_ids, val_ids), sorted int64, disjoint and complete.

    Of each class with c samples round(fraction * c) go to validation; of a class with two or more, at least
    one goes to each side; a single sample stays in train. A pure function of (labels, fraction, seed).
    Raises UsageError where nothing can go to validation.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"the validation fraction must lie between 0 and 1, not {fraction}")
    place_n, size_n = _places_in_class(labels_n, _ranks(labels_n, seed))
    in_val_n = place_n < _stratified(size_n, fraction)
    if not in_val_n.any():
        raise UsageError("no sample can be kept for validation, as no class has two; add training samples")
    return (~in_val_n).nonzero().squeeze(1), in_val_n.nonzero().squeeze(1)


def subset(labels_n: Tensor, count: int, seed: int) -> Tensor:
    """Sorted ids of ``count`` samples (all, if there are no more), each class with its share of them.

    These are the samples that :func:`split_validation` draws for the fraction count / n. Its rounding may give
    some too many or too few: then those that add most to their class's share go first, or come last.
    """
    n = len(labels_n)
    if count >= n:
        return torch.arange(n)
    rank_n = _ranks(labels_n, seed)
    place_n, size_n = _places_in_class(labels_n, rank_n)
    drawn_n = place_n < _stratified(size_n, count / n)
    share_n = (place_n + 0.5) / size_n  # Sainte-Lague's rule: the next seat goes to the smallest
    order = np.lexsort((rank_n, share_n, place_n > 0, ~drawn_n))  # by the last key first
    return torch.from_numpy(order[:count]).sort().values


def _ranks(labels_n: Tensor, seed: int) -> Tensor:
    return hash64("validation", seed, torch.arange(len(labels_n)))


def _places_in_class(labels_n: Tensor, rank_n: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's place in its class by rank, from 0, and the size of its class: int64 [n], [n]."""
    place_n, size_n = torch.empty_like(labels_n), torch.empty_like(labels_n)
    for label in labels_n.unique():
        ids = (labels_n == label).nonzero().squeeze(1)
        place_n[ids[rank_n[ids].argsort(stable=True)]] = torch.arange(len(ids))
        size_n[ids] = len(ids)
    return place_n, size_n


def _stratified(size_n: Tensor, fraction: float) -> Tensor:
    """How many samples of a class of this size are the fraction: of two or more at least one, and never all."""
    return torch.minimum((fraction * size_n.double()).round().clamp(min=1), size_n - 1)


def _decoded(name: str, arrays: Arrays, options: ReadOptions) -> Arrays:
    """What a reader gave, checked and resized."""
    _check(name, arrays)
    if not arrays.sources:
        arrays = replace(arrays, sources=tuple(f"train {i}" for i in range(len(arrays.targets_n))))
    if options.image_size is None:
        return arrays
    if not arrays.pictures:
        raise UsageError(f"--image_size is for pictures, and samples of {name} are none: leave it out")
    count, size = len(arrays.inputs_n) + len(arrays.test_inputs_m), options.image_size
    check_memory(count, arrays.channels, size, size)
    inputs_n, test_inputs_m = (resize(part, size) for part in (arrays.inputs_n, arrays.test_inputs_m))
    return replace(arrays, inputs_n=inputs_n, test_inputs_m=test_inputs_m)


def _dataset(name: str, arrays: Arrays, fingerprint: dict[str, Any]) -> Dataset:
    mean_C, std_C = (_channel_statistics if arrays.pictures else _feature_statistics)(arrays.inputs_n)
    return Dataset(**vars(arrays), name=name, mean_C=mean_C, std_C=std_C, fingerprint=fingerprint)


def _fingerprint(arrays: Arrays) -> dict[str, Any]:
    task, owners = arrays.task, arrays.owners
    inputs_n, targets_n, test_inputs_m, test_targets_m = (getattr(arrays, key) for key in TENSORS)
    fingerprint = {
        "samples": len(targets_n),
        "test_samples": len(test_targets_m),
        "shape": list(inputs_n.shape[1:]),
        "classes": task.num_outputs,
        "inputs": digest_tensors({"inputs": inputs_n}),
        "labels": digest_tensors({"labels": targets_n}),
        "test_inputs": digest_tensors({"inputs": test_inputs_m}),
        "test_labels": digest_tensors({"labels": test_targets_m}),
        "class_names": digest_json(task.names),
    }
    if task.kind != Classification.kind:  # what every data set has does not change older runs' digests
        fingerprint["task"] = digest_json(task.record())
    if owners is not None:
        places = {"positions": owners.positions_GX, "test_owners": owners.test_owner_m}
        places = {key: value for key, value in places.items() if value is not None}
        fingerprint["owners"] = digest_json([owners.names, digest_tensors({"owners": owners.owner_n, **places})])
    if arrays.order_n is not None:
        fingerprint["order"] = digest_json([arrays.gap, digest_tensors({"order": arrays.order_n})])
    if arrays.val_n is not None:
        fingerprint["validation"] = digest_tensors({"validation": arrays.val_n})
    return fingerprint


def _check(name: str, arrays: Arrays) -> None:
    """Raises UsageError where inputs, targets and the task do not fit each other."""
    wrong, n = None, len(arrays.targets_n)
    for part, inputs, targets in (
        ("training", arrays.inputs_n, arrays.targets_n), ("test", arrays.test_inputs_m, arrays.test_targets_m)
    ):  # fmt: skip
        fitting = inputs.dtype == (torch.uint8 if arrays.pictures else torch.float32) and inputs.dim() in (3, 4)
        if not fitting:
            wrong = f"the {part} data are neither pictures of bytes nor sequences of numbers"
        elif len(inputs) != len(targets) or len(inputs) == 0:
            wrong = f"there are {len(inputs):,} {part} samples and {len(targets):,} labels"
        else:
            odd = arrays.task.misfit(targets)
            wrong = wrong or (odd and f"{part} {odd}")
    if wrong is None and arrays.inputs_n.shape[1:] != arrays.test_inputs_m.shape[1:]:
        wrong = "training and test samples differ in size"
    if wrong is None and len(arrays.sources) not in (0, n):
        wrong = f"there are {n:,} training samples and {len(arrays.sources):,} names of them"
    if wrong:
        raise UsageError(f"{name}: {wrong}; put the original files there")


def _feature_statistics(inputs_nTF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over what is known, summed in float64."""
    sums = []
    known = inputs_nTF.isfinite().sum((0, 1)).clamp(min=1)
    mean_F = inputs_nTF.double().nansum((0, 1)) / known
    for part in inputs_nTF.split(4096):
        sums.append((part.double() - mean_F).square().nansum((0, 1)))
    std_F = (torch.stack(sums).sum(0) / known).sqrt()
    return mean_F.float(), torch.where(std_F > 0, std_F, 1.0).float()


def _channel_statistics(images_nCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel in [0, 1] units, from integer histograms: exact, so that
    they depend on no thread count or summation order."""
    value = torch.arange(256, dtype=torch.float64)
    mean_C, std_C = [], []
    for channel in range(images_nCHW.shape[1]):
        count = sum(part[:, channel].flatten().bincount(minlength=256) for part in images_nCHW.split(4096))
        weight = count.double() / count.sum()
        mean = float((weight * value).sum())
        std = float((weight * (value - mean) ** 2).sum().sqrt())
        mean_C.append(mean / 255)
        std_C.append(std / 255 or 1.0)
    return torch.tensor(mean_C, dtype=torch.float32), torch.tensor(std_C, dtype=torch.float32)
