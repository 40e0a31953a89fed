"""One process a folder: a lock that the kernel gives back however its holder ends.

The lock is ``flock`` on the file ``.lock`` in the folder, not the existence of that file: after ``kill -9``
it is free at once. The file says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
ATTEMPTS = 1000  # each but the last fails because another process has just removed the folder or its lock
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(folder: Path, other: str = "choose another --run_name") -> Iterator[None]:
    """Hold ``folder`` (made if it is not there) until the block ends; an empty one is removed again. ``other``: what
    to do instead of waiting, where somebody holds it.

    Raises :class:`UsageError` that names the process which holds it. On a file system without locks it
    warns and goes on.
    """
    descriptor = _acquire(folder, other)
    try:
        yield
    finally:
        # The name goes before the lock does, so nobody can hold a lock that others do not see.
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
        if descriptor is not None:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            folder.rmdir()  # a run that was refused leaves nothing


def _acquire(folder: Path, other: str) -> int | None:
    """The open, locked file; None where there are no locks."""
    if fcntl is None:
        return None
    path = folder / NAME
    for _ in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Neither through a link, whose target would be overwritten, nor waiting for the other end of a pipe.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except FileNotFoundError:
            continue  # the holder before us removed the folder it left empty
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; choose another --results_dir.") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UsageError(f"{path} is not a regular file: delete it, or choose another --results_dir.")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno in UNSUPPORTED:
                warnings.warn(f"{folder} is on a file system without locks: start one process a run", stacklevel=3)
                return None
            raise UsageError(
                f"{folder} is in use by {_name(holder)}: wait until it has ended, or {other}."
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
        os.close(descriptor)  # the holder before us has removed this file: lock the next one
    else:
        raise UsageError(f"cannot make {folder}: it vanishes at once; choose another --results_dir.")
    who = {"pid": os.getpid(), "host": platform.node(), "command": sys.argv}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(who).encode()[:4096], 0)
    return descriptor


def _name(holder: bytes) -> str:
    """Who wrote the lock file, for people."""
    try:
        who = json.loads(holder)
        return f"process {who['pid']} on {who['host']} ({' '.join(who['command'])[:100]})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
