"""SCAFFOLD: federated averaging with control variates (Karimireddy et al., ICML 2020, arXiv 1910.06378, Algorithm 1,
option II).

A worker's steps go along g_k + c - c_k, where c_k estimates its own mean gradient and c everybody's:

    y_k   <-  x, then K steps of   y_k <- y_k - lr (g_k + c - c_k)
    c_k+  =   c_k - c + (x - y_k) / (K lr)                for the sampled workers
    x+    =   x + lr_server * mean of (y_k - x),    c+  =  c + (1 / N) * sum of (c_k+ - c_k)

With ``--momentum`` K is what K steps along a constant gradient of 1 move by, so that c_k stays a mean of gradients;
momentum begins anew in every round. Two rows go each way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from training.protocols.fedavg import FedAvg
from training.protocols.gossip import per_rate
from utils.errors import UsageError
from utils.linear import Line, Lines, averaging

if TYPE_CHECKING:
    from torch import Tensor

    from training.build import Job
    from utils.args import Config
    from workers.worker_vision import Fleet


class Scaffold(FedAvg):
    """FedAvg that corrects what different shards do to it."""

    further_rows = 8
    rows_a_message = 2

    def check(self, job: Job) -> None:
        """c_k is read off the move of plain steps."""
        config = job.config
        if config.optimizer not in ("sgd", "nesterov") or config.keep_momentum or config.dp_noise is not None:
            raise UsageError("--protocol scaffold reads gradients off how far workers moved: it needs --optimizer sgd "
                             "or nesterov, without --keep_momentum and --dp_noise.")  # fmt: skip

    def message_bytes(self, job: Job) -> int:
        """The model, and a control variate."""
        return job.virtual_time.row_bytes + job.parameter_bytes

    def states(self, fleet: Fleet, job: Job) -> dict[str, Tensor]:
        """c, of which every row has a copy, and c_k."""
        return {"common": fleet.zeros(), "own": fleet.zeros()}

    def before(self, job: Job) -> Lines:
        """Added to every gradient: c - c_k."""
        return (Line("drift", common=1, own=-1),)

    def after(self, job: Job, broadcast: sparse.csr_array, steps_N: np.ndarray, lr: float) -> Lines | None:
        """The end of a round."""
        if not per_rate(lr):  # nobody moves, and nothing is learned of gradients
            return None
        sampled_N = (steps_N > 0).astype(np.float64)
        move_N = np.array([moved(k, job.config) for k in steps_N.tolist()])
        per_move_N = sampled_N / np.maximum(move_N, 1) * per_rate(lr)
        average = job.once("mean", lambda: averaging(job.config.num_workers))
        step = job.config.server_lr
        return (
            Line("change", before=per_move_N, rows=-per_move_N, common=-sampled_N),  # c_k+ - c_k
            Line("own", own=1, change=1),
            Line("changes", change=average),
            Line("common", common=1, changes=1),
            Line("average", rows=broadcast),
            Line("rows", before=1 - step, average=step),
        )


def moved(steps: int, config: Config) -> float:
    """How far ``steps`` steps at rate 1 go along a constant gradient of 1, from no momentum."""
    beta, momentum, way = config.momentum, 0.0, 0.0
    for _ in range(steps):
        momentum = beta * momentum + 1
        way += 1 + beta * momentum if config.optimizer == "nesterov" else momentum
    return way
