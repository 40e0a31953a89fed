"""Gossip: decentralized parallel SGD (D-PSGD; Lian et al., NeurIPS 2017).

A round is tau local steps of every worker, then X <- W X with the topology's mixing matrix of that round: adapt, then
combine. With ``--order cta`` workers average what they began the round with while they compute, and add what they
learned: X <- W X - lr M, combine, then adapt (Lian et al.'s own order).

Legend: N workers, E messages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from training.protocols import Protocol, RoundPlan
from utils.errors import UsageError
from utils.linear import Line, Lines

if TYPE_CHECKING:
    from training.build import Job
    from utils.args import Config


class Gossip(Protocol):
    """Everybody trains, then averages with its neighbours. Those that combine otherwise say how in ``after``."""

    rows_a_message = 1
    has_edges = True

    def rounds(self, job: Job) -> int:
        """As many rounds as ``epochs`` take; an epoch is ceil(n / (N B)) steps."""
        return math.ceil(job.total_steps / job.config.local_steps)

    def mixing(self, job: Job, r: int) -> sparse.csr_array:
        """Who averages with whom in round r."""
        return job.topology.mixing(r)

    def after(self, job: Job, r: int, W: sparse.csr_array, lr: float) -> Lines | None:
        """What follows the local steps (default: X <- W X)."""
        if job.config.order == "atc":
            return None
        return (Line("rows", before=minus_identity(job, W), rows=1),)  # X' = X - lr M, so W X - lr M = (W - I) X + X'

    def overlaps(self, config: Config) -> bool:
        """Whether rows are on their way while workers compute."""
        return config.protocol == "gossip" and config.order == "cta"

    def message_bytes(self, job: Job) -> int:
        """Bytes that cross a link in a round."""
        return self.rows_a_message * job.virtual_time.row_bytes

    def plan(self, job: Job, r: int) -> RoundPlan:
        """Everybody trains, everybody averages with the neighbours of round r."""
        tau = job.config.local_steps
        steps_N = torch.full((job.config.num_workers,), tau)
        mixing, clock = self.mixing(job, r), job.virtual_time
        received_N = np.diff(mixing.indptr) - (mixing.diagonal() != 0)
        lr, one = job.learning_rate(r, self.rounds(job)), self.message_bytes(job)
        links, end = int(received_N.sum()), self.after(job, r, mixing, lr)
        # A worker goes on when it and all its neighbours are done: the slowest link sets the pace.
        parts = float(clock.compute_N(steps_N.numpy()).max()), clock.transfer(int(received_N.max()), one)
        return RoundPlan(
            steps_N, r * steps_N, lr, mixing, links * self.rows_a_message,
            max(parts) if self.overlaps(job.config) else sum(parts), end=end, sent_bytes=links * one,
        )  # fmt: skip

    def not_linear(self, config: Config) -> str | None:
        """Every round is linear, unless bad rows are sent or a robust rule weighs them."""
        if config.aggregation != "mean" or config.byzantine is not None:
            return "the adjoint of --aggregation and --byzantine is not written"
        return None


def minus_identity(job: Job, W: sparse.csr_array) -> sparse.csr_array:
    """W - I, one matrix for each W."""
    return job.engine.kept(
        ("minus identity", id(W)), W, lambda: sparse.csr_array(W - sparse.eye_array(W.shape[0], format="csr"))
    )


def per_rate(lr: float) -> float:
    """1 / lr; 0 where the rate has fallen to (nearly) nothing, of which a move tells nothing."""
    return 1 / lr if lr > 1e-30 else 0.0


def check_one_local_step(job: Job, why: str) -> None:
    """Raises :class:`UsageError` with --local_steps above 1."""
    if job.config.local_steps > 1:
        name = job.config.protocol
        raise UsageError(f"--protocol {name} makes one local step a round: {why} Leave out --local_steps.")


def check_doubly_stochastic(job: Job) -> None:
    """Raises :class:`UsageError` where averaging would not keep the mean."""
    if not job.topology.is_doubly_stochastic:
        raise UsageError(
            f"--protocol {job.config.protocol} needs averages that keep the mean of all workers, which those of "
            f"--mode {job.config.mode} here do not: take another --mode, or --protocol pushsum."
        )
