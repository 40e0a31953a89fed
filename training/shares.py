"""Which share of the samples to keep: the scores propose, a part of the validation set that they have not seen decides.

Scores fit the quirks of the samples that judge them, and their sums promise gains that are not there (digits without
wrong labels, 143 validation samples: docs/influence.md). So each of F
parts of the validation set judges the prunings that the other parts propose, by a retraining with these samples
switched off: cross-fitting.

Legend: n samples, F folds, R shares, T retrainings.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.kept import Kept
from training.pruning import Stage1, say
from training.retrain import fleet_size, masks_without, objective_values, trained
from training.scores import choosing_folds, folds_of, keep_best, scores_by_fold, signal
from utils.digest import digest_tensors
from utils.influence.statistics import mean_interval
from utils.progress import bar


def share_to_keep(stage1: Stage1, method: str) -> tuple[float, dict[str, Any]]:
    """The share of ``--choose_ratio`` by which the loss on held-out parts of the validation set falls most, if its 95 %
    t interval over the parts excludes zero; 1 where none does. Says what was chosen, and gives the record of it, for
    the comparison."""
    record = held_out_changes(stage1, method)
    say(shares_said(record))
    return record["chosen"], record


def held_out_changes(stage1: Stage1, method: str) -> dict[str, Any]:
    """By how much the loss on each held-out part changes, of each share, with means and intervals; the one chosen."""
    config, worker_n, ids = stage1.config, stage1.run.worker_of_n.cpu(), stage1.job.train_ids
    F, shares = choosing_folds(config), sorted(set(config.choose_ratio), reverse=True)
    scores_Fn = scores_by_fold(method, stage1.run, config, stage1.folder / "influence", stage1.final_state, F)
    removed = [ids[:0]]  # of the whole run; then of each share, for each part what the others propose
    for share in shares:
        for f in range(F):
            others_Fn = torch.cat([scores_Fn[:f], scores_Fn[f + 1 :]])
            by_n = others_Fn.mean(0) if config.val_folds == 1 else signal(others_Fn)
            removed.append(ids[~torch.isin(ids, keep_best(by_n, worker_n, share, config.prune_scope))])
    losses_TF = losses_by_part(stage1, removed, F)
    with np.errstate(invalid="ignore"):
        changes_RF = losses_TF[1:].reshape(-1, F, F).diagonal(axis1=1, axis2=2) - losses_TF[0]
    rows = []
    for share, changes_F in zip(shares, changes_RF, strict=True):
        finite = np.isfinite(changes_F).all()  # a retraining that diverged is no gain
        mean, low, high = mean_interval(changes_F.tolist()) if finite else (math.inf,) * 3
        rows.append({"share": share, "change": mean, "interval": [low, high], "changes": changes_F.tolist()})
    better = [row for row in rows if row["interval"][1] < 0]
    chosen = min(better, key=lambda row: row["change"])["share"] if better else 1.0
    samples = len(stage1.job.val_ids)
    return {"algorithm": method, "folds": F, "validation_samples": samples, "shares": rows, "chosen": chosen}


def losses_by_part(stage1: Stage1, removed: list[Tensor], F: int) -> np.ndarray:
    """The validation objective on each of F parts of the validation set after a retraining without each of ``removed``
    [T, F]; a fleet's are kept as soon as they are there."""
    config, job, rounds = stage1.config, stage1.job, stage1.run.rounds
    digest = digest_tensors({str(t): ids for t, ids in enumerate(removed)})
    kept = Kept(stage1, "shares", {"rounds": rounds, "target": config.target, "folds": F, "removed": digest})
    size = fleet_size(job, len(removed), config.memory_gb * 1e9) * F
    fleets = kept.missing([part.tolist() for part in torch.arange(len(removed) * F).split(size)])
    with bar(len(fleets) * rounds, "shares to keep: retrainings", "round", config.quiet) as ticks:
        for fleet in fleets:
            off = [removed[i // F].tolist() for i in fleet[::F]]
            made = trained(job, rounds, masks_without(job.sample_weights_n, off), ticks.update)
            losses = [objective_values(job, made, config.target, folds_of(stage1.run, f, F)) for f in range(F)]
            kept.add(fleet, torch.stack(losses, dim=1).flatten().tolist())
    return np.array([kept.values[i] for i in range(len(removed) * F)]).reshape(-1, F)


def shares_said(record: dict[str, Any]) -> str:
    """What was chosen, and why, in a line."""
    judged = f"by {record['folds']} held-out parts of {record['validation_samples']} validation samples"
    if record["chosen"] == 1:
        finite = [row for row in record["shares"] if math.isfinite(row["change"])]
        if not finite:
            return f"share to keep: all, {judged}: retrainings on the others diverged"
        best = min(finite, key=lambda row: row["change"])
        low, high = best["interval"]
        return (
            f"share to keep: all, {judged}: no other lowers their loss beyond its 95 % interval (the best, "
            f"{best['share']:g}, by {best['change']:+.4f} [{low:+.4f}, {high:+.4f}])"
        )
    row = next(row for row in record["shares"] if row["share"] == record["chosen"])
    low, high = row["interval"]
    changes = f"their loss changes by {row['change']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"share to keep: {record['chosen']:g}, {judged}: {changes}"
