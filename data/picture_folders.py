"""Data sets that are folders of pictures: your own, and TinyImageNet.

Legend: n train samples, k = n + m train and test samples, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import torch
from tqdm import tqdm

from data.arrays import Arrays, ReadOptions
from data.classification import Classification
from data.manifest import read_manifest
from data.manifest_table import MANIFEST
from data.pictures import decode_pictures, displayable, find_pictures, listed, say_skipped
from utils.errors import UsageError

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def imagefolder(path: Path, options: ReadOptions) -> Arrays:
    """Any pictures laid out as ``path``/train/<class>/* and ``path``/test/<class>/*, in subfolders too; or as
    ``path``/manifest.csv says, where there is one (:mod:`data.manifest_table`)."""
    if os.path.lexists(path / MANIFEST):
        return read_manifest(path, options)
    train, test, names, others = labelled_files("imagefolder", path, find_pictures, "picture")
    return _read_pictures("imagefolder", path, train, test, names, others, options)


def labelled_files(
    name: str, path: Path, find: Callable[[Path], tuple[list[str], list[str]]], what: str
) -> tuple[list[tuple[str, int]], list[tuple[str, int]], tuple[str, ...], list[str]]:
    """What lies in ``path``/train/<class> and ``path``/test/<class>: pairs (file, label) of both parts, the names of
    the classes, and other files. ``find``: of a folder, the files that are a ``what`` and those that are none."""
    splits, others = [], []
    for part in ("train", "test"):
        if not (path / part).is_dir():
            listed_too = f", or a {MANIFEST}" if name == "imagefolder" else ""
            raise UsageError(
                f"{name}: no folder {path / part}; expected are {what}s in {path}/train/<class>/ and "
                f"{path}/test/<class>/{listed_too} (--dataset_path names the folder; there is nothing to download)"
            )
        folders, beside = _entries(path / part)
        found = {folder.name: find(folder) for folder in folders}
        splits.append({name: files for name, (files, _) in found.items()})
        others += beside + [file for _, rest in found.values() for file in rest]
    beside = [entry for part in _entries(path) for entry in map(str, part)]
    others += [entry for entry in beside if os.path.basename(entry) not in ("train", "test")]
    train, test = splits
    if not train:
        raise UsageError(f"{name}: {path / 'train'} has no class folders; expected train/<class>/<{what}>")
    if train.keys() != test.keys():
        odd = listed(sorted(train.keys() ^ test.keys()), most=10)
        raise UsageError(f"{name}: these classes are not in both train and test of {path}: {odd}")
    labelled = [[(file, label) for label, one in enumerate(train) for file in split[one]] for split in splits]
    names = tuple(map(displayable, train))
    check_classes(name, *labelled, names, what)
    return *labelled, names, others


def check_classes(
    name: str, train: list[tuple[str, int]], test: list[tuple[str, int]], class_names: tuple[str, ...], what: str
) -> None:
    """Raises UsageError where a class has no file in one of the parts."""
    for part, pairs in (("train", train), ("test", test)):
        without = set(range(len(class_names))) - {label for _, label in pairs}
        if without:
            raise UsageError(f"{name}: no {what}s of class {class_names[min(without)]!r} in its {part} folder")


def names_of(pairs: list[tuple[str, int]], path: Path) -> tuple[str, ...]:
    """Where each file lies, from the data set's folder on."""
    return tuple(displayable(file.removeprefix(f"{path}{os.sep}")) for file, _ in pairs)


def tinyimagenet(path: Path, options: ReadOptions) -> Arrays:
    """TinyImageNet-200 in its original layout, in ``path`` or ``path``/tiny-imagenet-200; the val folder,
    whose labels are public, is the test set. Names are the first word of words.txt where it is there."""
    if options.download:
        try:
            return _tinyimagenet(path, options)
        except UsageError:
            fetch_tinyimagenet(path, TINY_IMAGENET_URL, TINY_IMAGENET_MD5, options.progress)
    return _tinyimagenet(path, options)


def _tinyimagenet(path: Path, options: ReadOptions) -> Arrays:
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
    return _read_pictures("tinyimagenet", path, train, test, tuple(names.values()), others + rest, options)


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
    path: Path,
    train: list[tuple[str, int]],
    test: list[tuple[str, int]],
    class_names: tuple[str, ...],
    others: list[str],
    options: ReadOptions,
) -> Arrays:
    """Decode (file, label) pairs; both parts get the same size and number of channels. ``path``: the data set's
    folder; ``others``: files that lie there too."""
    check_classes(name, train, test, class_names, "picture")
    images_kCHW = decode_pictures([file for file, _ in train + test], options.image_size, options.progress)
    labels_k = torch.tensor([label for _, label in train + test])
    n = len(train)
    parts = images_kCHW[:n], labels_k[:n], images_kCHW[n:], labels_k[n:]
    return Arrays(*parts, Classification(class_names), say_skipped(others), names_of(train, path))
