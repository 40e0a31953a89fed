"""How a command begins and how it ends early: Ctrl-C and a missing package are a line, not a traceback.

It is loaded first, and until :func:`begin` has run Ctrl-C still prints a traceback: so it imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType, TracebackType
    from typing import NoReturn

    from utils.args import Config

STOPPED = 130  # the exit code of a command that Ctrl-C ended


def begin() -> None:
    """To be called before anything heavy is imported: sets how this process ends on Ctrl-C and without a package."""
    if sys.version_info < (3, 11):  # noqa: UP036, it is what this line says
        _leave(f"error: Python {sys.version.split()[0]} is too old: use Python 3.11 or 3.12.", 2)
    sys.excepthook = _last_words
    signal.signal(signal.SIGINT, _interrupt)
    if sys.stdout is not None:  # it is where stdout is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text in any encoding


def begin_module() -> None:
    """:func:`begin` for ``python -m PACKAGE.MODULE``, called by the package, which is loaded before the module."""
    if sys.argv[:1] == ["-m"]:  # so it is called until the module is found
        begin()


def ready() -> None:
    """All is imported: from now on Ctrl-C is an ordinary KeyboardInterrupt everywhere."""
    if signal.getsignal(signal.SIGINT) is _interrupt:  # not where a program calls main() as a function
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, but not while modules are imported: there libraries turn it into other errors, or print it and
    go on; and nothing has begun."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave("interrupted before it began", STOPPED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave(line: str, code: int) -> NoReturn:
    try:
        print(line, file=sys.stderr)
        for stream in filter(None, (sys.stderr, sys.stdout)):
            stream.flush()
    except (OSError, ValueError):  # nobody listens
        pass
    finally:
        os._exit(code)


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What is said of an exception that nobody caught."""
    if issubclass(kind, KeyboardInterrupt):
        _leave("interrupted", STOPPED)
    package = error.name if isinstance(error, ModuleNotFoundError) else None
    if package and "." not in package and not _is_ours(package):
        _leave(f"error: {missing(package)}", 2)
    sys.__excepthook__(kind, error, trace)


def _is_ours(package: str) -> bool:
    here = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), package)
    return os.path.isdir(here) or os.path.isfile(f"{here}.py")


def missing(package: str) -> str:
    """What to do about a package that is not installed."""
    where = "'source .venv/bin/activate' first ('make demo' sets it up), or 'pip install -r requirements.txt'"
    return f"{sys.executable or 'this Python'} has no package '{package}': {where}."


def interrupted(config: Config | None, folder: Path | None) -> str:
    """The line for Ctrl-C: what is there to go on from. ``folder``: of the run, None where it is not known yet."""
    again = "the same command with --resume"
    if config is not None and config.overwrite:
        again = "the same command with --resume instead of --overwrite"
    if config is not None and config.resume:
        again = "the same command"
    patterns = ("stage*/config.json", "seed-*/stage*/config.json")
    runs = [file.parent for pattern in patterns for file in (folder.glob(pattern) if folder else ())]
    unfinished = [run for run in runs if not (run / "summary.json").exists()]
    if unfinished:
        run = max(unfinished, key=lambda run: (run / "config.json").stat().st_mtime)  # the one that was under way
        rounds = [int(file.name[6:14]) for file in (run / "checkpoints").glob("round-????????.*safetensors")]
        if rounds:
            return f"interrupted; {again} goes on with {run} from its last checkpoint, at round {max(rounds)}"
        return f"interrupted; {run} has no checkpoint yet: {again} starts it from the beginning"
    if runs:
        return f"interrupted; the training in {folder} had ended and is kept: {again} goes on from there"
    return "interrupted before the training began; the same command starts it"
