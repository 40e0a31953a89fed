"""What commands over a folder of pictures share: how they start and end, work in threads, and what was left out."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from utils.command import STOPPED, ready
from utils.errors import UsageError, refusal
from utils.parser import Help, Parser, unknown_flag

T = TypeVar("T")
R = TypeVar("R")

WAITING = 4  # pictures under way or done for each thread: a folder of a million is never all in memory


def parser_of(module: str, text: str) -> Parser:
    """A parser with the two flags that such commands have in common. ``text``: what --help teaches."""
    parser = Parser(prog=f"python -m {module}", description=text, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", help="the pictures")
    parser.add_argument(
        "--workers", type=int, metavar="N", default=min(16, os.cpu_count() or 1),
        help="threads (default: one for each core, 16 at most)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run(parser: Parser, work: Callable[[argparse.Namespace], int], argv: Sequence[str] | None, after: str) -> int:
    """Parse, work; returns the exit code. ``after``: what the line for Ctrl-C says of what is there."""
    try:
        arguments, rest = parser.parse_known_args(argv)
        if rest:
            raise unknown_flag(rest, [action.dest for action in parser._actions])
        if arguments.workers < 1:
            raise UsageError(f"--workers {arguments.workers}: give one thread at least.")
        return work(arguments)
    except (UsageError, OSError) as error:
        return refusal(error)
    except KeyboardInterrupt:
        print(f"interrupted; {after}", file=sys.stderr)
        return STOPPED


def begin_work() -> None:
    """To be called when all is imported."""
    from PIL import Image

    ready()
    # PIL's remark on pictures of 90 to 179 million pixels; larger ones are an error, here as in main.py.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def given_folder(name: str) -> Path:
    """The folder that a user named. Raises UsageError where there is none."""
    from utils.files import check_text

    check_text("the folder", name)
    folder = Path(os.path.abspath(os.path.expanduser(name)))
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: check the path.")
    return folder


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """``work`` of each item, in their order. (Threads: PIL and hashes free the interpreter lock while they work.)

    What ``work`` raises is raised here; items that have not begun then never do.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= WAITING * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class LeftOut:
    """What a command leaves out: names, by why."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.further: list[str] = []

    def add(self, why: str, name: str) -> None:
        """``why``: the end of a sentence that begins with how many pictures were left out."""
        self.names.setdefault(why, []).append(name)

    def add_line(self, line: str) -> None:
        """What else was left out, in words."""
        self.further.append(line)

    def lines(self) -> list[str]:
        """A line a reason: how many, why, and the first names."""
        from data.pictures import listed

        pictures = [
            f"left out {len(names):,} {'picture' if len(names) == 1 else 'pictures'}: {why} ({listed(names, most=3)})"
            for why, names in self.names.items()
        ]
        return pictures + self.further


def say(lines: Iterable[str]) -> None:
    """Warnings, as other commands print them."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
