"""Protocols: who trains, and who averages with whom.

A protocol is a file with a subclass of :class:`Protocol` and one line in ``utils.registry.PROTOCOLS``. It says what
its rounds are; it never logs, evaluates or saves: the trainer consumes its rounds.

Legend: N workers, R rows of the fleet (N, times replicas).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from scipy import sparse
from torch import Tensor

from utils.devices import send
from utils.errors import UsageError
from utils.influence.trajectory import Step
from utils.linear import LinearRound, Lines
from utils.registry import PROTOCOLS, load
from workers.mixing import without_workers
from workers.rounds import begin_round, end_round
from workers.worker_vision import Fleet

if TYPE_CHECKING:
    from training.build import Job
    from utils.args import Config

def load_protocol(name: str) -> Protocol:
    """The protocol of that name."""
    return load(PROTOCOLS, name, "protocol")()


@dataclass(frozen=True)
class RoundPlan:
    """One round: every worker k makes ``steps_N[k]`` local steps, numbered from ``first_N[k]`` (its own
    count, which selects its batches), at learning rate ``lr``; then X <- ``mixing`` X (None: nobody
    talks), or what the lines of ``begin`` and ``end`` say (:mod:`utils.linear`). ``messages``: rows sent over links.
    ``sent_bytes``: all that is sent (None: rows alone). ``seconds``: virtual time it takes. ``reset``: workers whose
    momentum is zeroed before they train. ``mix_momentum``: the momentum rows travel with the parameters."""

    steps_N: Tensor
    first_N: Tensor
    lr: float
    mixing: sparse.csr_array | None = None
    messages: int = 0
    seconds: float = 0.0
    reset: tuple[int, ...] = ()
    mix_momentum: bool = False
    begin: Lines = ()
    end: Lines | None = None
    sent_bytes: int | None = None

    @cached_property
    def linear(self) -> LinearRound:
        """All of it but the local steps."""
        return LinearRound(self.mixing, self.mix_momentum, self.begin, self.end)

    @property
    def num_steps(self) -> int:
        """Local steps of the busiest worker."""
        return int(self.steps_N.max())

    def step(self, s: int) -> Step:
        """The round's ``s``-th local step."""
        training_N = self.steps_N > s
        active = None if bool(training_N.all()) else tuple(training_N.nonzero()[:, 0].tolist())
        first, last = s == 0, s + 1 == self.num_steps
        return Step(self.lr, self.first_N + s, active, self.reset if first else (), self.linear, first, last)


@dataclass
class Round:
    """What a protocol yields after each round: how many are done, the learning rate, the training loss
    of each row [R] (mean over its local steps), which rows trained at all [R], rows sent, virtual
    seconds passed, samples trained on in this round, and bytes sent where they are not those of the rows."""

    done: int
    lr: float
    train_loss_R: Tensor
    trained_R: Tensor
    messages: int
    seconds: float
    samples: int
    sent_bytes: int | None = None


class Protocol(ABC):
    """What a protocol says. ``rounds`` and ``plan`` are pure functions of the configuration (and of ``job.decisions``):
    resume, replay and the influence methods ask for any round in any order.

    ``shared``: all rows are equal after a round, so that one evaluation serves all workers. ``evaluate_every``:
    rounds between evaluations, where not an epoch. ``has_edges``: what is mixed at the end of a round is mixed by the
    mixing matrix of a graph, whose edges have a derivative of their own (:mod:`utils.influence.edges`).
    ``further_rows``: of P floats that it holds for a worker, at most, beside the row and the optimizer's state.
    """

    shared = False
    evaluate_every: int | None = None
    has_edges = False
    further_rows = 0

    @abstractmethod
    def rounds(self, job: Job) -> int:
        """How many rounds the run has."""

    @abstractmethod
    def plan(self, job: Job, r: int) -> RoundPlan:
        """What happens in round ``r``."""

    def run(self, fleet: Fleet, job: Job, first: int = 0) -> Iterator[Round]:
        """Rounds ``first`` .. end. Here: the local steps and the lines of the plan, and nothing else, which is what
        influence methods can differentiate."""
        self.start(fleet, job)
        for r in range(first, self.rounds(job)):
            self.decide(fleet, job, r)
            plan = self.plan(job, r)
            loss_R = train_round(fleet, plan)
            if job.config.on_bad_worker == "isolate":
                fleet.isolate(loss_R)
            mix_round(fleet, job, plan, r)
            yield finished(fleet, plan, r + 1, loss_R)

    def states(self, fleet: Fleet, job: Job) -> dict[str, Tensor]:
        """Matrices of its own that it keeps from round to round, in ``fleet.extra``, as they are at the start."""
        return {}

    def start(self, fleet: Fleet, job: Job) -> None:
        """See to it that these matrices are there: at the start of a run, or as a checkpoint has them."""
        states = self.states(fleet, job)
        if set(fleet.extra) - set(states) or any(fleet.extra[n].shape != states[n].shape for n in fleet.extra):
            raise UsageError("the checkpoint is of an older version of this protocol: --overwrite starts anew.")
        fleet.extra = states | fleet.extra

    def check(self, job: Job) -> None:  # noqa: B027, most protocols need nothing more
        """Before anything begins: raises :class:`UsageError` where what it needs is missing or does not fit."""

    def decide(self, fleet: Fleet, job: Job, r: int) -> None:  # noqa: B027, most protocols have nothing to decide
        """Before round ``r``: what its plan needs and the state of the run tells goes into ``job.decisions``, unless it
        is there already."""

    def workers_at_once(self, config: Config) -> int:
        """How many workers train at a time."""
        return config.num_workers

    def weight_decay(self, config: Config) -> float:
        """That of the local steps."""
        return config.wd

    def not_linear(self, config: Config) -> str | None:
        """Why influence methods cannot differentiate the run; None: they can. Say so where ``run`` is another."""
        return None

    def model(self, fleet: Fleet) -> Tensor:
        """The model that the run is about in each replica [M, D]: the mean of the rows."""
        return fleet.consensus()


def check_differentiable(config: Config) -> None:
    """Raises :class:`UsageError` where influence methods cannot differentiate the run."""
    if config.optimizer not in ("sgd", "nesterov"):
        raise UsageError(
            "influence methods need --optimizer sgd or nesterov: the derivative of a step of "
            f"{config.optimizer} is not written."
        )
    if config.dp_noise is not None:
        raise UsageError(
            "--dp_noise: influence methods ask what a sample did, which is what clipping and noise hide, and the "
            "derivative of a clipped step is not written: leave it out."
        )
    reason = load_protocol(config.protocol).not_linear(config)
    if reason is not None:
        raise UsageError(f"influence methods need rounds that mix linearly: {reason}.")


def mix_round(fleet: Fleet, job: Job, plan: RoundPlan, r: int) -> None:
    """The gossip step of a round: linear, or under a robust rule, without isolated workers."""
    matrix = plan.mixing
    if plan.end is not None or matrix is None:
        end_round(fleet, plan.linear)
        return
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
    loss_R = torch.zeros(fleet.num_rows, device=fleet.device)
    for s in range(plan.num_steps):
        loss_R += train_step(fleet, plan.step(s))
    if fleet.watch is not None:
        fleet.watch()
    return loss_R


def train_step(fleet: Fleet, step: Step) -> Tensor:
    """One local step, without the mix that may follow it; the training loss [R] before it."""
    if step.first:
        begin_round(fleet, step.round)
    if step.reset:
        fleet.reset_state(list(step.reset))
    active = step.active
    if fleet.isolated:
        active = [k for k in active or range(fleet.num_workers) if k not in fleet.isolated]
    return fleet.step(step.numbers_N, step.lr, None if active is None else list(active))


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
        plan.sent_bytes,
    )


def local_epoch_steps(job: Job) -> Tensor:
    """Local steps [N] that ``--local_epochs`` passes over each worker's own shard take, pruned samples included:
    stage 2 makes as many steps as stage 1."""
    return job.config.local_epochs * -(-job.whole_N // job.whole_N.clamp(max=job.config.batch_size))
