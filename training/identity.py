"""What a run is bound to: its settings, the files they name, its decoded data and its shards.

One digest of all four is in config.json, in every checkpoint and snapshot and in the settings of scores,
and processes that train together compare it. So pictures that were deleted since, another folder's data,
another seed's checkpoint or a peer with other flags are refused, with a line that says what differs.

Legend: N workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data.dataset_loader import data_differences
from utils.args import Config
from utils.digest import digest_json, digest_tensors
from utils.errors import UsageError
from utils.recorded import FILES, file_digests
from utils.records import read_json, read_record

Identity = dict[str, Any]
WHICH_DATA = ("dataset_name", "dataset_path", "image_size")


def identity_of(config: Config, data: Mapping[str, Any], shards: Sequence[Tensor]) -> Identity:
    """The parts, JSON-able, and their ``digest``. ``data``: the fingerprint of the decoded data set."""
    parts = {
        "settings": digest_json(settings_of(config)),
        "files": file_digests(config),
        "data": dict(data),
        "shards": digest_tensors({f"{k:06d}": ids for k, ids in enumerate(shards)}),
    }
    return {**parts, "digest": digest_json(parts)}


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that change results and are not at main.py's defaults, without paths: files count by their
    content."""
    default = Config().changing_results()
    return {k: v for k, v in config.changing_results().items() if v != default[k] and k not in FILES}


def check_identity(run_dir: Path, now: Identity) -> None:
    """Raises :class:`UsageError` where the recorded run is not the one that ``now`` describes: what changed
    since it was made, its settings and files aside (:func:`training.run.recorded_execution` compares those)."""
    then = read_record(run_dir / "config.json").get("identity")
    try:
        if then["digest"] == now["digest"]:
            return
        what = data_differences(then["data"], now["data"])
        what = what or next((f"other {name}" for name in ("shards", "settings") if then[name] != now[name]), "")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"the run {run_dir} does not record what data it was made with (an older version made it?): "
            "--overwrite replaces it, --run_name NAME starts another."
        ) from error
    if not what:
        raise UsageError(f"{run_dir / 'config.json'} is damaged (its digest is not its own): --overwrite replaces it.")
    raise UsageError(
        f"the data are not those that the run {run_dir} was made with ({what}): put the old files back, "
        "start another run with --run_name NAME, or replace this one with --overwrite."
    )


def check_replay(config: Config, data: Mapping[str, Any]) -> None:
    """Whether ``--config`` may replay its run on these data (their fingerprint). Raises :class:`UsageError` where they
    are others than the record's though nobody named others, or where the record names samples by their ids; warns
    where they are others on purpose."""
    if config.config is None:
        return
    record = read_json(config.config)
    try:
        what = data_differences(record["identity"]["data"], data)
        others = any(record["config"].get(name) != getattr(config, name) for name in WHICH_DATA)
        recorded_files = dict(record["files"])
    except (KeyError, TypeError, ValueError, AttributeError):  # settings alone, or the record of an older version
        return
    if not what:
        return
    text = f"--config {config.config}: the data are not those of the recorded run ({what})"
    now = file_digests(config)
    ids = [f"--{k}" for k in ("drop_samples", "keep_samples") if k in now and now[k] == recorded_files.get(k)]
    if ids:
        raise UsageError(f"{text}, and {' and '.join(ids)} would name other samples: put the old files back.")
    if not others:
        raise UsageError(f"{text}: put the old files back, or give the settings as flags instead of --config.")
    warnings.warn(f"{text}: this is no replay", stacklevel=2)
