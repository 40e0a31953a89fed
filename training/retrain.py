"""Retraining with samples switched off: the ground truth of influence.

Removal is a weight mask, so M retrainings are one fleet of M x N workers with a block-diagonal mixing
matrix. Many retrainings are several fleets, one after the other or elsewhere (``retrainings``: the job that a recipe
asks for), with the same results.

Legend: M masks, N workers, n samples, R rows, D floats a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.build import Job
from training.execution import optimizer_of
from training.protocols import load_protocol
from utils.errors import UsageError
from utils.influence.targets import node_weights
from utils.progress import Progress, bar, ignored
from utils.pruning_args import check_target
from workers.optimizers import state_size
from workers.worker_vision import Fleet


def retrain(
    job: Job, rounds: int, weights_Mn: Tensor, target: str, progress: Progress = ignored
) -> Tensor:
    """F [M] after training ``rounds`` rounds with each row of sample weights."""
    return objective_values(job, trained(job, rounds, weights_Mn, progress), target)


def trained(job: Job, rounds: int, weights_Mn: Tensor, progress: Progress = ignored) -> Fleet:
    """A fleet of M replicas after ``rounds`` rounds with each row of sample weights."""
    fleet = job.make_fleet(weights_Mn)
    for event in load_protocol(job.config.protocol).run(fleet, job):
        progress(1)
        if event.done == rounds:
            break
    return fleet


def objective_values(job: Job, fleet: Fleet, target: str, judges: Tensor | None = None) -> Tensor:
    """The validation objective F of each replica [M] (see ``utils.influence.targets``), on the whole validation set or
    on the samples of these ids."""
    ids = job.val_ids if judges is None else judges
    if target == "consensus":
        return fleet.evaluate(job.samples, ids, fleet.consensus())["loss"].cpu()
    q_N = node_weights(fleet.num_workers, target)
    rows = fleet.rows_RD
    if target.startswith("worker:"):
        return fleet.evaluate(job.samples, ids, rows[int(target[7:]) :: fleet.num_workers])["loss"].cpu()
    loss_R = fleet.evaluate(job.samples, ids)["loss"]
    return loss_R.cpu().view(fleet.replicas, -1) @ q_N


def replicas_that_fit(job: Job, memory: float) -> int:
    """Retrainings a fleet may hold: rows, their twin for gossip, optimizers' state, gradients and activations."""
    layout = job.engine.layout
    further = load_protocol(job.config.protocol).further_rows * layout.P
    floats = job.config.num_workers * (3 * layout.D + state_size(optimizer_of(job.config), layout) + further)
    size = torch.empty(0, dtype=job.samples.dtype).element_size()
    return max(1, int(min(memory / (floats * size), 1e9)))


def fleet_size(job: Job, masks: int, memory: float) -> int:
    """Retrainings a fleet holds: as few as keep the engine busy, since what a kill costs is a fleet; no more
    than fit into the memory."""
    busy = job.engine.busy_rows // job.config.num_workers
    return min(masks, replicas_that_fit(job, memory), max(1, busy))


def masks_without(weights_n: Tensor, removed: Sequence[Sequence[int]]) -> Tensor:
    """The weights of a run's samples [M, n], in each row without these."""
    masks_Mn = weights_n.repeat(len(removed), 1)
    for mask_n, ids in zip(masks_Mn, removed, strict=True):
        mask_n[torch.tensor(ids, dtype=torch.int64)] = 0.0
    return masks_Mn


def retrainings(job: Job, work: dict[str, Any]) -> list[float | str]:
    """F of each retraining, without its ``removed`` samples, for ``rounds`` rounds: of a recipe's work."""
    if not asks(work, len(job.sample_weights_n), rounds=int, target=str):
        raise UsageError("retrainings are 'rounds', a 'target', and for each the ids of its 'removed' samples.")
    check_target(work["target"], job.config.num_workers)
    masks_Mn = masks_without(job.sample_weights_n, work["removed"])
    with bar(work["rounds"], f"retrainings: {len(masks_Mn)}", "round", job.config.quiet) as ticks:
        values_M = retrain(job, work["rounds"], masks_Mn, work["target"], ticks.update)
    return for_json(values_M.tolist())


def asks(work: dict[str, Any], n: int, **kinds: type) -> bool:
    """Whether a recipe's work has all of these, and ids of samples below n that are ``removed`` together."""
    whole = all(type(work.get(name)) is kind for name, kind in {**kinds, "removed": list}.items())
    return whole and all(
        type(ids) is list and all(type(i) is int and 0 <= i < n for i in ids) for ids in work["removed"]
    )


def for_json(values: Sequence[float]) -> list[float | str]:
    """The values as JSON has them, which knows no infinity."""
    return [value if math.isfinite(value) else str(value) for value in values]
