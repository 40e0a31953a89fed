"""Coalitions of institutions, each training a model of its own by federated averaging, side by side.

A member of a coalition is a row of one fleet: it trains on its institution's data in the same batches whichever the
coalition is, and is averaged with the other members of its coalition alone, all alike. (To give the samples of the
others weight 0 is not enough: their models must not be averaged.) A coalition stops training at its own early stop
and comes to its best model; one that trains alone comes to the same one, to the bit with ``--engine threads``. The
coalition of all is the run of ``--protocol fedavg --server_weights equal``.

Legend: C coalitions, N institutions, R rows, D floats a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from scipy import sparse
from torch import Tensor

from data.batches import Batches
from training.build import Job, check_batch_norm
from training.execution import optimizer_of
from training.privacy import privacy_of
from training.protocols import RoundPlan, local_epoch_steps, train_round
from utils.early_stopping import EarlyStopping
from utils.errors import UsageError
from utils.progress import Progress, ignored
from utils.random import derive_seed
from workers.worker_vision import Fleet

Coalition = tuple[int, ...]
Watch = Callable[[int, Tensor, Tensor], None]


def all_coalitions(count: int) -> list[Coalition]:
    """The 2^N - 1 that are not empty, the smallest first."""
    return [members for size in range(1, count + 1) for members in combinations(range(count), size)]


class MemberBatches(Batches):
    """The batch schedule of members: that of an institution, whichever the coalition is. ``shards_R``: what each trains
    on; ``member_R``: which institution it is."""

    def __init__(self, shards_R: list[Tensor], batch_size: int, seed: int, member_R: Sequence[int]):
        super().__init__(shards_R, batch_size, seed)
        self._keys_2N[1] = torch.tensor(member_R)


@dataclass(frozen=True)
class Trained:
    """What coalitions came to: their best models ``rows_CD``, the round [C] after which each was best, and how many it
    trained for [C]."""

    rows_CD: Tensor
    rounds: list[int]
    trained: list[int]


def train_coalitions(
    job: Job, coalitions: Sequence[Coalition], progress: Progress = ignored, watch: Watch | None = None,
    held: Sequence[Sequence[Tensor]] | None = None,
) -> Trained:
    """Train them: ``--epochs`` at most, until ``--patience`` rounds have brought no better validation loss.

    ``watch``: sees the last coalition's model before every round, [D], and its members' after their steps, [N, D].
    ``held``: the samples of each member of each coalition (default: all that its institution has); fewer do not make
    fewer steps. Raises :class:`UsageError` where one diverges from the start.
    """
    config, C = job.config, len(coalitions)
    member_R = [k for members in coalitions for k in members]
    shards_R = [job.shards[k] for k in member_R] if held is None else [shard for shards in held for shard in shards]
    first = [0]
    for members in coalitions:
        first.append(first[-1] + len(members))
    batches = MemberBatches(shards_R, config.batch_size, derive_seed(config.seed, "batches"), member_R)
    check_batch_norm(config, job.model, job.samples.shape, batches)
    fleet = Fleet(
        job.engine,
        job.initial_ND[0],
        job.samples,
        batches,
        optimizer=optimizer_of(config),
        seed=derive_seed(config.seed, "augmentation"),
        weights_Mn=job.sample_weights_n[None],
        privacy=privacy_of(config),
    )
    steps_R = local_epoch_steps(job)[member_R]
    rounds = max(1, math.ceil(config.epochs / config.local_epochs))
    last = min(rounds, config.max_rounds or rounds)
    stops = [EarlyStopping(config.patience, config.min_delta) for _ in coalitions]
    best_CD, best_round, trained = fleet.rows_RD[first[:-1]].clone(), [0] * C, [0] * C
    going, mixing = list(range(C)), averages(coalitions, first)
    for r in range(last):
        active_R = torch.zeros(len(member_R), dtype=torch.int64)
        for c in going:
            active_R[first[c] : first[c + 1]] = 1
        rows = active_R.nonzero()[:, 0].tolist()
        plan = RoundPlan(
            steps_N=steps_R * active_R, first_N=steps_R * r, lr=job.learning_rate(r, rounds), mixing=mixing, messages=0,
            seconds=0.0, reset=() if config.keep_momentum else tuple(rows),
        )  # fmt: skip
        before_D = fleet.rows_RD[first[-2]].clone() if watch is not None else None
        train_round(fleet, plan)
        if watch is not None and going[-1] == C - 1:
            watch(r, before_D, fleet.rows_RD[first[-2] :])
        fleet.mix(mixing)
        losses = fleet.evaluate(job.samples, job.val_ids, fleet.rows_RD[[first[c] for c in going]])["loss"].tolist()
        stopped = []
        for c, loss in zip(going, losses, strict=True):
            over, trained[c] = stops[c].update(loss), r + 1
            if stops[c].evaluations_without_improvement == 0:
                best_CD[c], best_round[c] = fleet.rows_RD[first[c]], r + 1
            if over:
                stopped.append(c)
        progress(len(going))
        going = [c for c in going if c not in stopped]
        if not going:
            break
    if 0 in best_round:
        members = coalitions[best_round.index(0)]
        raise UsageError(
            f"the coalition of {', '.join(map(str, members))} has no finite validation loss after any round: take a "
            "smaller --lr."
        )
    return Trained(best_CD, best_round, trained)


def averages(coalitions: Sequence[Coalition], first: Sequence[int]) -> sparse.csr_array:
    """The mixing matrix [R, R]: every member becomes the mean of its coalition's."""
    blocks = [sparse.csr_array([[1 / len(members)] * len(members)] * len(members)) for members in coalitions]
    return sparse.csr_array(sparse.block_diag(blocks, format="csr"))
