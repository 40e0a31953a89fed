"""Who should talk to whom: what every edge of every round did to the final loss, exactly.

Where the rows X, as they are sent, are mixed by W, with lambda the adjoint of what comes out,

    dF / dW[k, l] = <lambda_k, x_l>

A worker's weights sum to 1, so what an edge takes it takes from the worker's own row: moving the weight of an edge onto
the receiver itself changes F, to first order, by

    W[k, l] <lambda_k, x_k - x_l>

which is what is written here: positive = the edge helped. Protocols that mix something else than rows (corrected,
tracked or known to others) have the sum over all that W multiplies; the statistics of BatchNorm, which are mixed
beside, count too.

Legend: N workers, P trainable floats, D floats a row, T rounds, E edges (directed, receiver first).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from utils.influence.cascade import STEP_BACK
from utils.influence.recursion import Adjoint, round_end_adjoint, step_back, times
from utils.influence.targets import objective
from utils.influence.trajectory import Sent, Step, Trajectory
from utils.linear import Line
from utils.progress import Progress, ignored


@dataclass
class Edges:
    """``helped_TE`` [T, E], float64: what each edge did in each round; 0 where it is not used. ``receiver_E``,
    ``sender_E``: its ends."""

    helped_TE: np.ndarray
    receiver_E: np.ndarray
    sender_E: np.ndarray


def edges(trajectory: Trajectory, target: str = "nodes", progress: Progress = ignored) -> Edges:
    """What every edge of every round did to the objective. ``progress`` gets as many ticks as
    :func:`utils.influence.cascade.ticks` says."""
    _, gradient_ND = objective(trajectory, trajectory.final(), target)
    adjoint, rounds = Adjoint.of_rows(gradient_ND, trajectory.P), []
    for t, rows_ND, sent in trajectory.backwards_with_sent(progress=progress):
        step = trajectory.step(t)
        if sent is not None and step.mixing is not None:
            rounds.append(of_round(step, adjoint, sent, trajectory.P))
        adjoint, _ = step_back(trajectory, t, rows_ND, adjoint)
        progress(STEP_BACK)
    rounds.reverse()
    N = trajectory.num_workers
    code = np.unique(np.concatenate([receiver * N + sender for receiver, sender, _ in rounds]))
    helped_TE = np.zeros((len(rounds), len(code)))
    for r, (receiver, sender, helped) in enumerate(rounds):
        helped_TE[r, np.searchsorted(code, receiver * N + sender)] = helped
    return Edges(helped_TE, code // N, code % N)


def of_round(step: Step, adjoint: Adjoint, sent: Sent, P: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ends of the edges of a round, and what each did. ``adjoint``: after the round."""
    W = step.mixing.tocoo()
    apart = W.row != W.col
    receiver, sender, weight = W.row[apart], W.col[apart], W.data[apart]
    k, l = torch.from_numpy(receiver.astype(np.int64)), torch.from_numpy(sender.astype(np.int64))
    moved = torch.zeros(len(weight), dtype=torch.float64)  # <lambda_k, x_k - x_l>

    def add(arriving: Tensor, sources: Tensor) -> None:
        products_NN = (arriving.double() @ sources.double().T).cpu()
        moved.add_(products_NN[k, k] - products_NN[k, l])

    def watched(line: Line, source: str, arriving: Tensor) -> Tensor:
        if isinstance(line.sources[source], sparse.csr_array):
            add(arriving, sent.sources[line, source])
        return times(line, source, arriving)

    round_end_adjoint(step, adjoint, P, watched)
    if adjoint.rows_ND.shape[1] > P:
        add(adjoint.rows_ND[:, P:], sent.statistics_NS)
    return receiver, sender, weight * moved.numpy()
