"""A recorded configuration, read again: its fields, and the files that it names.

A config.json may come from anywhere: every value is checked against the type of its field, and what would
make this machine overwrite a run, or connect to another machine, is not taken from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import reprlib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UsageError, unknown_name
from utils.files import parse_json, read_bytes

if TYPE_CHECKING:
    from utils.args import Config

FILES = ("drop_samples", "keep_samples", "topology_file", "policy")  # flags that name files: they count by content
# A replay is a new run, elsewhere; and a file from elsewhere must not make this machine connect to another.
NOT_REPLAYED = ("resume", "overwrite", "run_name", "config", "cluster")

LARGEST = 10**15  # every number; integers are exact in float64 and far from the end of int64


def file_digests(config: Config) -> dict[str, str]:
    """SHA-256 of the files that the configuration names and whose contents change the numbers, by flag."""
    paths = {name: getattr(config, name) for name in FILES if name != "topology_file" or config.mode == "file"}
    return {
        name: hashlib.sha256(read_bytes(path, f"--{name}")).hexdigest()
        for name, path in paths.items()
        if path and Path(path).is_file()
    }


def read_recorded(path: str) -> dict[str, dict[str, Any]]:
    """The parts ``config``, ``execution`` and ``files`` of a recorded config.json (a file that holds just the
    fields will do)."""
    data = read_bytes(path, "--config", limit=10**7)
    try:
        content = parse_json(data)
        if "config" not in content:
            content = {"config": content}
        return {name: dict(content.get(name, {})) for name in ("config", "execution", "files")}
    except (ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"--config {path} is not a recorded config.json: {error}.") from error


def recorded_fields(source: str, record: dict[str, dict[str, Any]], hints: dict[str, Any]) -> dict[str, Any]:
    """The fields that a record replays, as the types that ``hints`` give them; the execution is replayed too.
    ``source``: what names the record in errors."""
    values, execution = dict(record["config"]), dict(record["execution"])
    if execution.get("engine") == "graph" and values.get("engine") == "auto":
        del execution["engine"]  # chosen for a GPU, which may not be here
    if execution:
        execution.setdefault("batch_parts", 1)  # older versions cut no batches
    names = ("engine", "threads", "channels_last", "batch_parts")
    values |= {name: execution[name] for name in names if name in execution}
    unknown = sorted(set(values) - set(hints))
    if unknown and not record["execution"]:  # a record of main_pruned.py holds more than main.py reads
        raise UsageError(f"{source}: {unknown_name('field', unknown[0], hints)}")
    return {
        name: _typed(source, name, value, hints[name])
        for name, value in values.items()
        if name in hints and name not in NOT_REPLAYED
    }


def _typed(source: str, name: str, value: Any, hint: Any) -> Any:
    """A value from JSON as the type of its field; :class:`UsageError` where it is another."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            if isinstance(value, list):
                return tuple(_typed(source, name, v, inner) for v in value)
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if abs(value) < LARGEST else value
        elif type(value) is kind:
            return value
    raise UsageError(f"{source}: {name} is {reprlib.repr(value)}, which is not what --{name} takes.")


def recorded_files(
    path: str, record: dict[str, dict[str, Any]], config: Config, given: dict[str, Any]
) -> dict[str, str]:
    """Where the files that a record names are now: beside the record, if that is the file it means, or where they
    were. Raises :class:`UsageError` where one has other contents than it had."""
    then, moved = record["files"], {}
    for name in FILES:
        file = getattr(config, name)
        beside = Path(path).parent / Path(file or "").name
        if file and name not in given and beside.is_file():
            at_beside = file_digests(dataclasses.replace(config, **{name: str(beside)})).get(name)
            if at_beside == then.get(name) or not Path(file).is_file():
                moved[name] = str(beside)
    now = file_digests(dataclasses.replace(config, **moved))
    changed = [f"--{k}" for k, digest in now.items() if k not in given and then.get(k, digest) != digest]
    if changed:
        raise UsageError(
            f"--config {path}: the file of {', '.join(changed)} is not what it was when the run was recorded: "
            "put the old contents back, or give the flag to replay with another."
        )
    return moved
