"""Tasks: what a model learns, and what it is measured by.

A data set brings its task, and nothing else in the house asks what data are: splits and partitions take the task's
strata, training and influence its losses, evaluation its metrics, plots their names and directions. To add a task,
subclass :class:`Task` in a file of its own and add a line to ``utils.registry.TASKS``.

Legend: n workers of a chunk, B batch, C outputs, R rows, m samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from utils.registry import TASKS, load


@dataclass(frozen=True)
class Metric:
    """A figure that tells how good a model is. ``unit``: that of the figure, '' for shares and plain numbers."""

    name: str
    higher_is_better: bool
    unit: str = ""


class Task(ABC):
    """What a model learns.

    ``names``: of the outputs (classes, findings, horizons). ``metrics``: the first is what progress bars, tables and
    plots show. ``summed``: metrics are sums over samples, so that no outputs need to be kept: :meth:`sums` and
    :meth:`of_sums`; else :meth:`of_outputs`. ``one_class``: each sample is of one class, so that a worker has a mix
    of classes.

    Targets come from the data set; :meth:`encoded` is what losses and metrics take.
    """

    kind: ClassVar[str]
    metrics: tuple[Metric, ...]
    summed: ClassVar[bool] = False
    one_class: ClassVar[bool] = False

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)

    @property
    def metric(self) -> Metric:
        """The metric that is shown where there is room for one."""
        return self.metrics[0]

    @property
    def what(self) -> str:
        """What is learned of samples, in words."""
        return f"with {self.num_outputs} {self.kind} outputs"

    @property
    def num_outputs(self) -> int:
        """Outputs of a network for this task."""
        return len(self.names)

    def record(self) -> dict[str, Any]:
        """JSON-able: what :func:`task_of` makes the task from."""
        return {"kind": self.kind, "names": list(self.names)}

    def encoded(self, targets: Tensor) -> Tensor:
        """The data set's targets as losses and metrics take them."""
        return targets

    @abstractmethod
    def misfit(self, targets_m: Tensor) -> str | None:
        """What is wrong with a data set's targets, in words; None: nothing."""

    @abstractmethod
    def losses(self, outputs_nBC: Tensor, targets_nB: Tensor) -> Tensor:
        """The loss of each sample [n, B], in float32 at least."""

    @abstractmethod
    def strata(self, targets_m: Tensor) -> Tensor:
        """What splits and partitions balance: int64 [m], from 0."""

    @abstractmethod
    def stratum_names(self, targets_m: Tensor) -> list[str]:
        """The names of the strata of these targets."""

    @abstractmethod
    def predicted(self, outputs: Tensor) -> Tensor:
        """What a person reads: outputs [..., C] as classes [...], probabilities [..., C] or values [..., C]."""

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """Probabilities [..., C] of the names; None where names are no such thing."""
        return None

    def hits(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> np.ndarray | None:
        """Which samples are predicted right, bool [m], where the first metric is the share of them."""
        return None

    @abstractmethod
    def score(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> float:
        """The first metric of what :meth:`predicted` gave and the data set's targets."""

    def of_outputs(self, outputs_RmC: Tensor, targets_m: Tensor) -> dict[str, Tensor]:
        """Every metric of each row [R] on the CPU, float64."""
        raise NotImplementedError

    def sums(self, outputs_nBC: Tensor, targets_nB: Tensor) -> Tensor:
        """Sums over a batch [n, K], float64, that add up over batches."""
        raise NotImplementedError

    def of_sums(self, sums_RK: Tensor, count: int) -> dict[str, Tensor]:
        """Every metric of each row [R] from the sums over ``count`` samples."""
        raise NotImplementedError

    @abstractmethod
    def by_output(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> dict[str, dict[str, float]]:
        """Metrics of each output by its name: {'accuracy_by_class': {'cat': 0.9, ...}}."""

    def confusion(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> np.ndarray | None:
        """How many samples of each class (row) are taken for each class (column), int64 [C, C], where there are."""
        return None

    @abstractmethod
    def residuals(self, outputs_mC: Tensor, targets_m: Tensor) -> Tensor:
        """The derivative of each sample's loss with respect to its outputs [m, C]."""

    def curvatures(self, outputs_mC: Tensor, targets_m: Tensor) -> Tensor | None:
        """The second derivatives [m, C]; None where outputs depend on each other."""
        return None


def wide(outputs: Tensor) -> Tensor:
    """Half-precision outputs in float32."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def task_of(record: Mapping[str, Any]) -> Task:
    """The task that :meth:`Task.record` describes."""
    settings = dict(record)
    return load(TASKS, settings.pop("kind"), "task")(**settings)
