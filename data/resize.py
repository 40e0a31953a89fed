"""Store a folder of pictures smaller, under the same names in another folder.

The shorter side becomes --side pixels, the longer one follows; nothing is cut off and nothing enlarged: a picture that
is small enough already is copied as it is, where it keeps its format. The others are stored as main.py would read
them: upright, grey or RGB, 8 bits a channel, without metadata; main.py --image_size then cuts out the centre.

--format same keeps .jpg, .png, .bmp, .tif and .webp (by the name of the file); pictures in other formats become .png.
JPEG and WebP are stored with quality 95.

FOLDER/manifest.csv is carried over, if there is one: with the new names, and, where it has these columns, the new
sha256, width and height. Other files are not: make the table first (python -m data.index). Damaged pictures are listed
at the end, and left out of the table.

The same command again goes on after a kill: a picture that is finished is not made again, unless its original was
written since. At most the pictures in flight are lost.

examples:
  python -m data.resize PICTURES SMALL --side 256
  python -m data.resize NIH NIH-256 --side 256 --format jpg --workers 8
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.picture_work import LeftOut, begin_work, given_folder, in_threads, parser_of, run, say
from utils.errors import UsageError
from utils.parser import Parser

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
ASKED = {"png": ".png", "jpg": ".jpg"}  # --format, and the suffix that it gives
SAVED_WITH = {"JPEG": {"quality": 95}, "WEBP": {"quality": 95}, "TIFF": {"compression": "tiff_lzw"}}
DONE = ("pictures made", "copied", "there already")
SETTINGS = ".resize.json"  # in OUT, hidden from readers of pictures: what made it
HALF_WRITTEN = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # as utils.files.replaced calls them


@dataclass(frozen=True)
class Stored:
    """What became of a picture (one of :data:`DONE`); and its file in OUT, where that was asked."""

    how: str
    sha256: str = ""
    width: int = 0
    height: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Store the pictures. Returns the exit code: 0, or 2 where the user has to change something."""
    return run(_parser(), resize, argv, "the same command goes on with the pictures that are not finished")


def _parser() -> Parser:
    parser = parser_of("data.resize", __doc__)
    parser.add_argument("out", metavar="OUT", help="where they go: a new folder, or one that the same command has made")
    parser.add_argument("--side", type=int, default=256, metavar="N", help="pixels of the shorter side [256]")
    parser.add_argument("--format", choices=("same", *ASKED), default="same", help="what they are stored as [same]")
    return parser


def resize(arguments: argparse.Namespace) -> int:
    """From the arguments to the folder."""
    from data.pictures import displayable, find_pictures
    from utils.lock import locked

    begin_work()
    if arguments.side < 1:
        raise UsageError(f"--side {arguments.side}: give one pixel at least.")
    folder = given_folder(arguments.folder)
    out = _out(arguments.out, folder)
    table = _Table.of(folder)
    pictures, _ = find_pictures(folder)
    folders = map(os.path.realpath, set(map(os.path.dirname, pictures)))
    if any(Path(real).is_relative_to(os.path.realpath(out)) for real in folders):
        raise UsageError(f"a link in {folder} leads to {out}: name another folder.")
    files = sorted({os.path.relpath(file, folder) for file in pictures} | table.present(folder))
    if not files:
        raise UsageError(f"{folder} holds no pictures.")
    targets = _targets(files, arguments.format)
    with locked(out, "name another folder"):
        _claim(out, {"folder": os.path.realpath(folder), "side": arguments.side, "format": arguments.format})
        left_out, stored = LeftOut(), {}
        _store(folder, out, targets, arguments, left_out, stored, measured=table.named)
        if table.header:
            table.write(out, targets, stored, left_out)
    say(left_out.lines())
    if not stored:
        raise UsageError(f"none of the pictures in {folder} could be stored.")
    count = Counter(one.how for one in stored.values())
    print(f"{displayable(str(out))}: {', '.join(f'{count[how]:,} {how}' for how in DONE if count[how])}")
    return 0


# ---- the two folders ---------------------------------------------------------------------------------------------


def _out(name: str, folder: Path) -> Path:
    """OUT. Raises UsageError where it is FOLDER, or one lies in the other: pictures would be found, or replaced, that
    this command has made."""
    from utils.files import check_text

    check_text("the folder OUT", name)
    out = Path(os.path.abspath(os.path.expanduser(name)))
    real, source = (Path(os.path.realpath(path)) for path in (out, folder))
    if real == source or source in real.parents or real in source.parents:
        what = "is the folder of the pictures" if real == source else "and the folder of the pictures lie in each other"
        raise UsageError(f"{out} {what}: name a folder beside it.")
    if os.path.lexists(out) and not out.is_dir():
        raise UsageError(f"{out} is no folder: name another.")
    return out


def _claim(out: Path, settings: dict[str, object]) -> None:
    """Bind the folder to the command; what a kill has left half written goes. Raises UsageError where the folder holds
    anything else than what this very command has made."""
    from utils.lock import NAME
    from utils.records import read_json, write_json

    if (out / SETTINGS).exists():
        then = read_json(out / SETTINGS)
        if other := [key for key, value in settings.items() if then.get(key) != value]:
            raise UsageError(
                f"{out} was made with another {' and '.join(other)} ({', '.join(str(then.get(k)) for k in other)}): "
                "name another folder."
            )
    elif any(entry.name != NAME and not HALF_WRITTEN.fullmatch(entry.name) for entry in os.scandir(out)):
        raise UsageError(f"{out} holds files that this command has not made: name a new folder.")
    else:
        write_json(out / SETTINGS, settings)
    for here, _, names in os.walk(out):
        for name in filter(HALF_WRITTEN.fullmatch, names):
            os.unlink(os.path.join(here, name))


def _targets(files: list[str], form: str) -> dict[str, str]:
    """The new name of each file. Raises UsageError where two would have the same."""
    targets, source_of = {}, {}
    for file in files:
        stem, suffix = os.path.splitext(file)
        kept = FORMATS.get(suffix.lower())
        if kept is None or (form != "same" and kept != FORMATS[ASKED[form]]):
            suffix = ASKED.get(form, ".png")
        targets[file] = stem + suffix
        if (other := source_of.setdefault(stem + suffix, file)) != file:
            from data.pictures import displayable

            raise UsageError(
                f"{displayable(other)} and {displayable(file)} would both become {displayable(stem + suffix)}: "
                + ("rename one." if form == "same" else "use --format same, or rename one.")
            )
    return targets


# ---- the pictures ------------------------------------------------------------------------------------------------


def _store(
    folder: Path, out: Path, targets: dict[str, str], arguments: argparse.Namespace, left_out: LeftOut,
    stored: dict[str, Stored], measured: Callable[[str], bool],
) -> None:  # fmt: skip
    """Make what is not there, into ``stored``. ``measured``: whether a file's sha256 and size are wanted."""
    from utils.progress import bar

    def work(file: str) -> Stored | str:
        return store(folder / file, out / targets[file], arguments.side, measured(file))

    with bar(len(targets), f"to {arguments.side} pixels", "picture", arguments.quiet) as ticks:
        for file, one in zip(targets, in_threads(work, targets, arguments.workers), strict=True):
            ticks.update(1)
            if isinstance(one, str):
                left_out.add(one, file)
            else:
                stored[file] = one


def store(source: Path, target: Path, side: int, measured: bool) -> Stored | str:
    """Store one picture, atomically; or say why not (then nothing stays there of an earlier version).

    A finished one has the time of its original. (Older ones than this command may take its place, from an archive say:
    so a later time says nothing.)
    """
    from data.pictures import read_picture
    from utils.files import replaced

    try:
        written = os.stat(source)
        if target.is_file() and target.stat().st_mtime_ns in _times(written):
            return _measured("there already", target.read_bytes()) if measured else Stored("there already")
        picture = read_picture(str(source), enough=2 * side)
    except (UsageError, FileNotFoundError):
        target.unlink(missing_ok=True)
        return "they are damaged, or too large to decode"
    form = FORMATS[target.suffix.lower()]
    if min(picture.size) <= side and picture.format == form:
        content, how = picture.content, "copied"
    else:
        try:
            content, how = _encoded(_smaller(picture.image, picture.size, side), form), "pictures made"
        except (OSError, ValueError, SystemError):  # PIL's words for a side that the format does not have
            target.unlink(missing_ok=True)
            return f"they are too long for {form}"
    with replaced(target) as temporary:
        temporary.write_bytes(content)
        os.utime(temporary, ns=(written.st_atime_ns, written.st_mtime_ns))
    return _measured(how, content) if measured else Stored(how)


def _times(written: os.stat_result) -> tuple[int, int]:
    """How a file system keeps a time: in nanoseconds, or in seconds."""
    return written.st_mtime_ns, written.st_mtime_ns // 10**9 * 10**9


def _smaller(image: Image.Image, size: tuple[int, int], side: int) -> Image.Image:
    """The picture with a shorter side of ``side`` pixels, or as it is. ``size``: of the file, which the pixels here may
    be fewer than."""
    from PIL import Image

    shorter = min(size)
    if shorter <= side:
        return image
    width, height = (side if n == shorter else max(side, round(n * side / shorter)) for n in size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _encoded(image: Image.Image, form: str) -> bytes:
    image.info = {}  # what the original's file said of itself
    file = io.BytesIO()
    image.save(file, form, **SAVED_WITH.get(form, {}))
    return file.getvalue()


def _measured(how: str, content: bytes) -> Stored:
    """Of the file's own header: what is copied may lie on its side."""
    from data.pictures import upright_size

    return Stored(how, hashlib.sha256(content).hexdigest(), *upright_size(content))


# ---- the table ---------------------------------------------------------------------------------------------------


class _Table:
    """manifest.csv as it is, cell by cell; no header: there is none."""

    def __init__(self, header: list[str], rows: list[list[str]]) -> None:
        self.header, self.rows = header, rows
        self.column = header.index("file") if header else 0
        self.files = {self.file(row) for row in rows}
        self.measures = bool({"sha256", "width", "height"} & set(header))

    @classmethod
    def of(cls, folder: Path) -> _Table:
        """Read it. Raises UsageError where it is damaged, or names what lies elsewhere."""
        from data.manifest_table import MANIFEST, checked_rows, read_table

        if not os.path.lexists(folder / MANIFEST):
            return cls([], [])
        checked_rows(folder / MANIFEST)
        header, rows = read_table(folder / MANIFEST)
        return cls(header, [cells for _, cells in rows])

    def file(self, row: list[str]) -> str:
        """The picture of a row."""
        return os.path.normpath(row[self.column])

    def named(self, file: str) -> bool:
        """Whether the picture's sha256 or size is in the table."""
        return self.measures and file in self.files

    def present(self, folder: Path) -> set[str]:
        """The pictures that it names and that are there, whatever their suffix."""
        return {file for file in self.files if os.path.isfile(folder / file)}

    def write(self, out: Path, targets: dict[str, str], stored: dict[str, Stored], left_out: LeftOut) -> None:
        """The table of what is stored."""
        from data.manifest_table import MANIFEST, write_table

        rows = []
        for row in self.rows:
            file = self.file(row)
            if file not in targets:
                left_out.add("manifest.csv names them, and they are not in the folder", file)
            if file not in stored:
                continue
            new = {"file": targets[file], **{key: getattr(stored[file], key) for key in ("sha256", "width", "height")}}
            rows.append([new.get(name, cell) for name, cell in zip(self.header, row, strict=True)])
        write_table(out / MANIFEST, rows, self.header)


if __name__ == "__main__":
    sys.exit(main())
