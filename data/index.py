"""Make a table of a folder of pictures: FOLDER/manifest.csv, by which main.py trains.

    file,labels,group,split,sha256,width,height
    images_001/images/00000001_000.png,Cardiomegaly|Effusion,,train,9f86...,1024,1024

sources (--layout; auto: what is there):
  folders    FOLDER/<class>/..., or FOLDER/train/<class>/... with test/ and val/ beside train/
  nih        ChestX-ray14: Data_Entry_2017.csv, and train_val_list.txt and test_list.txt where they are there
  chexpert   train.csv and valid.csv: 1 is a finding, -1 is unknown ('?Edema'), 0 and empty are none
  mimic      MIMIC-CXR-JPG: mimic-cxr-2.0.0-chexpert.csv.gz, mimic-cxr-2.0.0-split.csv.gz, files/p10/p10000032/...

splits: a patient is in one of train, val and test. What a source says is kept; where it names no test (or no val)
pictures, whole patients are drawn from the training part. Validation pictures are the test part where there is no
other. Class folders say nothing of patients: there single pictures are drawn, and val is left to main.py.

group is who owns a picture: an institution, each of which main.py --partition natural makes a worker. It is not the
patient, unless you say so, since every patient would be a worker then.

Pictures that are missing, damaged, or have a label that the source does not know are left out, and listed at the end.

examples:
  python -m data.index PICTURES
  python -m data.index NIH --labels Effusion Mass Nodule --val_fraction 0.1 --seed 1
  python -m data.index CHEXPERT --group column:Sex --strict
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data.picture_work import LeftOut, begin_work, given_folder, in_threads, parser_of, run, say
from utils.errors import UsageError, unknown_name
from utils.parser import Parser

if TYPE_CHECKING:
    from data.medical_tables import Entry, Listing

LAYOUTS = ("auto", "folders", "nih", "chexpert", "mimic")
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FRACTIONS = {"val": 0.1, "test": 0.2}  # of the patients, unless asked for others


@dataclass(frozen=True)
class Indexed:
    """A row of the table: the entry, its part, and what its file holds (pixels upright)."""

    entry: Entry
    part: str
    sha256: str
    width: int
    height: int


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table. Returns the exit code: 0, or 2 where the user has to change something."""
    return run(_parser(), index, argv, "nothing was written")


def _parser() -> Parser:
    parser = parser_of("data.index", __doc__)
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="what FOLDER holds [auto]")
    parser.add_argument("--out", metavar="FILE", help="the table (default: FOLDER/manifest.csv, where main.py looks)")
    parser.add_argument("--overwrite", action="store_true", help="replace a table that is there")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="these findings or classes alone (default: all)")
    parser.add_argument(
        "--group", default="none", metavar="WHAT",
        help="who owns a picture: none, patient, folder (below the class; of tables: the first in which not all "
        "pictures lie), column:NAME of the table [none]",
    )  # fmt: skip
    parser.add_argument(
        "--val_fraction", type=float, metavar="X",
        help="share of the patients for validation, where the source has none (default: 0.1; class folders 0)",
    )  # fmt: skip
    parser.add_argument(
        "--test_fraction", type=float, metavar="X", help="share for the test, where the source has none (default: 0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws other patients [0]")
    parser.add_argument("--strict", action="store_true", help="write nothing, and end with 2, if anything is left out")
    return parser


def index(arguments: argparse.Namespace) -> int:
    """From the arguments to the table."""
    from data.manifest_table import MANIFEST, write_table
    from data.medical_tables import Listing
    from data.splits import split

    begin_work()
    folder = given_folder(arguments.folder)
    out = Path(os.path.expanduser(arguments.out)) if arguments.out else folder / MANIFEST
    if os.path.lexists(out) and not arguments.overwrite:
        raise UsageError(f"{out} exists: --overwrite replaces it, --out FILE writes another.")
    column = _column(arguments.group)
    _check_fractions(arguments)
    left_out, listing = LeftOut(), Listing.of(folder)
    layout = arguments.layout if arguments.layout != "auto" else _layout_of(listing)
    entries = _chosen(layout, _entries(layout, listing, left_out, column), arguments.labels, left_out)
    entries = _owned(layout, entries, arguments.group, left_out)
    entries = _writable(entries, left_out)
    notes = _notes_on_fractions(arguments, entries)
    fractions = [_fraction(arguments, name, layout) for name in ("val", "test")]
    rows = _examined(split(entries, arguments.seed, *fractions, left_out), folder, arguments, left_out)
    rows = _learnable(layout, rows, left_out)
    _check_parts(rows, folder, left_out)
    lines = left_out.lines()
    if lines and arguments.strict:
        say(lines)
        raise UsageError(f"--strict: {out} is not written, since not everything could be taken (see above).")
    write_table(out, map(_cells, rows))
    say([*notes, *_notes(layout, rows), *lines])
    print(_summary(rows, out))
    return 0


# ---- what is there -----------------------------------------------------------------------------------------------


def _readers() -> dict[str, tuple[Callable, Callable]]:
    """Of each layout with tables: whether it is there, and its reader."""
    from data import medical_tables as tables

    return {
        "nih": (tables.has_nih, tables.read_nih),
        "chexpert": (tables.has_chexpert, tables.read_chexpert),
        "mimic": (tables.has_mimic, tables.read_mimic),
    }


def _layout_of(listing: Listing) -> str:
    found = [name for name, (is_there, _) in _readers().items() if is_there(listing)]
    if len(found) > 1:
        raise UsageError(f"{listing.root} holds tables of {' and '.join(found)}: choose with --layout.")
    return found[0] if found else "folders"


def _entries(layout: str, listing: Listing, left_out: LeftOut, column: str | None) -> list[Entry]:
    """What the source says, each file once. Raises UsageError where there is nothing."""
    if layout == "folders":
        if column is not None:
            raise UsageError("--group column:NAME is for layouts with tables: class folders have no columns.")
        found = read_class_folders(listing, left_out)
    else:
        is_there, read = _readers()[layout]
        if not is_there(listing):
            raise UsageError(f"{listing.root} holds no tables of --layout {layout} (--help says which).")
        found = read(listing, left_out, column)
    entries: dict[str, Entry] = {}
    for entry in found:
        if entry.file in entries:
            left_out.add("the table names them again", entry.file)
        else:
            entries[entry.file] = entry
    if not entries:
        hint = "".join(f"; {line}" for line in left_out.lines())
        raise UsageError(f"{listing.root} holds no pictures that can be indexed as {layout} (--help says which){hint}.")
    return list(entries.values())


def read_class_folders(listing: Listing, left_out: LeftOut) -> list[Entry]:
    """<class>/..., or <part>/<class>/... where one of the folders is called train."""
    from data.medical_tables import Entry

    tops = {file.split(os.sep)[0] for file in listing.pictures if os.sep in file}
    in_parts = any(PARTS.get(top.lower()) == "train" for top in tops)
    entries = []
    for file in listing.pictures:
        *folders, _ = file.split(os.sep)
        part = PARTS.get(folders.pop(0).lower()) if in_parts and folders else None
        if not folders or (in_parts and part is None):
            left_out.add("they lie in no class folder", file)
        else:
            entries.append(Entry(file, (folders[0].strip(),), split=part, group=(folders[1:] or [""])[0]))
    return entries


# ---- which of it, and whose --------------------------------------------------------------------------------------


def _chosen(layout: str, entries: list[Entry], labels: list[str] | None, left_out: LeftOut) -> list[Entry]:
    """The entries with the labels that were asked for. In class folders that is fewer pictures, in tables a picture
    without any of these findings."""
    if labels is None:
        return entries
    known = sorted({label for entry in entries for label in (*entry.labels, *entry.unknown)})
    for label in labels:
        if label not in known:
            raise unknown_name("label", label, known)
    chosen = [
        replace(e, labels=tuple(x for x in e.labels if x in labels), unknown=tuple(x for x in e.unknown if x in labels))
        for e in entries
    ]
    return [entry for entry in chosen if entry.labels or layout != "folders"]


def _column(group: str) -> str | None:
    """The NAME of --group column:NAME. Raises UsageError for a --group that there is not."""
    kind, _, name = group.partition(":")
    if kind == "column" and name:
        return name
    if group not in ("none", "patient", "folder"):
        raise unknown_name("--group", group, ("none", "patient", "folder", "column:NAME"))
    return None


def _owned(layout: str, entries: list[Entry], group: str, left_out: LeftOut) -> list[Entry]:
    """The entries with their owners. A picture whose owner is unknown is left out where others have one."""
    if group == "none":
        return [replace(entry, group="") for entry in entries]
    if group == "patient":
        if layout == "folders":
            raise UsageError("--group patient is for layouts with tables: class folders do not name patients.")
        entries = [replace(entry, group=entry.patient) for entry in entries]
    elif group == "folder" and layout != "folders":  # of class folders the reader knows it
        common = os.path.commonpath([os.path.dirname(entry.file) for entry in entries])
        places = [os.path.relpath(entry.file, common or os.curdir).split(os.sep) for entry in entries]
        entries = [
            replace(entry, group=place[0] if place[1:] else "") for entry, place in zip(entries, places, strict=True)
        ]
    for entry in entries:
        if not entry.group:
            left_out.add(f"no owner by --group {group}", entry.file)
    owned = [entry for entry in entries if entry.group]
    if not owned:
        raise UsageError(f"--group {group}: no picture has an owner by that.")
    return owned


def _writable(entries: list[Entry], left_out: LeftOut) -> list[Entry]:
    """Those whose names a table can hold, and main.py reads back as they are."""

    def readable(text: str) -> bool:
        from data.pictures import displayable

        return text == text.strip() == displayable(text) and "\0" not in text and "\ufffd" not in text

    kept = []
    for entry in entries:
        labels = (*entry.labels, *entry.unknown)
        plain = all(readable(label) and label and "|" not in label and label[0] != "?" for label in labels)
        if plain and readable(entry.file) and readable(entry.group):
            kept.append(entry)
        else:
            left_out.add("names that no table can hold (|, line breaks, ? or spaces at an end, no UTF-8)", entry.file)
    return kept


# ---- the parts ---------------------------------------------------------------------------------------------------


def _check_fractions(arguments: argparse.Namespace) -> None:
    values = [getattr(arguments, f"{name}_fraction") for name in FRACTIONS]
    for name, value in zip(FRACTIONS, values, strict=True):
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"--{name}_fraction {value:g}: give a share from 0 to below 1.")
    if sum(FRACTIONS[n] if v is None else v for n, v in zip(FRACTIONS, values, strict=True)) >= 1:
        raise UsageError("--val_fraction and --test_fraction leave nothing to train on: together they must be below 1.")
    if not -(2**63) <= arguments.seed < 2**63:
        raise UsageError(f"--seed {arguments.seed}: give a number of at most 63 bits.")


def _fraction(arguments: argparse.Namespace, name: str, layout: str) -> float:
    asked = getattr(arguments, f"{name}_fraction")
    if asked is not None:
        return asked
    return 0.0 if (layout, name) == ("folders", "val") else FRACTIONS[name]


def _notes_on_fractions(arguments: argparse.Namespace, entries: list[Entry]) -> list[str]:
    """What the source decides: which flags do nothing, and what is the test part."""
    given = {entry.split for entry in entries}
    notes = []
    if given >= {"val"} and "test" not in given:
        given = (given - {"val"}) | {"test"}
        notes.append("the source names no test pictures: those for validation are the test part")
    notes += [
        f"--{name}_fraction has no effect: the source says which pictures these are"
        for name in FRACTIONS
        if name in given and getattr(arguments, f"{name}_fraction") is not None
    ]
    return notes


def _check_parts(rows: list[Indexed], folder: Path, left_out: LeftOut) -> None:
    """Raises UsageError where there is nothing to train on or to test with: main.py needs both."""
    parts = {row.part for row in rows}
    for part in ("train", "test"):
        if part not in parts:
            hint = "".join(f"; {line}" for line in left_out.lines())
            raise UsageError(
                f"{folder}: no picture is left for the {part} part, and main.py needs some: other fractions, or "
                f"another --seed{hint}."
            )


# ---- the pictures ------------------------------------------------------------------------------------------------


def _examined(
    entries: list[tuple[Entry, str]], folder: Path, arguments: argparse.Namespace, left_out: LeftOut
) -> list[Indexed]:
    """Every picture read as main.py will read it; the damaged ones are left out."""
    import hashlib

    from data.pictures import read_picture
    from utils.progress import bar

    def examine(pair: tuple[Entry, str]) -> Indexed | str:
        entry, part = pair
        try:
            picture = read_picture(str(folder / entry.file), enough=1)
        except UsageError:
            return entry.file
        return Indexed(entry, part, hashlib.sha256(picture.content).hexdigest(), *picture.size)

    rows = []
    with bar(len(entries), "reading", "picture", arguments.quiet) as ticks:
        for found in in_threads(examine, entries, arguments.workers):
            ticks.update(1)
            if isinstance(found, str):
                left_out.add("they are damaged, or too large to decode", found)
            else:
                rows.append(found)
    return rows


def _learnable(layout: str, rows: list[Indexed], left_out: LeftOut) -> list[Indexed]:
    """The rows without labels that no training row has: nothing can be learned of them, and main.py refuses them. A
    picture of a class that is not learned goes with it."""
    learned = {label for row in rows if row.part == "train" for label in row.entry.labels}
    kept, lost = [], Counter()
    for row in rows:
        labels, unknown = (tuple(x for x in names if x in learned) for names in (row.entry.labels, row.entry.unknown))
        lost.update(set(row.entry.labels + row.entry.unknown) - learned)
        if labels or layout != "folders":
            kept.append(replace(row, entry=replace(row.entry, labels=labels, unknown=unknown)))
    for label in sorted(lost):
        what = "pictures of the class" if layout == "folders" else "the finding"
        left_out.add_line(f"left out {what} {label!r} ({lost[label]:,} in all): no training picture has it for certain")
    return kept


def _cells(row: Indexed) -> tuple[str | int, ...]:
    """As COLUMNS of :mod:`data.manifest` has them."""
    labels = "|".join([*row.entry.labels, *(f"?{label}" for label in row.entry.unknown)])
    return row.entry.file, labels, row.entry.group, row.part, row.sha256, row.width, row.height


# ---- what is said ------------------------------------------------------------------------------------------------


def _notes(layout: str, rows: list[Indexed]) -> list[str]:
    """What somebody who trains on the table should know."""
    notes = []
    parts_of: dict[str, set[str]] = {}
    for row in rows:
        parts_of.setdefault(row.sha256, set()).add(row.part)
    if twice := sum(len(parts) > 1 for parts in parts_of.values()):
        what = "picture" if twice == 1 else "pictures"
        notes.append(f"byte for byte in several of train, val and test: {twice:,} {what}")
    if layout != "folders" and all(len(row.entry.labels) == 1 and not row.entry.unknown for row in rows):
        notes.append("every picture has exactly one finding: main.py takes that for a classification")
    return notes


def _summary(rows: list[Indexed], out: Path) -> str:
    from data.pictures import displayable

    count = Counter(row.part for row in rows)
    parts = ", ".join(f"{part} {count[part]:,}" for part in ("train", "val", "test") if count[part])
    labels = {label for row in rows for label in row.entry.labels}
    patients, owners = ({getattr(row.entry, name) for row in rows} - {""} for name in ("patient", "group"))
    also = "".join(f", {len(n):,} {what}" for n, what in ((patients, "patients"), (owners, "owners")) if n)
    return f"{displayable(str(out))}: {len(rows):,} pictures ({parts}), {len(labels):,} labels{also}"


if __name__ == "__main__":
    sys.exit(main())
