"""The tables of three collections of chest X-rays: which pictures they name, with what findings, of which patient.

NIH ChestX-ray14 (Wang et al. 2017), CheXpert (Irvin et al. 2019), MIMIC-CXR-JPG (Johnson et al. 2019). Each reader
goes through its tables and gives an :class:`Entry` for each picture that is there; the others are left out, with a
reason. Tables lie in the folder itself or one folder below.
"""

from __future__ import annotations

import csv
import fnmatch
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.picture_work import LeftOut
from data.pictures import displayable, find_pictures
from utils.errors import UsageError, unknown_name
from utils.files import LARGEST_FILE, read_bytes

NIH_FINDINGS = frozenset({
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
})  # fmt: skip
CHEXPERT_FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
MISSING = "a table names them, and they are not in the folder"
NO_LIST = "they are neither in train_val_list.txt nor in test_list.txt"
ODD_LABEL = "a label that the data set does not have"
ODD_VALUE = "a finding that is none of 1, 0, -1 and empty"


@dataclass(frozen=True)
class Entry:
    """A picture: its path from the folder, what is there, what nobody knows, whose body it shows ('': not said), the
    split that its source names (train, val, test; None: none), and who owns it ('': not said)."""

    file: str
    labels: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    patient: str = ""
    split: str | None = None
    group: str = ""


@dataclass(frozen=True)
class Listing:
    """What lies in a folder, as one walk has found it: paths from the folder, sorted."""

    root: Path
    pictures: tuple[str, ...]
    others: tuple[str, ...]
    _by_stem: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path) -> Listing:
        """Walk the folder. Raises UsageError where a part of it cannot be read."""
        pictures, others = ([os.path.relpath(file, root) for file in files] for files in find_pictures(root))
        # Backwards, so that the first of several files with one stem counts.
        return cls(root, tuple(pictures), tuple(others), {os.path.splitext(p)[0]: p for p in reversed(pictures)})

    def table(self, pattern: str) -> str | None:
        """The first file of that name (with wildcards) in the folder or one folder below, its .gz too."""
        names = [name for name in self.others if name.count(os.sep) <= 1]
        fitting = [n for n in names if fnmatch.fnmatchcase(os.path.basename(n).removesuffix(".gz"), pattern)]
        return min(fitting, key=lambda name: (name.count(os.sep), name), default=None)

    def picture(self, path: str) -> str | None:
        """The picture at this path, whatever its suffix: a copy of the data may hold it in another format."""
        return self._by_stem.get(os.path.splitext(os.path.normpath(path))[0])


def table_rows(file: Path, needed: Sequence[str], column: str | None = None) -> Iterator[dict[str, str]]:
    """The rows of a CSV file (.gz: compressed), by the names in its first line.

    Raises UsageError where it is no such file or lacks one of the ``needed`` columns, or the ``column`` that the user
    asked for.
    """
    try:
        text = (_unpacked(file) if file.suffix == ".gz" else read_bytes(file)).decode("utf-8-sig")
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = _without_empty_end([cell.strip() for cell in next(lines, [])], 0)
        for name in needed:
            if name not in header:
                raise UsageError(f"{file} has no column {name!r}: is it the original file?")
        if column is not None and column not in header:
            raise unknown_name("column", column, header)
        for cells in lines:
            cells = _without_empty_end(cells, len(header))
            if cells and len(cells) != len(header):
                raise UsageError(
                    f"line {lines.line_num} of {file} has {len(cells)} cells, and there are {len(header)} columns: "
                    "is it the original file?"
                )
            if cells:
                yield dict(zip(header, map(str.strip, cells), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file} is no CSV text in UTF-8 ({error}): is it the original file?") from error


def _without_empty_end(cells: list[str], least: int) -> list[str]:
    """NIH's table has a comma at the end of its lines."""
    return cells[:-1] if len(cells) > least and not cells[-1] else cells


def _unpacked(file: Path) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(read_bytes(file))) as packed:
            content = packed.read(LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{file} is damaged ({error}): fetch it again.") from error
    if len(content) > LARGEST_FILE:
        raise UsageError(f"{file} unpacks to more than {LARGEST_FILE:,} bytes: is it the original file?")
    return content


# ---- NIH ChestX-ray14 --------------------------------------------------------------------------------------------

NIH_TABLE = "Data_Entry_2017*.csv"  # the corrected one is called Data_Entry_2017_v2020.csv


def has_nih(listing: Listing) -> bool:
    """Whether the table of ChestX-ray14 is there."""
    return listing.table(NIH_TABLE) is not None


def read_nih(listing: Listing, left_out: LeftOut, column: str | None = None) -> list[Entry]:
    """ChestX-ray14: Data_Entry_2017.csv, the lists of its split where they are there, pictures in images*/ folders.
    ``column``: of the table, for :attr:`Entry.group`."""
    where = {}
    # Pictures in folders images* first: other folders may hold copies.
    for file in sorted(listing.pictures, key=lambda p: not any(f.startswith("images") for f in Path(p).parts[:-1])):
        where.setdefault(Path(file).stem, file)
    split_of = _nih_split(listing)
    entries = []
    table = _table(listing, NIH_TABLE)
    for row in table_rows(table, ("Image Index", "Finding Labels", "Patient ID"), column):
        name = row["Image Index"]
        labels = tuple(label.strip() for label in row["Finding Labels"].split("|"))
        labels = () if labels == ("No Finding",) else labels
        file = where.get(Path(name).stem)
        if file is None:
            left_out.add(MISSING, name)
        elif odd := [label for label in labels if label not in NIH_FINDINGS]:
            left_out.add(ODD_LABEL, f"{name}: {odd[0] or 'none'}")
        elif split_of is not None and name not in split_of:
            left_out.add(NO_LIST, name)
        else:
            split = split_of[name] if split_of else None
            entries.append(Entry(file, labels, (), row["Patient ID"], split, row.get(column or "", "")))
    return entries


class _Rest(dict):
    """What is in no list, where only one of the two is there."""

    def __init__(self, known: dict[str, str], rest: str) -> None:
        super().__init__(known)
        self.rest = rest

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return self.rest


def _nih_split(listing: Listing) -> dict[str, str] | None:
    """The split of each picture by its name; None where there are no lists."""
    found = {}
    for name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        if (path := listing.table(name)) is not None:
            text = read_bytes(listing.root / path).decode("utf-8-sig", "replace")
            found[split] = {line.strip(): split for line in text.splitlines() if line.strip()}
    if not found:
        return None
    known = {**found.get("train", {}), **found.get("test", {})}
    return known if len(found) == 2 else _Rest(known, "test" if "train" in found else "train")


# ---- CheXpert ----------------------------------------------------------------------------------------------------

CHEXPERT_TABLES = {"train.csv": "train", "valid.csv": "val", "test.csv": "test"}
PATIENT = re.compile(r"patient\w+")


def has_chexpert(listing: Listing) -> bool:
    """Whether one of CheXpert's tables is there: other data have a train.csv too."""
    for name in CHEXPERT_TABLES:
        if (path := listing.table(name)) is not None and b"Path" in _start(listing.root / path):
            return True
    return False


def _start(file: Path) -> bytes:
    with open(file, "rb") as handle:
        return handle.readline(4096)


def read_chexpert(listing: Listing, left_out: LeftOut, column: str | None = None) -> list[Entry]:
    """CheXpert: train.csv and valid.csv. Paths in them begin with the name of the data set's folder, whatever that is
    called now."""
    entries = []
    for name, split in CHEXPERT_TABLES.items():
        if (path := listing.table(name)) is None:
            continue
        for row in table_rows(listing.root / path, ("Path", *CHEXPERT_FINDINGS), column):
            parts = Path(row["Path"]).parts
            file = listing.picture(os.path.join(os.path.dirname(path), *parts[1:])) if len(parts) > 1 else None
            patient = next(filter(PATIENT.fullmatch, parts), "")
            if file is None:
                left_out.add(MISSING, row["Path"])
            elif not patient:
                left_out.add("no folder in their path is called patient...", row["Path"])
            elif (found := _findings(row)) is None:
                left_out.add(ODD_VALUE, row["Path"])
            else:
                entries.append(Entry(file, *found, patient, split, row.get(column or "", "")))
    return entries


def _findings(row: dict[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """What is there (1), and what is uncertain (-1); 0 and empty (not mentioned) are not there. None: a cell is none of
    these."""
    try:
        value_of = {name: float(row[name] or 0) for name in CHEXPERT_FINDINGS}
    except ValueError:
        return None
    if not set(value_of.values()) <= {0, 1, -1}:
        return None
    there, unknown = (tuple(name for name, value in value_of.items() if value == v) for v in (1, -1))
    return there, unknown


# ---- MIMIC-CXR-JPG -----------------------------------------------------------------------------------------------

MIMIC_LABELS, MIMIC_SPLIT = "mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-split.csv"
MIMIC_SPLITS = {"train": "train", "validate": "val", "test": "test"}
MIMIC_PICTURE = re.compile(r"(?:.*/)?files/p\d\d/p(\d+)/s(\d+)/([^/]+)\.\w+")


def has_mimic(listing: Listing) -> bool:
    """Whether the table of findings is there."""
    return listing.table(MIMIC_LABELS) is not None


def read_mimic(listing: Listing, left_out: LeftOut, column: str | None = None) -> list[Entry]:
    """MIMIC-CXR-JPG: findings by study, a split by picture. Without the table of the split: the pictures in files/."""
    table = _table(listing, MIMIC_LABELS)
    studies = {}
    for row in table_rows(table, ("subject_id", "study_id", *CHEXPERT_FINDINGS), column):
        studies[row["subject_id"], row["study_id"]] = (_findings(row), row.get(column or "", ""))
    entries = []
    for file, name, patient, study, split in _mimic_pictures(listing):
        findings, group = studies.get((patient, study), ((), ""))
        if file is None:
            left_out.add(MISSING, name)
        elif findings == ():
            left_out.add("the table of findings does not have their study", name)
        elif findings is None:
            left_out.add(ODD_VALUE, name)
        elif split is not None and split not in MIMIC_SPLITS:
            left_out.add("a split that is none of train, validate and test", f"{name}: {split}")
        else:
            entries.append(Entry(file, *findings, patient, MIMIC_SPLITS.get(split or ""), group))
    return entries


def _mimic_pictures(listing: Listing) -> Iterator[tuple[str | None, str, str, str, str | None]]:
    """Each picture: its path (None: missing), what to call it, its patient, its study, its split."""
    path = listing.table(MIMIC_SPLIT)
    if path is None:
        for file in listing.pictures:
            if found := MIMIC_PICTURE.fullmatch(file):
                patient, study, name = found.groups()
                yield file, name, patient, study, None
        return
    for row in table_rows(listing.root / path, ("dicom_id", "study_id", "subject_id", "split")):
        patient, study, name = row["subject_id"], row["study_id"], row["dicom_id"]
        place = f"files/p{patient[:2]}/p{patient}/s{study}/{name}"
        yield listing.picture(os.path.join(os.path.dirname(path), f"{place}.jpg")), place, patient, study, row["split"]


def _table(listing: Listing, pattern: str) -> Path:
    path = listing.table(pattern)
    if path is None:
        raise UsageError(f"there is no {pattern} in {displayable(str(listing.root))}, nor one folder below.")
    return listing.root / path
