"""Scores on disk: a zarr group with the settings they were made under and a digest of it all.

zarr keeps no checksum and reads a missing chunk as zeros, so scores count only if their digest is right.
Legend: m training samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UsageError

SAMPLES = ("sample_id", "worker")  # whose scores they are: int64, each [m]; scores are float64, and positive ones help
EDGES = ("receiver", "sender")  # of scores of edges, [rounds, edges]


def write_scores(
    path: Path, arrays: dict[str, np.ndarray], settings: dict[str, Any], scores: Sequence[str] = ("scores",),
    whose: Sequence[str] = SAMPLES,
) -> None:
    """Write the arrays of ``whose`` and of ``scores`` and the (JSON-able) settings next to their place, and move them
    there when they are whole. Raises UsageError where the disk refuses."""
    import zarr  # takes half a second

    arrays = {name: np.ascontiguousarray(arrays[name], dtype=kind) for name, kind in _kinds(scores, whose).items()}
    attributes = {"settings": settings, "digest": _digest(arrays, settings)}
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        group = zarr.open_group(temporary, mode="w", attributes=attributes)
        for name, array in arrays.items():
            group.create_array(name, data=array)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}. Free some space or choose another --results_dir.") from error


def read_scores(
    path: str | Path, scores: Sequence[str] = ("scores",), whose: Sequence[str] = SAMPLES
) -> dict[str, Any]:
    """What was written, to the bit: the arrays of ``scores`` and ``whose``, and ``settings``.

    Raises UsageError where the group is missing, damaged, or has no digest (as before there were digests).
    """
    if not Path(path).is_dir():
        raise UsageError(f"no scores at {path}; compute them with main_pruned.py --stage 2")
    import zarr

    try:
        group = zarr.open_group(path, mode="r")
        arrays = {name: group[name][:] for name in _kinds(scores, whose)}
        settings = group.attrs["settings"]
        sound = group.attrs.get("digest") == _digest(arrays, settings)
        reason = "their digest is missing or another"
    except Exception as error:  # zarr raises a dozen kinds, of the store, the codecs and JSON
        sound, reason = False, " ".join(str(error).split()) or type(error).__name__
    if not sound:
        raise UsageError(f"the scores at {path} are damaged ({reason}); main_pruned.py computes them again")
    return {**arrays, "settings": settings}


def _kinds(scores: Sequence[str], whose: Sequence[str]) -> dict[str, type]:
    return {**dict.fromkeys(scores, np.float64), **dict.fromkeys(whose, np.int64)}


def _digest(arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> str:
    from utils.digest import digest_json, digest_tensors  # torch takes two seconds

    return digest_json({"arrays": digest_tensors(arrays), "settings": settings})
