"""Retraining with samples switched off: the ground truth of influence.

Removal is a weight mask, so M retrainings are one fleet of M x N workers with a block-diagonal mixing
matrix. Many retrainings are several fleets, one after the other or on a Dask cluster, with the same results.

Legend: M masks, N workers, n samples, R rows, D floats a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from training.build import Job, build
from training.cluster import completed
from training.execution import Execution, optimizer_of
from training.protocols import load_protocol
from utils.args import Config
from utils.errors import UsageError
from utils.influence.targets import node_weights
from utils.progress import Progress, ignored
from workers.optimizers import state_size


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that another process needs to repeat a run: plain values, no tensors of models. ``run``: its digest
    (see :mod:`training.identity`), which must be the same there. ``decisions``: those of the run's job."""

    config: Config
    execution: Execution
    rounds: int
    run: str
    decisions: dict[str, list] = dataclasses.field(default_factory=dict)

    def job(self, kept_ids: Tensor | None = None) -> Job:
        """The run, built anew; ``kept_ids``: on these training samples only."""
        job = build(dataclasses.replace(self.config, quiet=True, config=None), self.execution, kept_ids)
        job.decisions.update(self.decisions)
        return job


def retrain(
    job: Job, rounds: int, weights_Mn: Tensor, target: str, progress: Progress = ignored
) -> Tensor:
    """F [M] after training ``rounds`` rounds with each row of sample weights."""
    fleet = job.make_fleet(weights_Mn)
    for event in load_protocol(job.config.protocol).run(fleet, job):
        progress(1)
        if event.done == rounds:
            break
    return objective_values(job, fleet, target)


def objective_values(job: Job, fleet: Any, target: str) -> Tensor:
    """The validation objective F of each replica [M] (see ``utils.influence.targets``)."""
    if target == "consensus":
        return fleet.evaluate(job.samples, job.val_ids, fleet.consensus())["loss"].cpu()
    q_N = node_weights(fleet.num_workers, target)
    rows = fleet.rows_RD
    if target.startswith("worker:"):
        return fleet.evaluate(job.samples, job.val_ids, rows[int(target[7:]) :: fleet.num_workers])["loss"].cpu()
    loss_R = fleet.evaluate(job.samples, job.val_ids)["loss"]
    return loss_R.cpu().view(fleet.replicas, -1) @ q_N


def replicas_that_fit(job: Job, memory: float) -> int:
    """Retrainings a fleet may hold: rows, their twin for gossip, optimizers' state, gradients and activations."""
    layout = job.engine.layout
    floats = job.config.num_workers * (3 * layout.D + state_size(optimizer_of(job.config), layout))
    size = torch.empty(0, dtype=job.samples.dtype).element_size()
    return max(1, int(min(memory / (floats * size), 1e9)))


def retrain_masks(
    recipe: Recipe,
    job: Job,
    masks_Mn: Tensor,
    target: str,
    memory: float,
    cluster: str | None = None,
    progress: Progress = ignored,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(Indices of masks, their F) of each fleet of retrainings as it ends, wherever the fleets run. ``progress``:
    once a finished round in this process."""
    if len(masks_Mn) == 0:
        return
    pieces = torch.arange(len(masks_Mn)).split(fleet_size(job, len(masks_Mn), memory))
    if cluster is None:
        for piece in pieces:
            yield piece, retrain(job, recipe.rounds, masks_Mn[piece], target, progress)
        return
    tasks = [(recipe, masks_Mn[piece].numpy(), target) for piece in pieces]
    for i, values in completed(cluster, _retrain_elsewhere, tasks):
        yield pieces[i], torch.from_numpy(values)


def fleet_size(job: Job, masks: int, memory: float) -> int:
    """Retrainings a fleet holds: as few as keep the engine busy, since what a kill costs is a fleet; no more
    than fit into the memory."""
    busy = job.engine.busy_rows // job.config.num_workers
    return min(masks, replicas_that_fit(job, memory), max(1, busy))


def _retrain_elsewhere(recipe: Recipe, masks: Any, target: str) -> Any:
    """Runs in another process: build the job there, retrain, send back M numbers."""
    execution = dataclasses.replace(recipe.execution, threads=1)
    job = dataclasses.replace(recipe, execution=execution).job()
    if job.identity["digest"] != recipe.run:
        raise UsageError("a machine of the cluster has other data or files: use the same code and data everywhere.")
    return retrain(job, recipe.rounds, torch.from_numpy(masks), target).numpy()
