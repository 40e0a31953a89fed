"""Protocols: who trains, and who averages with whom.

A protocol is a file with three functions and one line in ``PROTOCOLS``:

- ``rounds(job) -> int``: how many rounds the run has;
- ``plan(job, r) -> RoundPlan``: what happens in round r, a pure function (resume, replay and the
  influence methods ask for any round in any order);
- ``run(fleet, job, first=0) -> Iterator[Round]``: does it. Where a round is "some workers step, then
  rows mix linearly", that is :func:`execute`; influence methods can then differentiate the run.

``not_linear(config)`` says why they cannot (None: they can). ``SHARED = True``: all rows are equal after
a round, so one evaluation serves all workers. ``EVALUATE_EVERY``: rounds between evaluations, where not
an epoch. ``global_model(fleet) -> [M, D]``: the model the run is about, where not the mean of the rows.
``workers_at_once(config)``: how many workers train at a time, where not all.

Protocols never log, evaluate or save: the trainer consumes their rounds.

Legend: N workers, R rows of the fleet (N, times replicas).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from scipy import sparse
from torch import Tensor

from utils.devices import send
from utils.errors import choose
from workers.mixing import without_workers
from workers.worker_vision import Fleet

if TYPE_CHECKING:
    from training.build import Job

PROTOCOLS = {
    "gossip": "training.protocols.gossip",
    "local": "training.protocols.local",
    "fedavg": "training.protocols.fedavg",
    "fedasync": "training.protocols.fedasync",
    "chained": "training.protocols.chained",
}


def load_protocol(name: str) -> ModuleType:
    """The module of a protocol."""
    return importlib.import_module(choose(PROTOCOLS, name, "protocol"))


@dataclass(frozen=True)
class RoundPlan:
    """One round: every worker k makes ``steps_N[k]`` local steps, numbered from ``first_N[k]`` (its own
    count, which selects its batches), at learning rate ``lr``; then X <- ``mixing`` X (None: nobody
    talks). ``messages``: rows sent over links. ``seconds``: virtual time it takes. ``reset``: workers whose
    momentum is zeroed before they train. ``mix_momentum``: the momentum rows travel with the parameters."""

    steps_N: Tensor
    first_N: Tensor
    lr: float
    mixing: sparse.csr_array | None = None
    messages: int = 0
    seconds: float = 0.0
    reset: tuple[int, ...] = ()
    mix_momentum: bool = False

    def active(self, step: int) -> list[int] | None:
        """The workers that make the round's ``step``-th local step; None means all."""
        training_N = self.steps_N > step
        return None if bool(training_N.all()) else training_N.nonzero()[:, 0].tolist()


@dataclass
class Round:
    """What a protocol yields after each round: how many are done, the learning rate, the training loss
    of each row [R] (mean over its local steps), which rows trained at all [R], rows sent, virtual
    seconds passed, and samples trained on in this round."""

    done: int
    lr: float
    train_loss_R: Tensor
    trained_R: Tensor
    messages: int
    seconds: float
    samples: int


def execute(fleet: Fleet, job: Job, first: int = 0) -> Iterator[Round]:
    """Rounds ``first`` .. end of a protocol whose rounds are local steps and a linear mix."""
    protocol = load_protocol(job.config.protocol)
    for r in range(first, protocol.rounds(job)):
        plan = protocol.plan(job, r)
        loss_R = train_round(fleet, plan)
        if job.config.on_bad_worker == "isolate":
            fleet.isolate(loss_R)
        if plan.mixing is not None:
            meet(fleet, job, plan, r)
        yield finished(fleet, plan, r + 1, loss_R)


def meet(fleet: Fleet, job: Job, plan: RoundPlan, r: int) -> None:
    """The gossip step of a round: linear, or under a robust rule, without isolated workers."""
    matrix = plan.mixing
    if fleet.isolated:
        name = f"mixing {r % job.topology.period} without {sorted(fleet.isolated)}"
        matrix = job.once(name, lambda: without_workers(plan.mixing, fleet.isolated))
    if job.config.aggregation == "mean" and job.byzantine is None:
        fleet.mix(matrix, plan.mix_momentum)
    else:
        isolate = job.config.on_bad_worker == "isolate"
        fleet.mix_robustly(matrix, job.config.aggregation, job.byzantine, r, isolate)


def train_round(fleet: Fleet, plan: RoundPlan) -> Tensor:
    """The local steps of a round; the summed training loss [R]."""
    if plan.reset:
        fleet.reset_momentum(list(plan.reset))
    loss_R = torch.zeros(fleet.num_rows, device=fleet.device)
    for step in range(int(plan.steps_N.max())):
        active = plan.active(step)
        if fleet.isolated:
            active = [k for k in active or range(fleet.num_workers) if k not in fleet.isolated]
        loss_R += fleet.step(plan.first_N + step, plan.lr, active)
    return loss_R


def finished(fleet: Fleet, plan: RoundPlan, done: int, loss_R: Tensor) -> Round:
    """The event of a round that followed its plan."""
    steps_R = plan.steps_N.repeat(fleet.replicas)
    if fleet.isolated:
        steps_R[sorted(fleet.isolated)] = 0
    steps_R = send(steps_R, fleet.device)
    return Round(
        done,
        plan.lr,
        fleet.collect(loss_R) / steps_R,
        steps_R > 0,
        plan.messages,
        plan.seconds,
        int((plan.steps_N * fleet.batches.sizes_N).sum()),
    )


def local_epoch_steps(job: Job) -> Tensor:
    """Local steps [N] that ``--local_epochs`` passes over each worker's own shard take, pruned samples included:
    stage 2 makes as many steps as stage 1."""
    return job.config.local_epochs * -(-job.whole_N // job.whole_N.clamp(max=job.config.batch_size))
