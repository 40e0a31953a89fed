"""The audit: scores against real retraining.

M random groups of samples are switched off, one group a retraining; the rise of F is compared with the
sum of the group's scores. The linear datamodeling score (LDS) is their Spearman correlation.

Legend: M groups, n samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.groups import audit_groups
from training.kept import Kept
from training.pruning import Stage1
from training.retrain import fleet_size, masks_without, retrain
from training.smoothness import smoothness_of, smoothness_said
from utils.awaited import each
from utils.digest import digest_tensors
from utils.errors import UsageError
from utils.influence.statistics import auroc, found_among_lowest, lds
from utils.progress import bar
from utils.records import write_json


def actual_changes(stage1: Stage1, groups_Mg: Tensor) -> tuple[np.ndarray, float]:
    """F after each masked retraining minus F of the full run [M], and F of the full run.

    What has been retrained under the same settings is not retrained again: every finished fleet is kept. Fleets are
    the same wherever they train, so that what was done elsewhere is found.
    """
    config, job, rounds = stage1.config, stage1.job, stage1.run.rounds
    removed = [[], *groups_Mg.tolist()]
    settings = {"rounds": rounds, "target": config.target, "groups": digest_tensors({"groups": groups_Mg})}
    kept = Kept(stage1, "retrainings", settings)
    parts = torch.arange(len(removed)).split(fleet_size(job, len(removed), config.memory_gb * 1e9))
    fleets = kept.missing([part.tolist() for part in parts])
    count = len(removed) - len(kept.values)

    def work(fleet: list[int]) -> dict[str, Any]:
        return {"rounds": rounds, "target": config.target, "removed": [removed[i] for i in fleet]}

    with bar(len(fleets) * rounds, f"audit: {count} retrainings", "round", config.quiet) as ticks:

        def here(fleet: list[int]) -> list[float]:
            masks_Mn = masks_without(job.sample_weights_n, [removed[i] for i in fleet])
            return retrain(job, rounds, masks_Mn, config.target, ticks.update).tolist()

        kept.make("retrainings", fleets, work, here, lambda _: ticks.update(rounds))
    values = np.array([kept.values[i] for i in range(len(removed))])
    return values[1:] - values[0], float(values[0])


def audit(stage1: Stage1) -> dict[str, Any]:
    """Write audit.json: the LDS of every method of ``--methods`` with its interval, the changes, metasmoothness, and
    one comparison of masked with removed."""
    config = stage1.config
    scores = {method: stage1.scores(method)[0] for method in config.methods}
    groups_Mg = audit_groups(stage1)
    work = smoothness_of, actual_changes
    smooth, (actual_M, full) = each(lambda measure: measure(stage1, groups_Mg), work)
    methods, ids = {}, stage1.job.train_ids
    for method, scores_n in scores.items():
        predicted_M = scores_n[groups_Mg].sum(1).numpy()
        value, interval = lds(predicted_M, actual_M)
        methods[method] = {
            "lds": value, "interval": list(interval), "predicted": predicted_M.tolist(),
            "scores": digest_tensors({
                "scores": scores_n[ids], "sample_id": ids, "worker": stage1.run.worker_of_n.cpu()[ids],
            }),
        }  # fmt: skip
    record = {
        "run": stage1.job.identity["digest"],
        "target": config.target,
        "groups": config.audit_groups,
        "fraction": config.audit_fraction,
        "full": full,
        "actual": actual_M.tolist(),
        "diverged": np.flatnonzero(~np.isfinite(actual_M)).tolist(),
        "methods": methods,
        "metasmoothness": smooth,
        "masked_vs_removed": masked_against_removed(stage1, groups_Mg, actual_M, full),
        "mislabel": mislabel(stage1, scores),
    }
    write_json(stage1.folder / "audit.json", record)
    return record


def masked_against_removed(
    stage1: Stage1, groups_Mg: Tensor, actual_M: np.ndarray, full: float
) -> dict[str, float] | None:
    """The change of F when a group is masked (weight 0, same batches) and when it is really removed (smaller
    shards, other batches, as stage 2 does): the first group that can be removed. None where none can, since
    a worker would be left with nothing (or too little for its network)."""
    ids = stage1.job.train_ids
    for group_g, masked in zip(groups_Mg, actual_M, strict=True):
        try:
            job = stage1.job_on(ids[~torch.isin(ids, group_g)])
        except UsageError:
            continue
        removed = retrain(job, stage1.run.rounds, job.sample_weights_n[None], stage1.config.target)[0].item()
        return {"masked": float(masked), "removed": removed - full}
    return None


def mislabel(stage1: Stage1, scores: dict[str, Tensor]) -> dict[str, dict[str, float]] | None:
    """How well each method finds the flipped labels: AUROC, and the share found among the lowest-scored
    10 and 20 %. None where none were flipped."""
    flipped = stage1.job.corruption.get("flipped")
    if not flipped:
        return None
    ids = stage1.job.train_ids
    bad_n = torch.isin(ids, torch.tensor(flipped)).numpy()
    return {
        method: {
            "auroc": auroc(scores_n[ids].numpy(), bad_n),
            "found_10": found_among_lowest(scores_n[ids].numpy(), bad_n, 0.1),
            "found_20": found_among_lowest(scores_n[ids].numpy(), bad_n, 0.2),
        }
        for method, scores_n in scores.items()
    }


def report(record: dict[str, Any], folder: Path) -> str:
    """The audit as a few lines of text."""
    lines = [f"LDS over {record['groups']} groups of {record['fraction']:.0%} ({folder / 'audit.json'}):"]
    for method, entry in record["methods"].items():
        low, high = entry["interval"]
        lines.append(f"  {method:8s} {entry['lds']:6.3f}  [{low:.3f}, {high:.3f}]")
    if record["diverged"]:
        which = ", ".join(map(str, record["diverged"]))
        lines.append(
            f"  retraining diverged without group {which}, counted as the largest rise: such a run is too rough for "
            "scores, take a smaller --lr"
        )
    lines.append(smoothness_said(record["metasmoothness"], record["fraction"]))
    for method, entry in (record["mislabel"] or {}).items():
        lines.append(
            f"  {method:8s} flipped labels: AUROC {entry['auroc']:.3f}, found in the lowest 10 %: "
            f"{entry['found_10']:.0%}, 20 %: {entry['found_20']:.0%}"
        )
    return "\n".join(lines)
