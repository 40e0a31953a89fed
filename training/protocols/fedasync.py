"""FedAsync: asynchronous federated optimization (Xie et al. 2019), buffered as in FedBuff (Nguyen et al. 2022).

Every worker trains E local epochs from the global row it last got and sends the result when it is done,
at a virtual time of its own. The server mixes each arriving row at once,

    global <- (1 - a_s) global + a_s row,   a_s = alpha (s + 1)^-exponent

with s the number of server updates since the worker got its model; or it waits for K rows and mixes
their average with the average of their weights. The worker gets the new global row and goes on.

A round is one server update. The order of arrivals depends on virtual time alone, never on training, so
it is computed ahead: the rounds are a pure function of the configuration here too. Row k of the fleet is
the model worker k trains; the server's row is extra state.

Legend: N workers, M replicas, D floats a row.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.protocols import Protocol, Round, RoundPlan, finished, local_epoch_steps, train_round
from utils.errors import UsageError
from workers.worker_vision import Fleet

if TYPE_CHECKING:
    from training.build import Job
    from utils.args import Config

SERVER_MODEL = "server"  # the extra state that holds the global model [M, D]


@dataclass(frozen=True)
class Update:
    """One server update: who arrived with how many updates missed, each worker's earlier visits, and the
    virtual time at which it happens."""

    workers: tuple[int, ...]
    staleness: tuple[int, ...]
    visits: tuple[int, ...]
    time: float


class FedAsync(Protocol):
    """The server's row is extra state; row k is what worker k trains."""

    def rounds(self, job: Job) -> int:
        """As many arrivals as N workers need for the epochs, K of them an update."""
        arrivals = job.config.epochs * job.config.num_workers / job.config.local_epochs
        return max(1, math.ceil(arrivals / job.config.buffer_size))

    def workers_at_once(self, config: Config) -> int:
        """Those whose rows one update waits for."""
        return config.buffer_size

    def schedule(self, job: Job) -> list[Update]:
        """All server updates, by simulating arrivals."""

        def simulate() -> list[Update]:
            config, clock = job.config, job.virtual_time
            if config.buffer_size > config.num_workers:
                raise UsageError(
                    f"--buffer_size {config.buffer_size} waits for more rows than {config.num_workers} workers "
                    "have under way: the server would wait for ever."
                )
            work_N = clock.compute_N(local_epoch_steps(job).numpy()) + 2 * clock.transfer()
            queue = [(float(seconds), k, 0) for k, seconds in enumerate(work_N)]  # (arrival, worker, version it has)
            heapq.heapify(queue)
            visits_N, updates = [0] * config.num_workers, []
            for version in range(self.rounds(job)):
                arrived = [heapq.heappop(queue) for _ in range(config.buffer_size)]
                now = arrived[-1][0]
                updates.append(
                    Update(
                        tuple(k for _, k, _ in arrived),
                        tuple(version - has for _, _, has in arrived),
                        tuple(visits_N[k] for _, k, _ in arrived),
                        now,
                    )
                )
                for _, k, _ in arrived:
                    visits_N[k] += 1
                    heapq.heappush(queue, (now + float(work_N[k]), k, version + 1))
            return updates

        return job.once("fedasync schedule", simulate)

    def plan(self, job: Job, r: int) -> RoundPlan:
        """Who trains for update r. A worker's training is simulated when it arrives."""
        update = self.schedule(job)[r]
        epoch_steps_N = local_epoch_steps(job)
        steps_N, first_N = torch.zeros_like(epoch_steps_N), torch.zeros_like(epoch_steps_N)
        for k, visits in zip(update.workers, update.visits, strict=True):
            steps_N[k], first_N[k] = epoch_steps_N[k], visits * epoch_steps_N[k]
        before = self.schedule(job)[r - 1].time if r else 0.0
        return RoundPlan(
            steps_N,
            first_N,
            job.learning_rate(r, self.rounds(job)),
            messages=2 * len(update.workers),
            seconds=update.time - before,
            reset=() if job.config.keep_momentum else update.workers,
        )

    def run(self, fleet: Fleet, job: Job, first: int = 0) -> Iterator[Round]:
        """The server updates."""
        config, N = job.config, fleet.num_workers
        if len(fleet.owned) != N:
            raise UsageError("--protocol fedasync runs in one process: start it without torchrun.")
        if SERVER_MODEL not in fleet.extra:
            fleet.extra[SERVER_MODEL] = fleet.consensus()
            fleet.rows_RD.copy_(fleet.extra[SERVER_MODEL].repeat_interleave(N, 0))
        server_MD = fleet.extra[SERVER_MODEL]
        for r in range(first, self.rounds(job)):
            step, update = self.plan(job, r), self.schedule(job)[r]
            loss_R = train_round(fleet, step)
            rows_MND = fleet.rows_RD.view(fleet.replicas, N, -1)
            weights = [config.async_alpha * (s + 1) ** -config.staleness_exponent for s in update.staleness]
            keep = 1 - sum(weights) / len(weights)
            server_MD.mul_(keep)
            # Ascending workers, whatever order they arrived in: the same sum as fedavg's.
            for k, weight in sorted(zip(update.workers, weights, strict=True)):
                server_MD.add_(rows_MND[:, k], alpha=weight / len(weights))
            for k in update.workers:
                rows_MND[:, k] = server_MD
            yield finished(fleet, step, r + 1, loss_R)

    def model(self, fleet: Fleet) -> Tensor:
        """The server's model [M, D]."""
        return fleet.extra[SERVER_MODEL] if SERVER_MODEL in fleet.extra else super().model(fleet)

    def not_linear(self, config: Config) -> str | None:
        """The server's row and the workers' ages are not in the recursion."""
        return "the adjoint of fedasync is not written"
