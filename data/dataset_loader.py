"""Data sets as tensors: read once, cached, with a sample id (= row of ``images_nCHW``) that never changes.

To add a data set, write a reader in data/sources.py and add a line to ``DATASETS``.

Legend: n train samples, m test samples, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import sources
from data.pictures import check_memory, files_under
from data.sources import Arrays
from data.transforms import resize
from utils.digest import digest_json, digest_tensors
from utils.errors import UsageError, choose
from utils.random import hash64

CACHE_VERSION = "2"  # raise it when a reader gives other pixels or another order


@dataclass(frozen=True, eq=False)
class Dataset:
    """A whole data set in memory. A train sample's id is its row in ``images_nCHW``: the same for every
    seed, machine and file system. Mean and std are per channel, of the train pixels scaled to [0, 1]."""

    name: str
    images_nCHW: Tensor  # uint8
    labels_n: Tensor  # int64
    test_images_mCHW: Tensor  # uint8
    test_labels_m: Tensor  # int64
    class_names: tuple[str, ...]
    mean_C: Tensor  # float32
    std_C: Tensor  # float32, 1 for a channel that is constant
    fingerprint: dict[str, Any]  # counts and digests of what was loaded, before any corruption
    skipped: tuple[str, ...] = ()  # what was found in its folder and left out, in words

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.images_nCHW.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return tuple(self.images_nCHW.shape[-2:])


def digits(path: Path, image_size: int | None, download: bool, progress: bool) -> Arrays:
    """The 1,797 8x8 digits inside scikit-learn; a fixed stratified 20 % are the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None]  # values are 0..16
    labels = torch.from_numpy(bunch.target).long()
    train, test = split_validation(labels, 0.2, seed=0)
    return Arrays(images[train], labels[train], images[test], labels[test], tuple("0123456789"))


# name -> reader(path, image_size, download, progress)
DATASETS: dict[str, Callable[[Path, int | None, bool, bool], Arrays]] = {
    "digits": digits,
    "svhn": sources.svhn,
    "cifar10": sources.cifar10,
    "cifar100": sources.cifar100,
    "tinyimagenet": sources.tinyimagenet,
    "fashionmnist": sources.fashionmnist,
    "imagefolder": sources.imagefolder,
}


def load_dataset(
    name: str,
    path: str | os.PathLike | None = None,
    image_size: int | None = None,
    download: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Dataset:
    """The data set ``name`` from the folder ``path`` (default ./datasets/<name>; digits need none).

    image_size: resize to image_size x image_size pixels (shorter side, then centre crop).
    download: fetch what is missing. cache_dir: where the decoded tensors are kept, by default
    decentralized-learning in $XDG_CACHE_HOME or ~/.cache. Raises UsageError when the name is unknown, or
    files are missing or damaged, or a download fails.
    """
    reader = choose(DATASETS, name, "data set")
    if image_size is not None and image_size < 1:
        raise UsageError(f"--image_size must be at least 1 pixel, not {image_size}")
    path = Path(os.path.abspath(os.path.expanduser(path or Path("datasets") / name)))
    try:
        path.lstat()
    except ValueError as error:  # a zero byte, or half a character
        raise UsageError(f"--dataset_path {str(path)!r} is no path: {error}") from error
    except OSError:
        pass  # the reader says what is missing
    if name == "digits":
        return _decoded(name, reader(path, image_size, download, progress), image_size)

    cache_dir = Path(os.path.expanduser(cache_dir or default_cache_dir()))
    key = hashlib.sha256(json.dumps([name, str(path), image_size]).encode()).hexdigest()[:16]
    cache_file = cache_dir / f"{name}-{key}.safetensors"
    files = _digest_of_files(path)
    dataset = _read_cache(cache_file, name, files)
    if dataset is None:
        dataset = _decoded(name, reader(path, image_size, download, progress), image_size)
        _write_cache(cache_file, dataset, _digest_of_files(path) if download else files)
    return dataset


def default_cache_dir() -> Path:
    """decentralized-learning in $XDG_CACHE_HOME, or in ~/.cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decentralized-learning"
    except RuntimeError as error:
        raise UsageError("no home folder to keep decoded data in; name one in XDG_CACHE_HOME") from error


def data_differences(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In what two data sets differ, by their fingerprints, in a few words; None if they are the same."""
    for key, what in (("samples", "training samples"), ("test_samples", "test samples"), ("classes", "classes")):
        if then[key] != now[key]:
            return f"{then[key]:,} {what} then, {now[key]:,} now"
    if then["shape"] != now["shape"]:
        return f"pictures of shape {then['shape']} then, {now['shape']} now"
    for key, what in (
        ("inputs", "pictures"),
        ("labels", "labels"),
        ("class_names", "classes"),
        ("test_inputs", "test data"),
        ("test_labels", "test data"),
    ):
        if then[key] != now[key]:
            return f"other {what}"
    return None


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


def _decoded(name: str, arrays: Arrays, image_size: int | None) -> Dataset:
    """What a reader gave, checked and resized."""
    _check(name, arrays)
    if image_size is not None:
        images_nCHW, test_images_mCHW = arrays.images_nCHW, arrays.test_images_mCHW
        check_memory(len(images_nCHW) + len(test_images_mCHW), images_nCHW.shape[1], image_size, image_size)
        arrays = arrays._replace(
            images_nCHW=resize(images_nCHW, image_size), test_images_mCHW=resize(test_images_mCHW, image_size)
        )
    return _dataset(name, arrays, _fingerprint(arrays))


def _dataset(name: str, arrays: Arrays, fingerprint: dict[str, Any]) -> Dataset:
    *data, skipped = arrays
    return Dataset(name, *data, *_channel_statistics(arrays.images_nCHW), fingerprint, skipped)


def _fingerprint(arrays: Arrays) -> dict[str, Any]:
    images_nCHW, labels_n, test_images_mCHW, test_labels_m, class_names, _ = arrays
    return {
        "samples": len(labels_n),
        "test_samples": len(test_labels_m),
        "shape": list(images_nCHW.shape[1:]),
        "classes": len(class_names),
        "inputs": digest_tensors({"inputs": images_nCHW}),
        "labels": digest_tensors({"labels": labels_n}),
        "test_inputs": digest_tensors({"inputs": test_images_mCHW}),
        "test_labels": digest_tensors({"labels": test_labels_m}),
        "class_names": digest_json(class_names),
    }


def _check(name: str, arrays: Arrays) -> None:
    """Raises UsageError where pictures, labels and classes do not fit each other."""
    images_nCHW, labels_n, test_images_mCHW, test_labels_m, class_names, _ = arrays
    wrong = None
    for part, images, labels in (("training", images_nCHW, labels_n), ("test", test_images_mCHW, test_labels_m)):
        if images.dim() != 4 or images.dtype != torch.uint8 or labels.dim() != 1 or labels.dtype != torch.int64:
            wrong = f"the {part} data are no pictures of bytes with whole numbers as labels"
        elif len(images) != len(labels) or len(images) == 0:
            wrong = f"there are {len(images):,} {part} pictures and {len(labels):,} labels"
        elif labels.min() < 0 or labels.max() >= len(class_names):
            wrong = f"there are {len(class_names)} classes, and {part} labels from {labels.min()} to {labels.max()}"
    if wrong is None and images_nCHW.shape[1:] != test_images_mCHW.shape[1:]:
        wrong = "training and test pictures differ in size"
    if wrong:
        raise UsageError(f"{name}: {wrong}; put the original files there")


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


# ------------------------------------------------------------------- the cache of decoded tensors

_TENSORS = ("images_nCHW", "labels_n", "test_images_mCHW", "test_labels_m")


def _digest_of_files(folder: Path) -> str:
    """A hash of the names and sizes of all files in the folder (links are followed), and of when they were last written
    or, what archives and ``cp -p`` do not set back, renamed or replaced."""
    lines = []
    for file in files_under(folder):
        with contextlib.suppress(OSError):  # a link that leads nowhere
            status = os.stat(file)
            lines.append(f"{file} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    content = "\n".join([CACHE_VERSION, *sorted(lines)])
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()


def _read_cache(file: Path, name: str, files: str) -> Dataset | None:
    """The cached data set, or None when there is none for these source files; warns if it is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as cached:
            metadata = cached.metadata() or {}
            if metadata.get("files") != files:
                return None
            tensors = [cached.get_tensor(key) for key in _TENSORS]
        names, skipped = (tuple(json.loads(metadata[key])) for key in ("class_names", "skipped"))
        arrays = Arrays(*tensors, names, skipped)
        fingerprint = _fingerprint(arrays)
        if fingerprint != json.loads(metadata["fingerprint"]):
            raise ValueError("it does not hold what was written")
        return _dataset(name, arrays, fingerprint)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        warnings.warn(f"the data cache {file} is damaged and is built anew: {error}", RuntimeWarning, stacklevel=3)
        return None


def _write_cache(file: Path, dataset: Dataset, files: str) -> None:
    """Atomic: a temporary file is renamed when it is complete. Where nothing can be written, it warns."""
    described = ("class_names", "skipped", "fingerprint")
    metadata = {"files": files, **{key: json.dumps(getattr(dataset, key)) for key in described}}
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
        os.close(descriptor)
        save_file({key: getattr(dataset, key).contiguous() for key in _TENSORS}, temporary, metadata)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"decoded data is not cached ({error}); it is decoded anew next time", RuntimeWarning, 3)
        if temporary:
            Path(temporary).unlink(missing_ok=True)
