"""Metasmoothness of a run (:mod:`utils.influence.smoothness`): random groups of samples are switched off in two halves.

It says whether scores can be trusted before any is computed, at the price of two retrainings a group.

Legend: M groups, n samples, N workers, P trainable floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from training.build import Job
from training.groups import audit_groups
from training.kept import Kept
from training.pruning import Stage1
from training.retrain import asks, fleet_size, for_json, masks_without, trained
from utils.digest import digest_tensors
from utils.errors import UsageError
from utils.influence.smoothness import metasmoothness
from utils.influence.statistics import mean_interval
from utils.progress import Progress, bar, ignored

DIRECTIONS = 4  # random groups; each adds two retrainings
SMOOTH = 0.3  # below it the LDS of cascade was mostly below 0.8, above it mostly above (docs/trust.md)


def directions(
    job: Job, rounds: int, removed: Sequence[Sequence[int]], side_by_side: int, progress: Progress = ignored
) -> list[float]:
    """Metasmoothness along each group of ``removed`` samples, ``side_by_side`` trainings at once."""
    weights_n = job.sample_weights_n
    off_Mn = masks_without(weights_n, removed)
    both_Mn = torch.stack([(weights_n + off_Mn) / 2, off_Mn], dim=1).flatten(0, 1)
    rows = _rows(job, rounds, torch.cat([weights_n[None], both_Mn]), side_by_side, progress)
    whole_NP = next(rows)
    return [metasmoothness(whole_NP, next(rows), next(rows)) for _ in removed]


def _rows(job: Job, rounds: int, masks_Mn: Tensor, side_by_side: int, progress: Progress) -> Iterator[Tensor]:
    """Parameters [N, P] at the end of each training."""
    for part_Mn in masks_Mn.split(side_by_side):
        fleet = trained(job, rounds, part_Mn, progress)
        yield from fleet.rows_RD[:, : fleet.layout.P].unflatten(0, (len(part_Mn), -1))


def smoothness_of(stage1: Stage1, groups_Mg: Tensor) -> dict[str, Any]:
    """The metasmoothness of a run along the first groups, its mean and interval; what was measured is kept."""
    config, job, rounds = stage1.config, stage1.job, stage1.run.rounds
    removed = groups_Mg[:DIRECTIONS].tolist()
    kept = Kept(stage1, "smoothness", {"rounds": rounds, "groups": digest_tensors({"groups": groups_Mg[:DIRECTIONS]})})
    room = fleet_size(job, 1 + 2 * len(removed), config.memory_gb * 1e9)
    parts = [part.tolist() for part in torch.arange(len(removed)).split(max(1, (room - 1) // 2))]
    parts = kept.missing(parts)

    def work(part: list[int]) -> dict[str, Any]:
        return {"rounds": rounds, "removed": [removed[i] for i in part], "side_by_side": room}

    def ticks_of(part: list[int]) -> int:
        return rounds * -(-(1 + 2 * len(part)) // room)

    with bar(sum(map(ticks_of, parts)), "metasmoothness", "round", config.quiet) as ticks:
        kept.make(
            "smoothness", parts, work, lambda part: directions(job, **work(part), progress=ticks.update),
            lambda part: ticks.update(ticks_of(part)),
        )
    values = [kept.values[i] for i in range(len(removed))]
    mean, low, high = mean_interval(values)
    return {"mean": mean, "interval": [low, high], "values": values, "smooth": mean >= SMOOTH}


def smoothness_told(stage1: Stage1) -> str:
    """``--smoothness``: measure, and say it."""
    return smoothness_said(smoothness_of(stage1, audit_groups(stage1)), stage1.config.audit_fraction)


def smoothness_said(record: dict[str, Any], fraction: float) -> str:
    """The record in words."""
    (low, high), mean = record["interval"], record["mean"]
    if not math.isfinite(mean):
        return (
            f"metasmoothness of switching off {fraction:.0%} of the samples is not defined: a retraining diverged, or "
            "nothing moved. Scores cannot predict such a run; take a smaller --lr (docs/trust.md)"
        )
    said = f"metasmoothness {mean:.3f} [{low:.3f}, {high:.3f}] of switching off {fraction:.0%} of the samples"
    if record["smooth"]:
        return said
    return (
        f"{said}: below {SMOOTH:g} scores may predict retraining badly; what helps is a smaller --lr, fewer "
        "--epochs, or a smooth --model: cnn_smooth_stem, mlp_smooth (docs/trust.md)"
    )


def smoothness(job: Job, work: dict[str, Any]) -> list[float | str]:
    """Metasmoothness along each group: of a recipe's work."""
    if not asks(work, len(job.sample_weights_n), rounds=int, side_by_side=int) or work["side_by_side"] < 1:
        raise UsageError("smoothness is 'rounds', 'side_by_side', and for each direction the ids of 'removed' samples.")
    return for_json(directions(job, **{name: work[name] for name in ("rounds", "removed", "side_by_side")}))
