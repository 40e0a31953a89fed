"""The results folder of a room: bound to its settings and data, and never silently overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from training.identity import check_identity
from utils.args import Config
from utils.errors import UsageError
from utils.records import read_record, write_json


def claim_room(config: Config, folder: Path) -> None:
    """Raises :class:`UsageError` where the folder holds results of other settings, or any and neither --resume nor
    --overwrite is given."""
    path = folder / "config.json"
    if not path.exists() or config.overwrite:
        return
    then = read_record(path, "config")["config"]
    if other := sorted(f"--{k}" for k, v in config.changing_results().items() if then.get(k) != v):
        raise UsageError(f"{folder} was made with another {', '.join(other)}: give another --run_name.")
    if not config.resume:
        raise UsageError(f"{folder} exists: --resume goes on with it, --overwrite replaces it.")


def bind_room(config: Config, identity: dict[str, Any], folder: Path) -> None:
    """Write config.json, or raise :class:`UsageError` where the one that is there is of other data. What --overwrite
    replaces goes now: after all that could be refused was."""
    if config.overwrite and (folder / "config.json").exists():
        shutil.rmtree(folder)
    if (folder / "config.json").exists():
        check_identity(folder, identity)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"config": config.to_json(), "identity": identity})
