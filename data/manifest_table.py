"""manifest.csv as a table: what its columns and rows are, how it is read, checked and written.

    file,labels,group,split
    a/1.jpg,cat|dog,anna,train
    b/2.jpg,?cat,ben,test

``file`` lies in the folder; ``labels`` are separated by ``|``, '?cat' says that nobody knows whether it is there, an
empty cell that none is; ``group`` (who owns the picture) may be left out. ``split`` is train, val or test; where no row
is val, main.py takes its --val_fraction of the training rows. ``sha256``, ``width`` and ``height`` (pixels), which
``python -m data.index`` writes, may be there; no run reads them.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.pictures import displayable
from utils.errors import UsageError
from utils.files import read_bytes, replaced

MANIFEST = "manifest.csv"
COLUMNS = ("file", "labels", "group", "split", "sha256", "width", "height")
NOT_READ = {"sha256", "width", "height"}
OPTIONAL = {"group", *NOT_READ}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Row:
    """A row: the picture's path from the folder, what is there, what nobody knows, the owner ('': not said)."""

    number: int
    file: str
    labels: frozenset[str]
    unknown: frozenset[str]
    group: str
    split: str


def write_table(file: Path, rows: Iterable[Sequence[object]], header: Sequence[str] = COLUMNS) -> None:
    """Write a table, atomically. Raises OSError where the disk refuses; then an old one stays."""
    with replaced(file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def checked_rows(file: Path) -> list[Row]:
    """The rows, each checked by itself, and no file in two of them."""
    header, table = read_table(file)
    rows, seen = [], {}
    for number, cells in table:
        try:
            row = _row(number, dict(zip(header, cells, strict=True)))
            if row.file in seen:
                raise ValueError(f"{row.file!r} is in line {seen[row.file]} already")
        except ValueError as error:
            raise UsageError(f"imagefolder: line {number} of {file}: {error}") from error
        seen[row.file] = number
        rows.append(row)
    return rows


def read_table(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of the columns, and each row: the number of its line, and its cells. Raises UsageError for what is no
    such table."""
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
    for number, cells in table[1:]:
        if len(cells) != len(header):
            what = f"{len(cells)} cells, and there are {len(header)} columns"
            raise UsageError(f"imagefolder: line {number} of {file}: {what}")
    return header, table[1:]


def _row(number: int, cells: dict[str, str]) -> Row:
    """Raises ValueError, saying what is wrong."""
    file, split = cells["file"], cells["split"].lower()
    parts = Path(file).parts
    if not file or os.path.isabs(file) or ".." in parts:
        raise ValueError(f"{file!r} is no path inside the folder")
    if any(part.startswith(".") for part in parts):  # as everywhere; and the cache would not see them change
        raise ValueError(f"{file!r} is hidden (a name that begins with a dot): rename it")
    if split not in SPLITS:
        raise ValueError(f"its split is {split!r}, and must be train, val or test")
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
