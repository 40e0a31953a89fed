"""What each worker is to be paid for, if it may be: nothing is paid on values that were not held against retraining.

Scores of a run (``main_pruned.py --audit``) are summed by worker; their audit must be of these very scores, and the
linear datamodeling score's interval must lie above a bound. Values of ``ddval`` (``python -m valuation --seeds 5``)
must come near those of retrained coalitions: the interval of the relative L1 error over seeds must lie below a bound.
And the run's ledger must hold.

Legend: N workers, m training samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ledger.verify import Checked, Wrong, verify
from utils.digest import digest_tensors
from utils.errors import UsageError
from utils.records import read_json, read_record
from utils.scores import read_scores

Condition = Callable[[bool, str], None]
SCORES = ("cascade", "dice", "delete", "if")
METHODS = (*SCORES, "ddval")


class NotAudited(UsageError):
    """Why nothing is paid, in a line."""


@dataclass(frozen=True)
class Audited:
    """``values_N``: what each worker is worth, in the method's own unit; ``run``: the digest of the run's config.json
    as its ledger has it; ``evidence``: what the audit said; ``doubts``: what would have stopped it without --force."""

    values_N: np.ndarray
    run: str
    addresses: list[str | None]
    evidence: dict[str, Any]
    doubts: list[str]


def audited(
    folder: Path, method: str, *, min_lds: float = 0.3, max_l1: float = 0.2, force: bool = False,
    ledger: Path | None = None, keys: list[str] | None = None,
) -> Audited:
    """The values of a run in ``folder`` (results/NAME). Raises :class:`NotAudited` where one of the conditions does
    not hold; with ``force`` those that do not are told in ``doubts``. Raises :class:`UsageError` where there
    are no values at all."""
    stage1 = read_record(folder / "stage1" / "config.json", "config", "identity")
    doubts: list[str] = []

    def condition(holds: bool, otherwise: str) -> None:
        if not holds and not force:
            raise NotAudited(f"nothing is paid: {otherwise} (--force pays, and records that it was forced).")
        if not holds:
            doubts.append(otherwise)

    where = ledger or (Path(stage1["config"]["ledger"]) if stage1["config"].get("ledger") else None)
    checked, why = held(where, stage1, keys)
    condition(checked is not None, why)
    run = stage1["identity"]["digest"]
    values_N, evidence = (of_scores if method in SCORES else of_valuation)(
        folder, method, run, condition, min_lds if method in SCORES else max_l1
    )
    workers = len(values_N)
    addresses: list[str | None] = [None] * workers
    if checked is not None:
        addresses = [checked.records[0][k].what["address"] for k in range(workers)]
    return Audited(values_N, checked.records[0][0].what["run"] if checked else run, addresses, evidence, doubts)


def held(ledger: Path | None, stage1: dict[str, Any], keys: list[str] | None) -> tuple[Checked | None, str]:
    """The run's ledger, where it holds; else why not."""
    if ledger is None:
        return None, "the run has no ledger (main.py --ledger FOLDER)"
    try:
        checked = verify(ledger, keys)
    except (Wrong, UsageError) as error:
        return None, f"its ledger does not hold: {error}"
    if checked.config["identity"] != stage1["identity"]:
        return None, f"{ledger} is the ledger of another run"
    if not checked.ended:
        return None, f"{ledger} is not closed: the run goes on, or its tail is missing"
    return checked, ""


def of_scores(
    folder: Path, method: str, run: str, condition: Condition, min_lds: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores summed by worker, and their audit."""
    found = read_scores(folder / "influence" / f"{method}.zarr")
    if found["settings"].get("run") != run:
        raise UsageError(f"{folder / 'influence' / method}.zarr are of another run: main_pruned.py computes scores.")
    N = read_record(folder / "stage1" / "config.json", "config")["config"]["num_workers"]
    values_N = np.bincount(found["worker"], found["scores"], minlength=N)
    path = folder / "audit.json"
    record = read_json(path) if path.exists() else {"methods": {}}
    try:
        entry = record["methods"].get(method)
        (low, high), lds = (entry["interval"], entry["lds"]) if entry else ((None, None), None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: main_pruned.py --audit writes it anew.") from error
    ask = f"main_pruned.py --audit --methods {method}"
    condition(entry is not None, f"there is no audit of {method} on this run ({ask})")
    if entry is None:
        return values_N, {"method": method, "audit": None}
    whole = digest_tensors({name: found[name] for name in ("scores", "sample_id", "worker")})
    same = record.get("run") == run and entry.get("scores") == whole
    condition(same, f"{path} is not the audit of these scores of this run ({ask})")
    sure = None not in (lds, low, high)
    said = f"{lds:.3f} [{low:.3f}, {high:.3f}]" if sure else "that is not defined"
    condition(sure and low > min_lds, f"the audit of {method} gives an LDS of {said}, and its lower end must be above "
              f"{min_lds:g} (--min_lds)")  # fmt: skip
    return values_N, {"method": method, "lds": lds, "interval": [low, high], "groups": record["groups"]}


def of_valuation(
    folder: Path, method: str, run: str, condition: Condition, max_l1: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """Values of institutions, and how near they came to those of retrained coalitions over seeds."""
    place = folder / "valuation"
    seeds = sorted(place.glob("seed-*/valuation.json"))
    paths = [place / "valuation.json", *seeds]
    for path in filter(Path.exists, paths):
        if read_record(path.parent / "config.json", "identity")["identity"]["digest"] == run:
            break
    else:
        raise UsageError(f"{place} has no values of this run: python -m valuation with the flags of the run, --seeds 5 "
                         f"and --run_name {folder.name}.")  # fmt: skip
    found = read_record(path, "methods")["methods"].get(method)
    if found is None:
        raise UsageError(f"{path} has no values by {method}.")
    summary = read_json(place / "summary.json") if (place / "summary.json").exists() else {}
    figures = summary.get("methods", {}).get(method, {}).get("relative_l1")
    condition(figures is not None, f"{method} was not held against retrained coalitions over seeds (--seeds 5)")
    if figures is None:
        return np.array(found["values"]), {"method": method, "relative_l1": None}
    mean, low, high = figures
    sure = None not in figures and np.isfinite(figures).all()
    said = f"{mean:.3f} [{low:.3f}, {high:.3f}]" if sure else "who knows what"
    condition(sure and high < max_l1, f"{method} is off by {said} in relative L1, and the upper end must be below "
              f"{max_l1:g} (--max_l1)")  # fmt: skip
    evidence = {"method": method, "relative_l1": mean, "interval": [low, high], "seeds": len(seeds)}
    return np.array(found["values"]), evidence
