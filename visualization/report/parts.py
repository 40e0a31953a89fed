"""What a report is made of, and how it becomes one HTML file that needs no other.

A report has a verdict and sections, a section a list of parts; ``page.html`` knows how each kind of part looks.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from utils.records import PathLike, strict_json, write_atomically

MOST_BYTES = 2_900_000  # of a whole report, in characters; browsers on phones take that
MOST_ROWS = 500  # of a table
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Text:
    """A paragraph; of a ``kind`` that the page shows in its own way: '', 'good', 'bad', 'unknown' or 'note'."""

    text: str
    kind: str = ""
    template: str = "text"


@dataclass(frozen=True)
class Commands:
    """Lines to be typed, each with what it does."""

    lines: Sequence[tuple[str, str]]
    template: str = "commands"


@dataclass(frozen=True)
class Cell:
    """A figure of a table: what is read, and what is sorted by."""

    shown: str
    value: float | None = None
    href: str = ""

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):  # not known: it sorts last
            object.__setattr__(self, "shown", "–")
            object.__setattr__(self, "value", None)


@dataclass(frozen=True)
class Table:
    """Columns with names, and rows of texts or cells, as many as the report may show; a reader sorts them."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    template: str = "table"

    @property
    def shown(self) -> Sequence[Sequence[Cell]]:
        """The rows that the page has, all of them cells."""
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows[:MOST_ROWS]]

    @property
    def left_out(self) -> int:
        """How many it has not."""
        return max(0, len(self.rows) - MOST_ROWS)


@dataclass(frozen=True)
class Picture:
    """A PNG file. ``alt``: what it shows, for whom cannot see it."""

    path: Path
    alt: str
    template: str = "picture"

    @property
    def source(self) -> str:
        """The file as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Section:
    """A heading and what is under it; ``closed``: shown when asked for."""

    title: str
    parts: Sequence[Any]
    closed: bool = False

    @property
    def anchor(self) -> str:
        """What links point to."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Report:
    """A whole report: ``verdict`` first, then the sections; ``data``: what it was made from, for scripts."""

    title: str
    verdict: Sequence[Text]
    sections: Sequence[Section]
    data: dict[str, Any] = field(default_factory=dict)


def number(value: float | None, spec: str = ".4g", unit: str = "") -> Cell:
    """A figure of a table; one that is not known sorts last."""
    if value is None or not math.isfinite(value):
        return Cell("–")
    return Cell(f"{value:{spec}}{unit}".replace("-", "−"), float(value))


def address(path: Path, page: Path) -> str:
    """Where a page finds a file beside it."""
    return "./" + quote(os.fsencode(os.path.relpath(path, page.parent)))


def write(report: Report, path: PathLike) -> Path:
    """Render ``report`` and replace the file at ``path``. Pictures for which no room is left are linked, not shown."""
    path = Path(path)
    sections, linked = _fitting(report, path)
    text = render(
        "page.html", report=report, sections=sections, linked=linked, data=as_json(report.data),
        css=(HERE / "page.css").read_text(), script=(HERE / "page.js").read_text(),
    )  # fmt: skip
    write_atomically(path, lambda file: file.write(text.encode(errors="replace")))  # a folder need not be UTF-8
    return path


def render(name: str, **values: Any) -> str:
    """A template of this folder, filled in; what is no markup of ours is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return found.get_template(name).render(**values)


def as_json(data: dict[str, Any]) -> str:
    """JSON that can stand in a script element: nothing in it ends the element."""
    text = json.dumps(strict_json(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _fitting(report: Report, path: Path) -> tuple[list[Section], list[tuple[str, str]]]:
    """The sections with the pictures that there is room for, the first ones first; and of the others alt text and
    address."""
    room = MOST_BYTES - len(as_json(report.data)) - sum(
        len(repr(part)) for section in report.sections for part in section.parts if not isinstance(part, Picture)
    )  # fmt: skip
    linked, sections = [], []
    for section in report.sections:
        parts = []
        for part in section.parts:
            if isinstance(part, Picture):
                size = part.path.stat().st_size * 4 // 3
                if size > room:
                    linked.append((part.alt, address(part.path, path)))
                    continue
                room -= size
            parts.append(part)
        sections.append(Section(section.title, parts, section.closed))
    return [section for section in sections if section.parts], linked
