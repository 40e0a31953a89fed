"""One reader per data set: from its original files on disk to uint8 tensors.

A reader takes (path, image_size, download, progress) and returns :class:`Arrays`. The order of the samples,
and so their ids, is the order of the original files (for folders: classes sorted, then file paths sorted);
it depends on no seed, machine or file system. Readers raise UsageError for files that are missing or damaged.
Each named set is downloaded and unpacked by torchvision's class where it has one.

Legend: n train samples, m test samples, k = n + m, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.pictures import decode_pictures, displayable, find_pictures, listed, say_skipped
from utils.errors import UsageError

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


class Arrays(NamedTuple):
    """What a reader returns; images are uint8 [., C, H, W], labels int64. ``skipped``: what the reader found
    and left out, in words."""

    images_nCHW: Tensor
    labels_n: Tensor
    test_images_mCHW: Tensor
    test_labels_m: Tensor
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()


# ------------------------------------------------------------------- sets that torchvision reads


def svhn(path: Path, image_size: int | None, download: bool, progress: bool) -> Arrays:
    """Street View House Numbers, 32x32 crops: train_32x32.mat and test_32x32.mat in ``path``."""
    from utils.torchvision_shim import torchvision

    source = torchvision.datasets.SVHN
    files = [(path / source.split_list[split][1], source.split_list[split][2]) for split in ("train", "test")]
    with _one_line_errors("svhn", files, download):
        train, test = (source(path, split=split, download=download) for split in ("train", "test"))
    images = [torch.from_numpy(np.ascontiguousarray(split.data)) for split in (train, test)]
    labels = [torch.from_numpy(split.labels) for split in (train, test)]
    return Arrays(images[0], labels[0], images[1], labels[1], tuple("0123456789"))


def cifar10(path: Path, image_size: int | None, download: bool, progress: bool) -> Arrays:
    """CIFAR-10, the python version: the folder cifar-10-batches-py in ``path``."""
    return _cifar("CIFAR10", path, download)


def cifar100(path: Path, image_size: int | None, download: bool, progress: bool) -> Arrays:
    """CIFAR-100 with its 100 fine labels: the folder cifar-100-python in ``path``."""
    return _cifar("CIFAR100", path, download)


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
    return Arrays(images[0], labels[0], images[1], labels[1], tuple(train.classes))


def fashionmnist(path: Path, image_size: int | None, download: bool, progress: bool) -> Arrays:
    """Fashion-MNIST, idx files in ``path``/FashionMNIST/raw or in ``path`` itself, gzipped or unpacked.

    torchvision reads unpacked files and checks that they exist, no more. So all files must be as long as their
    headers tell. Gzipped ones, which carry a checksum, are preferred; they are unpacked into a temporary folder,
    because the user's may be read-only. (Their MD5 sums are not asked for: distributions compress the same
    files anew.)
    """
    from utils.torchvision_shim import torchvision

    source, utils = torchvision.datasets.FashionMNIST, torchvision.datasets.utils
    raw = path / "FashionMNIST" / "raw"
    files = [(raw / file_name, md5) for file_name, md5 in source.resources]
    names = [file.name for file, _ in files]

    def is_whole(file: Path, md5: str) -> bool:
        return any(_whole_idx(folder, file.name) for folder in (raw, path))

    with tempfile.TemporaryDirectory() as root, _one_line_errors("fashionmnist", files, download, is_whole):
        places = ([_whole_idx(folder, name) for name in names] for folder in (raw, path))
        found = next((place for place in places if all(place)), [])
        if not found and download:
            for file, md5 in files:
                utils.download_url(source.mirrors[0] + file.name, raw, file.name, md5)
                found.append(file)
        read_from = Path(root) / "FashionMNIST" / "raw"
        read_from.mkdir(parents=True)
        for file in found:
            if file.suffix == ".gz":
                utils.extract_archive(file, read_from)
            else:
                (read_from / file.name).symlink_to(file)
        train, test = (source(root, train=train) for train in (True, False))
    images = [split.data[:, None] for split in (train, test)]
    return Arrays(images[0], train.targets, images[1], test.targets, tuple(source.classes))


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


# ------------------------------------------------------------------- sets that are folders of pictures


def imagefolder(path: Path, image_size: int | None, download: bool, progress: bool) -> Arrays:
    """Any pictures laid out as ``path``/train/<class>/* and ``path``/test/<class>/*, in subfolders too."""
    splits, others = [], []
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise UsageError(
                f"imagefolder: no folder {path / part}; expected are pictures in {path}/train/<class>/ and "
                f"{path}/test/<class>/ (--dataset_path names the folder; there is nothing to download)"
            )
        folders, beside = _entries(path / part)
        found = {folder.name: find_pictures(folder) for folder in folders}
        splits.append({name: pictures for name, (pictures, _) in found.items()})
        others += beside + [file for _, rest in found.values() for file in rest]
    beside = [entry for part in _entries(path) for entry in map(str, part)]
    others += [entry for entry in beside if os.path.basename(entry) not in ("train", "test")]
    train, test = splits
    if not train:
        raise UsageError(f"imagefolder: {path / 'train'} has no class folders; expected train/<class>/<picture>")
    if train.keys() != test.keys():
        odd = listed(sorted(train.keys() ^ test.keys()), most=10)
        raise UsageError(f"imagefolder: these classes are not in both train and test of {path}: {odd}")
    labelled = [[(file, label) for label, name in enumerate(train) for file in split[name]] for split in splits]
    names = tuple(map(displayable, train))
    return _read_pictures("imagefolder", *labelled, names, others, image_size, progress)


def tinyimagenet(path: Path, image_size: int | None, download: bool, progress: bool) -> Arrays:
    """TinyImageNet-200 in its original layout, in ``path`` or ``path``/tiny-imagenet-200; the val folder,
    whose labels are public, is the test set. Names are the first word of words.txt where it is there."""
    if download:
        try:
            return _tinyimagenet(path, image_size, progress)
        except UsageError:
            fetch_tinyimagenet(path, TINY_IMAGENET_URL, TINY_IMAGENET_MD5, progress)
    return _tinyimagenet(path, image_size, progress)


def _tinyimagenet(path: Path, image_size: int | None, progress: bool) -> Arrays:
    root = path / "tiny-imagenet-200"
    root = root if root.is_dir() else path

    def incomplete(what: Path) -> UsageError:
        return UsageError(
            f"tinyimagenet: {what} is missing; expected in {root} is the unpacked tiny-imagenet-200.zip "
            "(wnids.txt, train/<wnid>/images, val/images, val/val_annotations.txt); fetch it with --download"
        )

    for file in (root / "wnids.txt", root / "val" / "val_annotations.txt"):
        if not file.is_file():
            raise incomplete(file)
    classes = sorted(row[0] for row in _rows(root / "wnids.txt", 1))
    if len(set(classes)) < max(1, len(classes)):
        raise UsageError(f"tinyimagenet: {root / 'wnids.txt'} must name classes, each of them once")
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    train, others = [], []
    for wnid, label in label_of.items():
        folder = root / "train" / wnid / "images"
        pictures, rest = find_pictures(folder)
        if not pictures:
            raise incomplete(folder)
        boxes = folder.parent / f"{wnid}_boxes.txt"  # lists every picture of the class: tells a half unpacked one
        named = {row[0] for row in _rows(boxes, 1)} if boxes.is_file() else set()
        if missing := named - {os.path.basename(picture) for picture in pictures}:
            raise incomplete(folder / min(missing))
        train += [(picture, label) for picture in pictures]
        others += rest
    present, rest = find_pictures(root / "val" / "images")
    test = []
    for file_name, wnid, *_ in _rows(root / "val" / "val_annotations.txt", 2):
        if wnid not in label_of:
            raise UsageError(f"tinyimagenet: val_annotations.txt in {root / 'val'} has an unknown class: {wnid!r}")
        test.append((str(root / "val" / "images" / file_name), label_of[wnid]))
    if missing := {picture for picture, _ in test} - set(present):
        raise incomplete(Path(min(missing)))
    names = {wnid: wnid for wnid in classes}
    if (root / "words.txt").is_file():
        names |= {wnid: words.split(",")[0] for wnid, words, *_ in _rows(root / "words.txt", 2) if wnid in names}
    return _read_pictures("tinyimagenet", train, test, tuple(names.values()), others + rest, image_size, progress)


def _rows(file: Path, columns: int) -> list[list[str]]:
    """The rows of a text file of TinyImageNet, blank ones left out, in at least ``columns`` filled columns."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"tinyimagenet: {file} is no UTF-8 text; put the original file there") from error
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines if line.strip()]
    for row in rows:
        if len(row) < columns or not all(row[:columns]):
            raise UsageError(
                f"tinyimagenet: a line of {file} has less than {columns} columns, {' '.join(row)[:40]!r}; "
                "put the original file there"
            )
    return rows


def fetch_tinyimagenet(path: Path, url: str, md5: str, progress: bool = True) -> None:
    """Download the archive and unpack it to ``path``/tiny-imagenet-200.

    The folder appears under its name only when everything is unpacked; an older, incomplete one is moved
    aside to incomplete-*. Raises UsageError when the download fails or is not the original archive.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unpacking-", dir=path) as temporary:
            archive = Path(temporary) / "archive.zip"
            if _download(url, archive, progress) != md5:
                raise OSError("the file is not complete (its MD5 sum is not that of the original)")
            with zipfile.ZipFile(archive) as zipped:
                for member in tqdm(zipped.infolist(), "unpacking", unit="file", disable=not progress):
                    if not member.filename.startswith("tiny-imagenet-200/") or ".." in member.filename:
                        raise OSError(f"the archive holds an unexpected file, {member.filename!r}")
                    zipped.extract(member, temporary)
            target = path / "tiny-imagenet-200"
            if target.exists():
                target.rename(Path(tempfile.mkdtemp(prefix="incomplete-", dir=path)) / target.name)
            (Path(temporary) / target.name).rename(target)
    except (OSError, zipfile.BadZipFile, HTTPException) as error:
        raise UsageError(
            f"could not download tinyimagenet from {url}: {error}; check the network, "
            f"or unpack tiny-imagenet-200.zip into {path}"
        ) from error


def _download(url: str, target: Path, progress: bool) -> str:
    """Copy what ``url`` delivers to ``target``; returns its MD5 sum."""
    md5 = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=60) as response, open(target, "wb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=size, desc=target.name, unit="B", unit_scale=True, disable=not progress) as bar:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                md5.update(chunk)
                bar.update(len(chunk))
    return md5.hexdigest()


def _entries(folder: Path) -> tuple[list[Path], list[str]]:
    """The folders in it, sorted by name, and the other files; hidden ones left out."""
    entries = sorted((e for e in folder.iterdir() if not e.name.startswith(".")), key=lambda e: e.name)
    return [e for e in entries if e.is_dir()], [str(e) for e in entries if not e.is_dir()]


def _read_pictures(
    name: str,
    train: list[tuple[str, int]],
    test: list[tuple[str, int]],
    class_names: tuple[str, ...],
    others: list[str],
    image_size: int | None,
    progress: bool,
) -> Arrays:
    """Decode (file, label) pairs; both parts get the same size and number of channels. ``others``: files that
    lie there too."""
    for part, pairs in (("train", train), ("test", test)):
        without = set(range(len(class_names))) - {label for _, label in pairs}
        if without:
            raise UsageError(f"{name}: no pictures of class {class_names[min(without)]!r} in its {part} folder")
    images_kCHW = decode_pictures([file for file, _ in train + test], image_size, progress)
    labels_k = torch.tensor([label for _, label in train + test])
    n = len(train)
    return Arrays(images_kCHW[:n], labels_k[:n], images_kCHW[n:], labels_k[n:], class_names, say_skipped(others))
