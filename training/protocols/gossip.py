"""Gossip: decentralized parallel SGD (D-PSGD; Lian et al., NeurIPS 2017).

A round is tau local steps of every worker, then X <- W X with the topology's mixing matrix of that
round: adapt, then combine.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.protocols import Protocol, RoundPlan

if TYPE_CHECKING:
    from training.build import Job
    from utils.args import Config


class Gossip(Protocol):
    """Everybody trains, then averages with its neighbours."""

    def rounds(self, job: Job) -> int:
        """As many rounds as ``epochs`` take; an epoch is ceil(n / (N B)) steps."""
        return math.ceil(job.total_steps / job.config.local_steps)

    def plan(self, job: Job, r: int) -> RoundPlan:
        """Everybody trains, everybody averages with the neighbours of round r."""
        tau = job.config.local_steps
        steps_N = torch.full((job.config.num_workers,), tau)
        mixing, clock = job.topology.mixing(r), job.virtual_time
        received_N = np.diff(mixing.indptr) - (mixing.diagonal() != 0)
        # A worker goes on when it and all its neighbours are done: the slowest link sets the pace.
        seconds = float(clock.compute_N(steps_N.numpy()).max()) + clock.transfer(int(received_N.max()))
        lr, messages = job.learning_rate(r, self.rounds(job)), job.topology.messages(r)
        return RoundPlan(steps_N, r * steps_N, lr, mixing, messages, seconds)

    def not_linear(self, config: Config) -> str | None:
        """Every round is linear, unless bad rows are sent or a robust rule weighs them."""
        if config.aggregation != "mean" or config.byzantine is not None:
            return "the adjoint of --aggregation and --byzantine is not written"
        return None
