"""One reader per data set: from its original files on disk to uint8 tensors.

A reader takes (path, options) and returns :class:`Arrays`. The order of the samples,
and so their ids, is the order of the original files (for folders: classes sorted, then file paths sorted);
it depends on no seed, machine or file system. Readers raise UsageError for files that are missing or damaged.
Each named set is downloaded and unpacked by torchvision's class where it has one.

Legend: n train samples, m test samples, k = n + m, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
import math
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from data.arrays import Arrays, ReadOptions
from data.classification import Classification
from utils.errors import UsageError


def digits(path: Path, options: ReadOptions) -> Arrays:
    """The 1,797 8x8 digits inside scikit-learn; a fixed stratified 20 % are the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None]  # values are 0..16
    labels = torch.from_numpy(bunch.target).long()
    from data.dataset_loader import split_validation

    train, test = split_validation(labels, 0.2, seed=0)
    named = tuple(f"load_digits {i}" for i in train.tolist())
    task = Classification("0123456789")
    return Arrays(images[train], labels[train], images[test], labels[test], task, sources=named)


# ------------------------------------------------------------------- sets that torchvision reads


def svhn(path: Path, options: ReadOptions) -> Arrays:
    """Street View House Numbers, 32x32 crops: train_32x32.mat and test_32x32.mat in ``path``."""
    from utils.torchvision_shim import torchvision

    source = torchvision.datasets.SVHN
    files = [(path / source.split_list[split][1], source.split_list[split][2]) for split in ("train", "test")]
    with _one_line_errors("svhn", files, options.download):
        train, test = (source(path, split=split, download=options.download) for split in ("train", "test"))
    images = [torch.from_numpy(np.ascontiguousarray(split.data)) for split in (train, test)]
    labels = [torch.from_numpy(split.labels) for split in (train, test)]
    return Arrays(images[0], labels[0], images[1], labels[1], Classification("0123456789"))


def cifar10(path: Path, options: ReadOptions) -> Arrays:
    """CIFAR-10, the python version: the folder cifar-10-batches-py in ``path``."""
    return _cifar("CIFAR10", path, options.download)


def cifar100(path: Path, options: ReadOptions) -> Arrays:
    """CIFAR-100 with its 100 fine labels: the folder cifar-100-python in ``path``."""
    return _cifar("CIFAR100", path, options.download)


def _cifar(class_name: str, path: Path, download: bool) -> Arrays:
    # torchvision unpickles the batches, after it has compared their MD5 sums with the official ones.
    from utils.torchvision_shim import torchvision

    source = getattr(torchvision.datasets, class_name)
    listed = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
    files = [(path / source.base_folder / file_name, md5) for file_name, md5 in listed]
    with _one_line_errors(class_name.lower(), files, download):
        train, test = (source(path, train=train, download=download) for train in (True, False))
    # back from the HWC view that torchvision makes to the planes of the file
    images = [torch.from_numpy(np.ascontiguousarray(split.data.transpose(0, 3, 1, 2))) for split in (train, test)]
    labels = [torch.tensor(split.targets) for split in (train, test)]
    return Arrays(images[0], labels[0], images[1], labels[1], Classification(train.classes))


def mnist(path: Path, options: ReadOptions) -> Arrays:
    """MNIST: handwritten digits."""
    return _idx("MNIST", path, options.download)


def fashionmnist(path: Path, options: ReadOptions) -> Arrays:
    """Fashion-MNIST: articles of clothing."""
    return _idx("FashionMNIST", path, options.download)


def kmnist(path: Path, options: ReadOptions) -> Arrays:
    """Kuzushiji-MNIST: cursive Japanese characters."""
    return _idx("KMNIST", path, options.download)


def _idx(class_name: str, path: Path, download: bool) -> Arrays:
    """Idx files in ``path``/``class_name``/raw or in ``path`` itself, gzipped or unpacked.

    torchvision reads unpacked files and checks that they exist, no more. So all files must be as long as their
    headers tell. Gzipped ones, which carry a checksum, are preferred; they are unpacked into a temporary folder,
    because the user's may be read-only. (Their MD5 sums are not asked for: distributions compress the same
    files anew.)
    """
    from utils.torchvision_shim import torchvision

    source, utils = getattr(torchvision.datasets, class_name), torchvision.datasets.utils
    raw = path / class_name / "raw"
    files = [(raw / file_name, md5) for file_name, md5 in source.resources]
    names = [file.name for file, _ in files]

    def is_whole(file: Path, md5: str) -> bool:
        return any(_whole_idx(folder, file.name) for folder in (raw, path))

    with tempfile.TemporaryDirectory() as root, _one_line_errors(class_name.lower(), files, download, is_whole):
        places = ([_whole_idx(folder, name) for name in names] for folder in (raw, path))
        found = next((place for place in places if all(place)), [])
        if not found and download:
            for file, md5 in files:
                utils.download_url(source.mirrors[0] + file.name, raw, file.name, md5)
                found.append(file)
        read_from = Path(root) / class_name / "raw"
        read_from.mkdir(parents=True)
        for file in found:
            if file.suffix == ".gz":
                utils.extract_archive(file, read_from)
            else:
                (read_from / file.name).symlink_to(file)
        train, test = (source(root, train=train) for train in (True, False))
    images = [split.data[:, None] for split in (train, test)]
    return Arrays(images[0], train.targets, images[1], test.targets, Classification(source.classes))


def _whole_idx(folder: Path, name: str) -> Path | None:
    """The file ``name`` (NAME.gz) of the folder, or else the unpacked NAME, if it is whole."""
    return next((file for file in (folder / name, folder / name[:-3]) if _is_whole_idx(file)), None)


def _is_whole_idx(file: Path) -> bool:
    """Whether an idx file, gzipped or not, holds bytes and is as long as the dimensions in its header tell."""
    if not file.is_file():
        return False
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as handle:
            content = handle.read()  # to the end, where gzip compares its checksum
    except (OSError, EOFError, zlib.error):
        return False
    dims = 3 if "-images-" in file.name else 1
    start = 4 + 4 * dims
    if len(content) < start or content[:4] != bytes((0, 0, 8, dims)):  # 8: unsigned bytes
        return False
    return len(content) == start + math.prod(np.frombuffer(content, ">u4", dims, offset=4).tolist())


def _has_md5(file: Path, md5: str) -> bool:
    from utils.torchvision_shim import torchvision

    return torchvision.datasets.utils.check_integrity(file, md5)


@contextmanager
def _one_line_errors(
    name: str,
    files: list[tuple[Path, str]],
    download: bool,
    is_whole: Callable[[Path, str], bool] = _has_md5,
) -> Iterator[None]:
    """What torchvision raises when it reads or downloads becomes one line that names the bad files."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        folder, cause = files[0][0].parent, " ".join(str(error).split())
        bad = ", ".join(file.name for file, md5 in files if not is_whole(file, md5))
        if not bad:
            raise UsageError(f"{name}: cannot read the files in {folder}: {cause}") from error
        if download:
            raise UsageError(
                f"could not download {name}: {cause}; check the network, or put {bad} into {folder}"
            ) from error
        raise UsageError(
            f"{name}: missing or damaged in {folder}: {bad}; put the original files there "
            "(--dataset_path names another folder), or fetch them with --download"
        ) from error
