"""A folder of pictures whose labels, owners and split are in its manifest.csv (:mod:`data.manifest_table`).

One label in every row makes it a classification, anything else findings (:mod:`data.multilabel`). Samples keep the
order of the rows.

Legend: k rows, n of them train or val rows, C labels.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from data.arrays import Arrays, Owners, ReadOptions
from data.classification import Classification
from data.manifest_table import MANIFEST, Row, checked_rows
from data.multilabel import UNKNOWN, Multilabel
from data.pictures import decode_pictures, displayable, files_under, listed, picture_suffixes
from data.task import Task
from utils.errors import UsageError


def read_manifest(path: Path, options: ReadOptions) -> Arrays:
    """The pictures that ``path``/manifest.csv names. Raises UsageError, in one line, for a row that cannot be right."""
    rows = checked_rows(path / MANIFEST)
    train, test = ([row for row in rows if (row.split == "test") == held_out] for held_out in (False, True))
    learned = [row for row in train if row.split == "train"]
    for split, part in (("train", learned), ("test", test)):
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
    unlearned = sorted(set(names).difference(*(row.labels for row in learned)))
    if unlearned or not names:
        what = f"no training row has the label {unlearned[0]!r}" if names else "no row has a label"
        raise UsageError(f"imagefolder: {path / MANIFEST}: {what}, so nothing can be learned of it: add such rows")
    owners = _owners(path / MANIFEST, train, test)
    task, targets_k = _targets(names, train + test)
    files = [str(path / row.file) for row in train + test]
    images_kCHW = decode_pictures(files, options.image_size, options.progress)
    n, val_n = len(train), None
    if len(learned) < n:
        val_n = torch.tensor([row.split == "val" for row in train])
    return Arrays(
        images_kCHW[:n], targets_k[:n], images_kCHW[n:], targets_k[n:], task, skipped=_unnamed(path, rows),
        sources=tuple(displayable(row.file) for row in train), owners=owners,
        notes=_shared_owners(train, test) + _own_validation(val_n), val_n=val_n,
    )  # fmt: skip


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


def _owners(file: Path, train: list[Row], test: list[Row]) -> Owners | None:
    """Who owns each training row, and each test row where all are of owners that train; None where no row says so."""
    names = sorted({row.group for row in train} - {""})
    if not names:
        return None
    without = next((row for row in train if not row.group), None)
    if without is not None:
        raise UsageError(
            f"imagefolder: line {without.number} of {file} has no group, and other training rows have one: name the "
            "owner of each, or leave the column empty"
        )
    of_tests = None
    if test and all(row.group in names for row in test):
        of_tests = torch.tensor([names.index(row.group) for row in test])
    return Owners(torch.tensor([names.index(row.group) for row in train]), tuple(names), test_owner_m=of_tests)


def _unnamed(path: Path, rows: list[Row]) -> tuple[str, ...]:
    """A note on pictures that no row names; no note where there are none."""
    named = {str(path / row.file) for row in rows}
    pictures = (file for file in files_under(path) if os.path.splitext(file)[1].lower() in picture_suffixes())
    others = sorted(os.path.relpath(file, path) for file in pictures if file not in named)
    if not others:
        return ()
    what = "picture that manifest.csv does not name" if len(others) == 1 else "pictures that manifest.csv does not name"
    return (f"{len(others):,} {what} ({listed(others, most=2)})",)


def _own_validation(val_n: torch.Tensor | None) -> tuple[str, ...]:
    """A note on rows for validation: they take the place of a share of the training rows."""
    if val_n is None:
        return ()
    return (f"validation is on the rows that manifest.csv calls val ({val_n.sum():,}), whatever --val_fraction is",)


def _shared_owners(train: list[Row], test: list[Row]) -> tuple[str, ...]:
    """A note on owners with pictures on both sides: a model that knows an owner's pictures may look better than it is
    for others."""
    both = sorted({row.group for row in train} & {row.group for row in test} - {""})
    if not both:
        return ()
    who = "1 owner has" if len(both) == 1 else f"{len(both):,} owners have"
    return (f"{who} pictures in train and in test, which may flatter the test figures ({listed(both, most=2)})",)
