"""Checkpoints that survive a kill at any instant: atomic, checksummed, never unpickled.

A checkpoint is one safetensors file: the fleet's rows and its optimizers' state ('momentum') in canonical layout,
and in its metadata the round, the state of the trainer as JSON, the run that it belongs to and a SHA-256 of all.
It takes the place of its file at once, whole and flushed to the disk. The last two are kept; a damaged one
is recognized by its checksum, and the one before it is used. Several processes write a part each, with
their own rows; any number of processes can read it.

Legend: R rows of the fleet, D floats a row, P trainable ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.digest import digest_tensors
from utils.errors import UsageError
from utils.files import replaced
from workers.optimizers import canonical_state, state_from_canonical
from workers.worker_vision import Fleet

KEEP = 2
TRAJECTORY = "trajectory"  # folder of the states that stage 1 keeps for scoring


@dataclass
class Checkpoint:
    """The fleet after ``round`` rounds. ``state``: the trainer's JSON-able state. ``run``: the digest of the run
    that it belongs to (see :mod:`training.identity`)."""

    round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    run: str = ""


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over the tensors, the round, the trainer's state and the run."""
    text = f"{metadata['run']} {metadata['round']} {metadata['state']} {digest_tensors(tensors)}"
    return hashlib.sha256(text.encode()).hexdigest()


def snapshot(fleet: Fleet) -> dict[str, Tensor]:
    """The fleet's state as CPU tensors in canonical layout, put there on the CPU: a GPU has no room for more rows."""
    extra = {f"extra.{name}": fleet.layout.canonical(tensor.cpu()) for name, tensor in fleet.extra.items()}
    return {
        "rows": fleet.layout.canonical(fleet.rows_RD.cpu()),
        "momentum": canonical_state(fleet.optimizer, fleet.layout, fleet.state_RS.cpu()),
        **extra,
    }


def restore(fleet: Fleet, tensors: dict[str, Tensor]) -> None:
    """Put a snapshot back: the rows that live here."""

    def placed(tensor: Tensor) -> Tensor:
        return fleet.layout.from_canonical(tensor).to(fleet.device)

    def here(tensor: Tensor) -> Tensor:
        if len(fleet.owned) == fleet.num_workers:
            return tensor
        block = fleet.block_of(len(tensor))
        return tensor[block.start : block.stop]

    fleet.rows_RD.copy_(placed(here(tensors["rows"])))  # in place: a recorded step knows where the rows lie
    fleet.state_RS.copy_(state_from_canonical(fleet.optimizer, fleet.layout, here(tensors["momentum"])))
    extra = {n.removeprefix("extra."): t for n, t in tensors.items() if n.startswith("extra.")}
    fleet.extra = {name: placed(here(tensor)).clone() for name, tensor in extra.items()}


def write(
    folder: Path,
    checkpoint: Checkpoint,
    keep: int | None = KEEP,
    part: int = 0,
    parts: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Write atomically, then drop all but the last ``keep`` (None: keep all). Of several processes each
    writes its ``part`` and ``wait`` returns when all have.

    Raises :class:`UsageError` where the disk is full or read-only; what was there before stays.
    """
    suffix = f".part-{part + 1}-of-{parts}" if parts > 1 else ""
    path = folder / f"round-{checkpoint.round:08d}{suffix}.safetensors"
    metadata = {"round": str(checkpoint.round), "state": json.dumps(checkpoint.state), "run": checkpoint.run}
    metadata["sha256"] = checksum(checkpoint.tensors, metadata)
    try:
        with replaced(path) as temporary:
            save_file(checkpoint.tensors, temporary, metadata)
        wait()
        for old in stored(folder)[:-keep] if keep and part == 0 else []:
            for file in parts_of(old):
                file.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot write the checkpoint {path}: {error}. Free some space or choose another "
            "--results_dir; --resume goes on from the checkpoint before it."
        ) from error
    return path


def snapshot_interval(rounds: int) -> int:
    """Rounds between the states that stage 1 keeps for scoring: about sqrt(rounds) of them."""
    return math.isqrt(rounds - 1) + 1


def stored(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; of one in parts, its first part that is there."""
    firsts: dict[tuple[int, int], Path] = {}
    for path in sorted(filter(Path.is_file, folder.glob("round-*.safetensors"))):  # a pipe would be waited for
        firsts.setdefault((round_of(path), number_of_parts(path)), path)
    return [firsts[key] for key in sorted(firsts)]


def round_of(path: Path) -> int:
    """The round of a checkpoint, by its name."""
    return int(path.name.removeprefix("round-").partition(".")[0])


def number_of_parts(path: Path) -> int:
    """In how many parts a checkpoint was written, by its name."""
    match = re.search(r"-of-(\d+)\.safetensors$", path.name)
    return int(match[1]) if match else 1


def parts_of(path: Path) -> list[Path]:
    """All files of the checkpoint that ``path`` belongs to, there or not."""
    parts = number_of_parts(path)
    if parts == 1:
        return [path]
    return [path.with_name(f"round-{round_of(path):08d}.part-{i + 1}-of-{parts}.safetensors") for i in range(parts)]


def read(path: Path, run: str | None = None) -> Checkpoint:
    """One checkpoint, checked, its parts put together. Raises ValueError where a part is damaged, missing, of another
    round than its name says, or of another run than ``run`` (None: any will do)."""
    pieces = [_read_file(part) for part in parts_of(path)]
    if any(piece.run != (run or piece.run) for piece in pieces):
        raise ValueError(f"{path} belongs to another run")
    if any(piece.round != round_of(path) for piece in pieces):
        raise ValueError(f"{path} belongs to another round")
    tensors = {name: torch.cat([piece.tensors[name] for piece in pieces]) for name in pieces[0].tensors}
    return dataclasses.replace(pieces[0], tensors=tensors)


def _read_file(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("sha256") != checksum(tensors, metadata):
            raise ValueError("its checksum does not match")
        return Checkpoint(int(metadata["round"]), tensors, json.loads(metadata["state"]), metadata["run"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or missing: {error}") from error


def latest(folder: Path, run: str | None = None) -> Checkpoint | None:
    """The newest undamaged checkpoint of ``run`` (None: of any), or None. Warns of every one it passes over."""
    for path in reversed(stored(folder)):
        try:
            return read(path, run)
        except ValueError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    return None
