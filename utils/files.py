"""Files: what somebody else wrote is read, or refused in one line; what is written takes its place at once. A leaf.

A pipe may never answer and a device never end, so only regular files are read, and only so much of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import reprlib
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UsageError

PathLike = str | os.PathLike[str]

LARGEST_FILE = 10**9  # bytes: a matrix of 10,000 workers, ids of a hundred million samples


@contextlib.contextmanager
def replaced(path: PathLike) -> Iterator[Path]:
    """A path beside ``path`` to write a file to. At the end the file is flushed to the disk and takes the place of
    ``path``: readers see the old content or the new one, never a part.

    Missing parent folders are made. Whatever is raised inside goes on, as an OSError of the disk does (full,
    read-only, no permission): then the new file is removed, and the old content stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # several processes may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def read_bytes(path: PathLike, what: str = "file", limit: float = LARGEST_FILE) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; ``what`` names it in errors (a flag, say).

    Raises UsageError where it is missing, may not be read, is no regular file or is too large.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            reason = "it is not a regular file"
        elif found.st_size > limit:
            reason = f"it has {found.st_size:,} bytes, and at most {limit:,} are read"
        else:
            with open(path, "rb") as file:
                return file.read(found.st_size)
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError:  # NUL characters and lone surrogates
        reason = "no file can have this name"
    raise UsageError(f"cannot read {what} {path}: {reason}; check the path.")


def read_lines(path: PathLike, what: str = "file") -> Iterator[tuple[int, str]]:
    """(line number, text without its ``#`` comment) of every line of a UTF-8 file. Raises UsageError as
    :func:`read_bytes` does, and where the text is not UTF-8."""
    lines = io.TextIOWrapper(io.BytesIO(read_bytes(path, what)), encoding="utf-8-sig")
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line.partition("#")[0]
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {what} {path}: it is not UTF-8 text; save it as UTF-8.") from error


def check_text(what: str, text: str) -> None:
    """Raises UsageError for a text that no path can hold: one with NUL characters or lone surrogates (but for
    those by which argv stands for bytes that are not UTF-8)."""
    try:
        sound = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        sound = False
    if not sound:
        raise UsageError(f"{what} is {reprlib.repr(text)}: it must not hold NUL characters or lone surrogates.")


def parse_json(data: str | bytes) -> Any:
    """Strict JSON: no NaN or Infinity, and no key twice. Raises ValueError for anything else."""

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is not JSON")

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {reprlib.repr(key)} is given twice")
        return record

    try:
        return json.loads(data, parse_constant=refuse, object_pairs_hook=object_of)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
