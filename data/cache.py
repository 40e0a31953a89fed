"""The cache of decoded data sets: one safetensors file each, with a digest of what it holds and of the source files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.arrays import Arrays, Owners
from data.pictures import files_under
from data.task import task_of
from utils.digest import digest_json
from utils.errors import UsageError
from utils.files import replaced

CACHE_VERSION = "6"  # raise it when a reader gives other samples or another order, or the cache holds something else
TENSORS = ("inputs_n", "targets_n", "test_inputs_m", "test_targets_m")


def default_cache_dir() -> Path:
    """decentralized-learning in $XDG_CACHE_HOME, or in ~/.cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decentralized-learning"
    except RuntimeError as error:
        raise UsageError("no home folder to keep decoded data in; name one in XDG_CACHE_HOME") from error


def digest_of_files(folder: Path) -> str:
    """A hash of the names and sizes of all files in the folder (links are followed), and of when they were last written
    or, what archives and ``cp -p`` do not set back, renamed or replaced."""
    lines = []
    for file in files_under(folder):
        with contextlib.suppress(OSError):  # a link that leads nowhere
            status = os.stat(file)
            lines.append(f"{file} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    content = "\n".join([CACHE_VERSION, *sorted(lines)])
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()


def read_cache(file: Path, files: str) -> tuple[Arrays, dict[str, Any]] | None:
    """The cached data and the fingerprint that they were written with, or None when there are none for these source
    files; warns if the file is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as cached:
            metadata = cached.metadata() or {}
            if metadata.get("files") != files:
                return None
            tensors = {key: cached.get_tensor(key) for key in cached.keys()}  # noqa: SIM118
        if digest_json(metadata["notes"]) != metadata["digest"]:
            raise ValueError("its notes are not what was written")
        notes = json.loads(metadata["notes"])
        owners = None
        if notes["owners"] is not None:
            further = (tensors.get(key) for key in ("positions_GX", "test_owner_m"))
            owners = Owners(tensors["owner_n"], tuple(notes["owners"]), *further)
        arrays = Arrays(
            *(tensors[key] for key in TENSORS),
            task_of(notes["task"]),
            tuple(notes["skipped"]),
            tuple(notes["sources"]),
            owners,
            tensors.get("order_n"),
            notes["gap"],
            tuple(notes["notes"]),
            tensors.get("val_n"),
        )
        return arrays, notes["fingerprint"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        warn_damaged(file, error)
        return None


def warn_damaged(file: Path, error: Exception | str) -> None:
    """Say that a cache is built anew."""
    warnings.warn(f"the data cache {file} is damaged and is built anew: {error}", RuntimeWarning, stacklevel=4)


def write_cache(file: Path, arrays: Arrays, fingerprint: dict[str, Any], files: str) -> None:
    """Atomic. Where nothing can be written, it warns."""
    owners = arrays.owners
    notes = json.dumps(
        {
            "task": arrays.task.record(),
            "skipped": arrays.skipped,
            "sources": arrays.sources,
            "owners": owners and owners.names,
            "gap": arrays.gap,
            "notes": arrays.notes,
            "fingerprint": fingerprint,
        }
    )
    tensors = {key: getattr(arrays, key) for key in TENSORS}
    further = {"order_n": arrays.order_n, "val_n": arrays.val_n}
    if owners is not None:
        further |= {key: getattr(owners, key) for key in ("owner_n", "positions_GX", "test_owner_m")}
    tensors |= {key: tensor for key, tensor in further.items() if isinstance(tensor, torch.Tensor)}
    metadata = {"files": files, "notes": notes, "digest": digest_json(notes)}
    try:
        with replaced(file) as temporary:
            temporary.touch(0o600)  # the user's alone: others may not be meant to see the pictures
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"decoded data is not cached ({error}); it is decoded anew next time", RuntimeWarning, 3)
