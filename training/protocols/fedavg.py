"""FedAvg: federated averaging (McMahan et al., AISTATS 2017), with server momentum (Hsu et al. 2019).

The server samples a share of the workers; each starts from the global row, makes E local epochs and
sends its row back; the server averages them, weighted by shard size (``--server_weights equal``: all
alike). Between rounds every row of the fleet is the global row, so averaging is a mixing matrix with
equal rows: sampling is a mask of who steps, and the recursion of ``cascade`` goes through it.

Legend: N workers, T rounds, D floats a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from training.protocols import Protocol, Round, RoundPlan, local_epoch_steps
from utils.linear import Line, Lines
from utils.random import permutations
from workers.worker_vision import Fleet

if TYPE_CHECKING:
    from training.build import Job
    from utils.args import Config


class FedAvg(Protocol):
    """Every row is the server's model between rounds."""

    shared = True
    rows_a_message = 1

    def rounds(self, job: Job) -> int:
        """A round gives E epochs to the sampled share of the data: epochs / (E share) rounds."""
        share = sampled_workers(job.config) / job.config.num_workers
        return max(1, math.ceil(job.config.epochs / (job.config.local_epochs * share)))

    def workers_at_once(self, config: Config) -> int:
        """Those that are sampled."""
        return sampled_workers(config)

    def samples_of(self, job: Job) -> Tensor:
        """Which workers each round samples [T, N], bool: a pure function of the seed, computed once."""

        def draw() -> Tensor:
            config, T = job.config, self.rounds(job)
            N, rounds_T1 = config.num_workers, torch.arange(T)[:, None]
            order_TN = permutations(torch.full((T,), N), config.seed, "fedavg", rounds_T1)
            chosen_TN = torch.zeros(T, N, dtype=torch.bool)
            return chosen_TN.scatter_(1, order_TN[:, : sampled_workers(config)], True)

        return job.once("fedavg samples", draw)

    def plan(self, job: Job, r: int) -> RoundPlan:
        """The sampled workers train E epochs from the global row; then all rows become their average."""
        config, clock = job.config, job.virtual_time
        chosen_TN = self.samples_of(job)
        epoch_steps_N = local_epoch_steps(job)
        steps_N = epoch_steps_N * chosen_TN[r]
        workers = chosen_TN[r].nonzero()[:, 0].numpy()
        weights = job.batches.lengths_N[workers].double().numpy()
        if config.server_weights == "equal":
            weights = np.ones(len(workers))
        weights /= weights.sum()
        N, m = config.num_workers, len(workers)
        lr, ends = job.learning_rate(r, self.rounds(job)), np.arange(0, N * m + 1, m)
        broadcast = sparse.csr_array((np.tile(weights, N), np.tile(workers, N), ends), shape=(N, N))
        return RoundPlan(
            steps_N=steps_N,
            first_N=epoch_steps_N * chosen_TN[:r].sum(0),
            lr=lr,
            mixing=broadcast,
            messages=2 * m * self.rows_a_message,
            seconds=float(clock.compute_N(steps_N.numpy()).max()) + 2 * clock.transfer(1, self.message_bytes(job)),
            reset=() if config.keep_momentum else tuple(workers.tolist()),
            begin=self.before(job),
            end=self.after(job, broadcast, steps_N.numpy(), lr),
            sent_bytes=2 * m * self.message_bytes(job),
        )

    def message_bytes(self, job: Job) -> int:
        """Bytes that the server and a worker send each other, one way."""
        return job.virtual_time.row_bytes

    def before(self, job: Job) -> Lines:
        """What precedes the local steps: nothing."""
        return ()

    def after(self, job: Job, broadcast: sparse.csr_array, steps_N: np.ndarray, lr: float) -> Lines | None:
        """What follows them, where not the average alone. With server momentum the server moves by an average of its
        past moves, V. (Every row has the server's.)"""
        beta = job.config.server_momentum
        if not beta:
            return None
        return (
            Line("average", rows=broadcast),
            Line("move", before=1, average=-1),
            Line("velocity", velocity=beta, move=1),
            Line("rows", before=1, velocity=-1),
        )

    def states(self, fleet: Fleet, job: Job) -> dict[str, Tensor]:
        """The server's momentum."""
        return {"velocity": fleet.zeros()} if job.config.server_momentum else {}

    def run(self, fleet: Fleet, job: Job, first: int = 0) -> Iterator[Round]:
        """The rounds."""
        if first == 0 and job.config.init == "per_worker":
            fleet.mix(self.plan(job, 0).mixing)  # the server has one model to begin with
        yield from super().run(fleet, job, first)

    def not_linear(self, config: Config) -> str | None:
        """An average at the start is no round."""
        if config.init == "per_worker":
            return "fedavg with --init per_worker starts with an average that is no round"
        return None


def sampled_workers(config: Config) -> int:
    """Workers a round: the share of N, one at least."""
    return max(1, round(config.fraction_fit * config.num_workers))
