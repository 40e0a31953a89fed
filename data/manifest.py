"""manifest.csv: a folder of pictures whose labels, owners and split are in a table, a row a picture.

    file,labels,group,split
    a/1.jpg,cat|dog,anna,train
    b/2.jpg,?cat,ben,test

``file`` lies in the folder; ``labels`` are separated by ``|``, '?cat' says that nobody knows whether it is there, an
empty cell that none is; ``group`` (who owns the picture) may be left out. One label in every row makes it a
classification, anything else findings (:mod:`data.multilabel`). Samples keep the order of the rows.

Legend: k rows, n of them train rows, C labels.
"""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from data.arrays import Arrays, Owners, ReadOptions
from data.classification import Classification
from data.multilabel import UNKNOWN, Multilabel
from data.pictures import decode_pictures, displayable, files_under, listed, picture_suffixes
from data.task import Task
from utils.errors import UsageError
from utils.files import read_bytes

MANIFEST = "manifest.csv"
COLUMNS = ("file", "labels", "group", "split")
OPTIONAL = {"group"}
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Row:
    """A row: the picture's path from the folder, what is there, what nobody knows, the owner ('': not said)."""

    number: int
    file: str
    labels: frozenset[str]
    unknown: frozenset[str]
    group: str
    split: str


def read_manifest(path: Path, options: ReadOptions) -> Arrays:
    """The pictures that ``path``/manifest.csv names. Raises UsageError, in one line, for a row that cannot be right."""
    rows = _rows(path / MANIFEST)
    train, test = ([row for row in rows if row.split == split] for split in SPLITS)
    for split, part in zip(SPLITS, (train, test), strict=True):
        if not part:
            raise UsageError(f"imagefolder: {path / MANIFEST} has no row with {split!r} in its column split: add some")
    missing = [row for row in rows if not os.path.isfile(path / row.file)]
    if missing:
        number, file = missing[0].number, missing[0].file
        raise UsageError(
            f"imagefolder: line {number} of {path / MANIFEST}: there is no regular file {file!r} in the "
            f"folder ({len(missing):,} of {len(rows):,} are missing); put it there or delete the row"
        )
    names = sorted(set().union(*(row.labels | row.unknown for row in rows)))
    unlearned = sorted(set(names).difference(*(row.labels for row in train)))
    if unlearned or not names:
        what = f"no training row has the label {unlearned[0]!r}" if names else "no row has a label"
        raise UsageError(f"imagefolder: {path / MANIFEST}: {what}, so nothing can be learned of it: add such rows")
    owners = _owners(path / MANIFEST, train)
    task, targets_k = _targets(names, train + test)
    files = [str(path / row.file) for row in train + test]
    images_kCHW = decode_pictures(files, options.image_size, options.progress)
    n = len(train)
    return Arrays(
        images_kCHW[:n], targets_k[:n], images_kCHW[n:], targets_k[n:], task, skipped=_unnamed(path, rows),
        sources=tuple(displayable(row.file) for row in train), owners=owners, notes=_shared_owners(train, test),
    )  # fmt: skip


def _rows(file: Path) -> list[Row]:
    """The table, each row checked by itself, and no file in two of them."""
    try:
        # Not by lines: a cell in quotes may hold line breaks.
        lines = csv.reader(io.StringIO(read_bytes(file).decode("utf-8-sig"), newline=""), strict=True)
        table = [(lines.line_num, [cell.strip() for cell in cells]) for cells in lines if any(map(str.strip, cells))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"imagefolder: {file} is no CSV text in UTF-8 ({error}): save it as such") from error
    header = [cell.lower() for cell in table[0][1]] if table else []
    odd = [name for name in header if name not in COLUMNS or header.count(name) > 1]
    lacking = [name for name in COLUMNS if name not in header and name not in OPTIONAL]
    if odd or lacking:
        what = f"the column {odd[0]!r} is unknown or there twice" if odd else f"the column {lacking[0]!r} is missing"
        raise UsageError(f"imagefolder: {file}: {what}; its first line must be file,labels,group,split (group or not)")
    rows, seen = [], {}
    for number, cells in table[1:]:
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, and there are {len(header)} columns")
            row = _row(number, dict(zip(header, cells, strict=True)))
            if row.file in seen:
                raise ValueError(f"{row.file!r} is in line {seen[row.file]} already")
        except ValueError as error:
            raise UsageError(f"imagefolder: line {number} of {file}: {error}") from error
        seen[row.file] = number
        rows.append(row)
    return rows


def _row(number: int, cells: dict[str, str]) -> Row:
    """Raises ValueError, saying what is wrong."""
    file, split = cells["file"], cells["split"].lower()
    parts = Path(file).parts
    if not file or os.path.isabs(file) or ".." in parts:
        raise ValueError(f"{file!r} is no path inside the folder")
    if any(part.startswith(".") for part in parts):  # as everywhere; and the cache would not see them change
        raise ValueError(f"{file!r} is hidden (a name that begins with a dot): rename it")
    if split not in SPLITS:
        raise ValueError(f"its split is {split!r}, and must be train or test")
    labels, unknown = [], []
    for label in cells["labels"].split("|") if cells["labels"] else []:
        name = displayable(label.removeprefix("?")).strip()
        if not name or "\0" in name:
            raise ValueError(f"an empty label in {cells['labels']!r}")
        (unknown if label.strip().startswith("?") else labels).append(name)
    if len(set(labels + unknown)) < len(labels + unknown):
        raise ValueError(f"a label is there twice in {cells['labels']!r}")
    group = displayable(cells.get("group", ""))
    return Row(number, os.path.normpath(file), frozenset(labels), frozenset(unknown), group, split)


def _targets(names: list[str], rows: list[Row]) -> tuple[Task, torch.Tensor]:
    """int64 [rows] where every row has one label and nothing is unknown, else uint8 [rows, C]."""
    column = {name: c for c, name in enumerate(names)}
    if all(len(row.labels) == 1 and not row.unknown for row in rows):
        return Classification(names), torch.tensor([column[name] for row in rows for name in row.labels])
    targets = torch.zeros(len(rows), len(names), dtype=torch.uint8)
    for i, row in enumerate(rows):
        targets[i, [column[name] for name in sorted(row.labels)]] = 1
        targets[i, [column[name] for name in sorted(row.unknown)]] = UNKNOWN
    return Multilabel(names), targets


def _owners(file: Path, train: list[Row]) -> Owners | None:
    """Who owns each training row; None where no row says so."""
    names = sorted({row.group for row in train} - {""})
    if not names:
        return None
    without = next((row for row in train if not row.group), None)
    if without is not None:
        raise UsageError(
            f"imagefolder: line {without.number} of {file} has no group, and other training rows have one: name the "
            "owner of each, or leave the column empty"
        )
    return Owners(torch.tensor([names.index(row.group) for row in train]), tuple(names))


def _unnamed(path: Path, rows: list[Row]) -> tuple[str, ...]:
    """A note on pictures that no row names; no note where there are none."""
    named = {str(path / row.file) for row in rows}
    pictures = (file for file in files_under(path) if os.path.splitext(file)[1].lower() in picture_suffixes())
    others = sorted(os.path.relpath(file, path) for file in pictures if file not in named)
    if not others:
        return ()
    what = "picture that manifest.csv does not name" if len(others) == 1 else "pictures that manifest.csv does not name"
    return (f"{len(others):,} {what} ({listed(others, most=2)})",)


def _shared_owners(train: list[Row], test: list[Row]) -> tuple[str, ...]:
    """A note on owners with pictures on both sides: a model that knows an owner's pictures may look better than it is
    for others."""
    both = sorted({row.group for row in train} & {row.group for row in test} - {""})
    if not both:
        return ()
    who = "1 owner has" if len(both) == 1 else f"{len(both):,} owners have"
    return (f"{who} pictures in train and in test, which may flatter the test figures ({listed(both, most=2)})",)
