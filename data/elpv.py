"""ELPV: solar cells in electroluminescence, functional or defective (Buerhop-Lutz et al. 2018; Deitsch et al. 2019).

2,624 cells of 44 photovoltaic modules, grey, 300 x 300 pixels, in the package ``elpv-dataset`` (CC BY-NC-SA 4.0): its
labels.csv has a line a cell, with its file, the probability of a defect (0, 1/3, 2/3 or 1) and its type.

Legend: k cells.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from data.arrays import Arrays, Owners, ReadOptions
from data.classification import Classification
from data.pictures import decode_pictures
from utils.errors import UsageError
from utils.files import read_bytes

CLASSES = ("functional", "defective")
TYPES = ("mono", "poly")  # crystalline
TEST_SHARE = 0.25  # as in Deitsch et al. 2019, by class and type
HOW = "pip install elpv-dataset (91 MB, CC BY-NC-SA 4.0), or name its data folder with --dataset_path"


def elpv(path: Path, options: ReadOptions) -> Arrays:
    """Cells of the package's ``data`` folder; defective are those whose probability of a defect is above 1/2.

    A fixed quarter of the cells is the test set, stratified by class and type. Which module a cell is from is not
    published, so cells of one module may lie on both sides, as in the papers. Owners are the two types.
    """
    if not (path / "labels.csv").is_file():
        raise UsageError(f"elpv: no labels.csv in {path}: {HOW}")
    rows_k = _rows(path / "labels.csv")
    missing = [name for name, _, _ in rows_k if not (path / name).is_file()]
    if missing:
        raise UsageError(f"elpv: {path / missing[0]} is missing: {HOW}")
    images_kCHW = decode_pictures([str(path / name) for name, _, _ in rows_k], options.image_size, options.progress)
    labels_k = torch.tensor([int(probability > 0.5) for _, probability, _ in rows_k])
    types_k = torch.tensor([TYPES.index(kind) for _, _, kind in rows_k])
    from data.dataset_loader import split_validation

    train, test = split_validation(len(TYPES) * labels_k + types_k, TEST_SHARE, seed=0)
    return Arrays(
        images_kCHW[train], labels_k[train], images_kCHW[test], labels_k[test], Classification(CLASSES),
        sources=tuple(rows_k[i][0] for i in train.tolist()), owners=Owners(types_k[train], TYPES),
    )  # fmt: skip


def _rows(file: Path) -> list[tuple[str, float, str]]:
    """File, probability of a defect and type of each cell."""
    rows = []
    lines = io.StringIO(read_bytes(file).decode("utf-8", "replace"))
    for number, line in enumerate(lines, start=1):
        try:
            name, probability, kind = line.split()
            rows.append((name, float(probability), kind))
            if not 0 <= rows[-1][1] <= 1 or kind not in TYPES or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError
        except ValueError as error:
            raise UsageError(
                f"elpv: line {number} of {file} is no file, probability and type ({' or '.join(TYPES)}): {HOW}"
            ) from error
    if not rows:
        raise UsageError(f"elpv: {file} is empty: {HOW}")
    return rows
