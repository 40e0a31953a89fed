"""Which part of the data a picture belongs to: by patient, so that nobody is learned from and judged by at once.

What a source says is kept. Where it names no test or no validation pictures, whole patients are drawn from the others,
each by a hash of its name and the seed: a patient's part depends on nobody else, so it stays the same when pictures
are added or removed. A larger --val_fraction moves nobody into test or out of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from data.medical_tables import Entry
from data.picture_work import LeftOut
from utils.random import uniform

STRENGTH = {"train": 0, "val": 1, "test": 2}  # whose pictures stay, where a patient is in several parts
ELSEWHERE = "their patient has pictures in the test or validation part of the source, where these do not belong"


def draw(units: Sequence[str], seed: int, val_fraction: float, test_fraction: float) -> list[str]:
    """train, val or test for each unit (a patient; a picture where nobody knows the patient). A pure function of the
    unit, the seed and the fractions."""
    if not units:
        return []
    hashes = [hashlib.sha256(unit.encode("utf-8", "surrogateescape")).digest()[:8] for unit in units]
    keys = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in hashes])
    return [
        "test" if share < test_fraction else "val" if share < test_fraction + val_fraction else "train"
        for share in uniform("split by patient", seed, keys).tolist()
    ]


def split(
    entries: list[Entry], seed: int, val_fraction: float, test_fraction: float, left_out: LeftOut
) -> list[tuple[Entry, str]]:
    """Each entry with its part. Those of a patient who is in several parts of the source stay in the strongest
    (test, then val) and are left out elsewhere.

    Where a source has validation and no test pictures (CheXpert's valid.csv), they are the test part.
    """
    given = [entry.split for entry in entries]
    if "test" not in given:
        given = ["test" if name == "val" else name for name in given]
    units = [f"patient {entry.patient}" if entry.patient else f"file {entry.file}" for entry in entries]
    drawn = draw(units, seed, 0 if "val" in given else val_fraction, 0 if "test" in given else test_fraction)
    parts = [name if name in ("val", "test") else own for name, own in zip(given, drawn, strict=True)]
    strongest: dict[str, str] = {}
    for unit, part in zip(units, parts, strict=True):
        strongest[unit] = max(part, strongest.get(unit, part), key=STRENGTH.__getitem__)
    kept = []
    for entry, unit, part in zip(entries, units, parts, strict=True):
        if strongest[unit] == part:
            kept.append((entry, part))
        else:
            left_out.add(ELSEWHERE, entry.file)
    return kept
