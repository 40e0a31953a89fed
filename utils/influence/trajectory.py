"""What influence methods see of a training run: its states, its steps, and three derivatives.

``training.trajectory`` implements it on the fleet; the methods in this package know neither networks
nor data sets, and any protocol whose rounds are local steps and linear maps (:mod:`utils.linear`) can be one.

Legend: N workers, P trainable floats, D floats a row (parameters, then BatchNorm statistics),
B batch, n samples of the data set, T local steps of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from scipy import sparse
from torch import Tensor, nn

from utils.linear import Line, LinearRound
from utils.progress import Progress, ignored


@dataclass(frozen=True)
class Step:
    """One local step of the run.

        g_k = grad_k + wd x_k + drift_k;   m_k <- beta m_k + g_k;   x_k <- x_k - lr m_k    for the active workers

    (Nesterov: x_k <- x_k - lr (g_k + beta m_k)). ``numbers_N``: which of its own steps each worker makes (it selects
    the batch). ``active``: workers that train (None: all). ``reset``: workers whose momentum is set to zero BEFORE the
    step. ``round``: the round that it belongs to; ``first``, ``last``: whether it begins and ends it.
    """

    lr: float
    numbers_N: Tensor
    active: tuple[int, ...] | None = None
    reset: tuple[int, ...] = ()
    round: LinearRound = field(default_factory=LinearRound)
    first: bool = True
    last: bool = True

    @property
    def mixing(self) -> sparse.csr_array | None:
        """By which matrix rows, or their statistics alone, are mixed after the step."""
        return self.round.mixing if self.last else None


@dataclass
class StepAdjoint:
    """The transposed derivative of one local step, applied to the adjoints of its results.

    ``rows_ND``: what flows back to the rows before the step, without the identity part: H rho on the
    parameters, plus what the batch statistics' adjoint sends back; on the statistics, the whole of it.
    ``products_NB`` = <rho_k, grad loss_i(x_k)> / B_k for the samples ``ids_NB`` (padded with -1).
    """

    rows_ND: Tensor
    products_NB: Tensor
    ids_NB: Tensor


@dataclass
class LastLayer:
    """The last linear layer of a model: the inputs [m, F] of training and [v, F] of validation samples (training ones
    ascending), their targets, and the derivatives of their losses with respect to its outputs: the first [m, C], [v, C]
    and the second [m, C] (None where outputs depend on each other)."""

    head: nn.Linear
    train_features: Tensor
    train_targets: Tensor
    val_features: Tensor
    val_targets: Tensor
    train_curvatures: Tensor | None
    train_residuals: Tensor
    val_residuals: Tensor


@dataclass
class Sent:
    """What workers sent at the end of a round: what each matrix of its lines multiplies [N, P], by line and source, and
    the statistics of BatchNorm [N, S]."""

    sources: dict[tuple[Line, str], Tensor]
    statistics_NS: Tensor


class Trajectory(Protocol):
    """A recorded run that can be walked and differentiated."""

    num_workers: int
    num_steps: int
    P: int
    momentum: float
    nesterov: bool
    weight_decay: float
    worker_of_n: Tensor  # the worker that holds each sample, -1 for samples outside training
    shard_sizes_N: Tensor

    def step(self, t: int) -> Step:
        """The plan of local step t."""

    def final(self) -> Tensor:
        """Rows [N, D] at the end of the run."""

    def forwards(self, steps: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Rows [N, D] before each of these steps (ascending; T is the end), replayed where needed."""

    def backwards(self, first: int = 0, progress: Progress = ignored) -> Iterator[tuple[int, Tensor]]:
        """Rows before step t for t = T-1 .. first. ``progress`` gets a tick a step, once it has been replayed."""

    def backwards_with_sent(self, progress: Progress = ignored) -> Iterator[tuple[int, Tensor, Sent | None]]:
        """The same from the end to the start, with what was sent after each step that ended a round."""

    def checkpoints(self, count: int) -> list[int]:
        """About ``count`` steps, evenly spaced, whose states are cheap to get."""

    def validation_gradient(self, rows_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean validation loss [R] of each row in evaluation mode, and its gradient [R, D]: fresh tensors that
        the caller may overwrite."""

    def step_adjoint(self, t: int, rows_ND: Tensor, rho_NP: Tensor, statistics_NS: Tensor) -> StepAdjoint:
        """See :class:`StepAdjoint`; ``statistics_NS``: adjoint of the updated statistics, S = D - P. The
        caller may overwrite ``rho_NP`` afterwards."""

    def sample_products(self, rows_ND: Tensor, direction_NP: Tensor) -> Tensor:
        """<direction_j, grad loss_i(rows_j)> for every training sample i, j its worker, in evaluation
        mode: [n], zero outside training."""

    def last_layer(self, weights_N: Tensor) -> LastLayer:
        """The last linear layer of the model that is this average of the final rows, and what enters it."""

    def shard_gradient(self, rows_ND: Tensor) -> Tensor:
        """The sum of grad loss_i(rows_j) over the samples i of worker j, in evaluation mode: [N, P]."""
