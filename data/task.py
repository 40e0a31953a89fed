"""Tasks: what a model learns, and what it is measured by.

A data set brings its task, and nothing else in the house asks what data are: splits and partitions take the task's
strata, training and influence its losses, evaluation its metrics, plots their names and directions.

Legend: n workers of a chunk, B batch, C outputs, R rows, m samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import choose
from utils.influence.statistics import auroc

UNKNOWN = 255  # the label of a finding that nobody looked for
BINS = 10  # quantiles of a regression's targets that splits and partitions take for classes


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
    :meth:`of_sums`; else :meth:`of_outputs`.

    Targets come from the data set; :meth:`encoded` is what losses and metrics take.
    """

    kind: ClassVar[str]
    metrics: tuple[Metric, ...]
    summed: ClassVar[bool] = False

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


class Classification(Task):
    """One class a sample: int64 targets [m], C logits, cross-entropy."""

    kind = "classification"
    metrics = (Metric("accuracy", higher_is_better=True),)
    summed = True

    def losses(self, outputs_nBC: Tensor, targets_nB: Tensor) -> Tensor:
        """Cross-entropy [n, B]."""
        flat = wide(outputs_nBC).flatten(0, -2)
        return F.cross_entropy(flat, targets_nB.flatten(), reduction="none").view_as(targets_nB)

    def strata(self, targets_m: Tensor) -> Tensor:
        """The classes."""
        return targets_m

    def stratum_names(self, targets_m: Tensor) -> list[str]:
        """The classes' names."""
        return list(self.names)

    @property
    def what(self) -> str:
        """The number of classes."""
        return f"of {self.num_outputs} classes"

    def predicted(self, outputs: Tensor) -> Tensor:
        """The likeliest class [...]."""
        return outputs.argmax(-1)

    def score(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> float:
        """Accuracy."""
        return float((predicted_m == targets_m).mean())

    def sums(self, outputs_nBC: Tensor, targets_nB: Tensor) -> Tensor:
        """Hits [n, 1]."""
        return (outputs_nBC.argmax(-1) == targets_nB).sum(1).double()[:, None]

    def of_sums(self, sums_RK: Tensor, count: int) -> dict[str, Tensor]:
        """Accuracy."""
        return {"accuracy": sums_RK[:, 0] / count}

    def by_output(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> dict[str, dict[str, float]]:
        """Accuracy of each class; NaN for one without test samples."""
        hits_C, count_C = (
            np.bincount(of_class, minlength=self.num_outputs)
            for of_class in (targets_m[predicted_m == targets_m], targets_m)
        )
        with np.errstate(invalid="ignore"):
            return {"accuracy_by_class": dict(zip(self.names, (hits_C / count_C).tolist(), strict=True))}

    def confusion(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> np.ndarray:
        """int64 [C, C]."""
        C = self.num_outputs
        return np.bincount(targets_m * C + predicted_m, minlength=C * C).reshape(C, C)

    def residuals(self, outputs_mC: Tensor, targets_m: Tensor) -> Tensor:
        """p - onehot(y)."""
        return outputs_mC.softmax(1) - F.one_hot(targets_m, self.num_outputs)


class Multilabel(Task):
    """Several findings a sample, each there (1), not there (0) or unknown (255): uint8 targets [m, C], C logits, the
    mean binary cross-entropy over what is known."""

    kind = "multilabel"
    metrics = (Metric("macro_auroc", higher_is_better=True), Metric("mean_average_precision", higher_is_better=True))

    def losses(self, outputs_nBC: Tensor, targets_nB: Tensor) -> Tensor:
        """Mean binary cross-entropy over the known findings [n, B]; 0 where none is."""
        outputs_nBC, known_nBC = wide(outputs_nBC), targets_nB != UNKNOWN
        targets_nBC = targets_nB.where(known_nBC, 0).to(outputs_nBC.dtype)
        entropy_nBC = F.binary_cross_entropy_with_logits(outputs_nBC, targets_nBC, reduction="none")
        return (entropy_nBC * known_nBC).sum(-1) / known_nBC.sum(-1).clamp(min=1)

    def strata(self, targets_m: Tensor) -> Tensor:
        """1 + the rarest finding that is there; 0 for samples without any."""
        there_mC = targets_m == 1
        rarest_first = there_mC.sum(0).argsort(stable=True)
        ranked_mC = there_mC[:, rarest_first]
        first_m = ranked_mC.int().argmax(1)
        return torch.where(ranked_mC.any(1), 1 + rarest_first[first_m], 0)

    def stratum_names(self, targets_m: Tensor) -> list[str]:
        """'none', and the findings' names."""
        return ["none", *self.names]

    @property
    def what(self) -> str:
        """The number of findings."""
        return f"with {self.num_outputs} findings each"

    def predicted(self, outputs: Tensor) -> Tensor:
        """Probabilities."""
        return wide(outputs).sigmoid()

    def score(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> float:
        """Macro AUROC."""
        return _mean_of_known(self._by_finding(_area, predicted_m, targets_m))

    def of_outputs(self, outputs_RmC: Tensor, targets_m: Tensor) -> dict[str, Tensor]:
        """Means over the findings that have samples of both kinds."""
        outputs_RmC, targets_mC = outputs_RmC.double().cpu().numpy(), targets_m.cpu().numpy()
        of = {"macro_auroc": _area, "mean_average_precision": _average_precision}
        return {
            name: torch.tensor([_mean_of_known(self._by_finding(f, row_mC, targets_mC)) for row_mC in outputs_RmC],
                               dtype=torch.float64)
            for name, f in of.items()
        }  # fmt: skip

    def by_output(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> dict[str, dict[str, float]]:
        """AUROC and average precision of each finding; NaN where the test set has one kind of sample only."""
        of = {"auroc_by_class": _area, "average_precision_by_class": _average_precision}
        return {
            name: dict(zip(self.names, self._by_finding(f, predicted_m, targets_m), strict=True))
            for name, f in of.items()
        }

    def _by_finding(self, measure: Callable, scores_mC: np.ndarray, targets_mC: np.ndarray) -> list[float]:
        known_mC = targets_mC != UNKNOWN
        return [
            measure(scores_mC[known_mC[:, c], c], targets_mC[known_mC[:, c], c] == 1) for c in range(self.num_outputs)
        ]

    def residuals(self, outputs_mC: Tensor, targets_m: Tensor) -> Tensor:
        """(sigmoid - y) over the number of known findings."""
        share_mC = self._shares(targets_m, outputs_mC.dtype)
        return (outputs_mC.sigmoid() - targets_m.where(targets_m != UNKNOWN, 0)) * share_mC

    def curvatures(self, outputs_mC: Tensor, targets_m: Tensor) -> Tensor:
        """sigmoid (1 - sigmoid) over the number of known findings."""
        p_mC = outputs_mC.sigmoid()
        return p_mC * (1 - p_mC) * self._shares(targets_m, outputs_mC.dtype)

    def _shares(self, targets_mC: Tensor, dtype: torch.dtype) -> Tensor:
        known_mC = (targets_mC != UNKNOWN).to(dtype)
        return known_mC / known_mC.sum(1, keepdim=True).clamp(min=1)


class Regression(Task):
    """Values [C] a sample (horizons, or several outputs): the mean squared error over known ones.

    The data set's targets are float32 [m, 2, C] in the unit of the data: the values (NaN where unknown), and the
    forecast to beat ('the last value stays'; the training mean where there is no last value). ``mean_C`` and
    ``std_C`` are those of the training values; networks and losses see standardized ones.
    """

    kind = "regression"

    def __init__(self, names: Sequence[str], mean_C: Sequence[float], std_C: Sequence[float], unit: str = ""):
        super().__init__(names)
        self.mean_C, self.std_C, self.unit = tuple(map(float, mean_C)), tuple(map(float, std_C)), unit
        self.metrics = (Metric("rmse", False, unit), Metric("mae", False, unit), Metric("skill", True))

    @classmethod
    def of(cls, names: Sequence[str], targets_m2C: Tensor, unit: str = "") -> Regression:
        """The task of these training targets."""
        values_mC = targets_m2C[:, 0].double()
        mean_C = values_mC.nanmean(0)
        std_C = (values_mC - mean_C).square().nanmean(0).sqrt()
        return cls(names, mean_C.tolist(), torch.where(std_C > 0, std_C, 1.0).tolist(), unit)

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {**super().record(), "mean_C": list(self.mean_C), "std_C": list(self.std_C), "unit": self.unit}

    def encoded(self, targets: Tensor) -> Tensor:
        """Standardized [m, 2, C]."""
        mean_C, std_C = (torch.tensor(v, dtype=targets.dtype, device=targets.device) for v in (self.mean_C, self.std_C))
        return (targets - mean_C) / std_C

    def losses(self, outputs_nBC: Tensor, targets_nB: Tensor) -> Tensor:
        """Mean squared error over the known values [n, B], standardized; 0 where none is known."""
        outputs_nBC, values_nBC = wide(outputs_nBC), targets_nB[..., 0, :]
        known_nBC = values_nBC.isfinite()
        error_nBC = (outputs_nBC - values_nBC.where(known_nBC, 0.0).to(outputs_nBC.dtype)) * known_nBC
        return error_nBC.square().sum(-1) / known_nBC.sum(-1).clamp(min=1)

    def strata(self, targets_m: Tensor) -> Tensor:
        """The quantile bin of each sample's mean value."""
        mean_m = targets_m[:, 0].double().nanmean(1).numpy()
        return torch.from_numpy(np.searchsorted(self._ends(targets_m), mean_m, side="right"))

    def stratum_names(self, targets_m: Tensor) -> list[str]:
        """The quantile bins, by their ends."""
        ends = [f"{end:.3g}" for end in self._ends(targets_m)]
        pairs = [f"{low} to {high}" for low, high in zip(ends, ends[1:], strict=False)]
        return [f"below {ends[0]}", *pairs, f"from {ends[-1]}"]

    @property
    def what(self) -> str:
        """The number of values."""
        unit = f" in {self.unit}" if self.unit else ""
        return f"with {self.num_outputs} value{'s' if self.num_outputs > 1 else ''} each{unit}"

    @staticmethod
    def _ends(targets_m2C: Tensor) -> np.ndarray:
        return np.quantile(targets_m2C[:, 0].double().nanmean(1).numpy(), np.arange(1, BINS) / BINS)

    def predicted(self, outputs: Tensor) -> Tensor:
        """Values in the unit of the data."""
        outputs = wide(outputs)
        mean_C, std_C = (torch.tensor(v, dtype=outputs.dtype, device=outputs.device) for v in (self.mean_C, self.std_C))
        return outputs * std_C + mean_C

    def score(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> float:
        """Root mean square error."""
        return float(np.sqrt(np.nanmean((predicted_m - targets_m[:, 0]) ** 2)))

    def of_outputs(self, outputs_RmC: Tensor, targets_m: Tensor) -> dict[str, Tensor]:
        """RMSE and MAE in the unit of the data; skill = 1 - MSE / MSE of the forecast to beat, where both are known."""
        std_C = torch.tensor(self.std_C, dtype=torch.float64)
        values_mC, forecast_mC = (targets_m.double().cpu() * std_C).unbind(1)
        error_RmC = (outputs_RmC.double().cpu() * std_C - values_mC).flatten(1)
        against_m = (forecast_mC - values_mC).flatten()
        both_m = against_m.isfinite()
        better_R = error_RmC[:, both_m].square().mean(1) / against_m[both_m].square().mean()
        return {
            "rmse": error_RmC.square().nanmean(1).sqrt(),
            "mae": error_RmC.abs().nanmean(1),
            "skill": 1 - better_R,
        }

    def by_output(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> dict[str, dict[str, float]]:
        """RMSE of each output."""
        rmse_C = np.sqrt(np.nanmean((predicted_m - targets_m[:, 0]) ** 2, axis=0))
        return {"rmse_by_output": dict(zip(self.names, rmse_C.tolist(), strict=True))}

    def residuals(self, outputs_mC: Tensor, targets_m: Tensor) -> Tensor:
        """2 (output - value) over the number of known values."""
        known_mC = targets_m[:, 0].isfinite()
        error_mC = outputs_mC - targets_m[:, 0].where(known_mC, 0.0)
        return error_mC * self.curvatures(outputs_mC, targets_m)

    def curvatures(self, outputs_mC: Tensor, targets_m: Tensor) -> Tensor:
        """2 over the number of known values."""
        known_mC = targets_m[:, 0].isfinite().to(outputs_mC.dtype)
        return 2 * known_mC / known_mC.sum(1, keepdim=True).clamp(min=1)


TASKS = {task.kind: task for task in (Classification, Multilabel, Regression)}


def task_of(record: Mapping[str, Any]) -> Task:
    """The task that :meth:`Task.record` describes."""
    settings = dict(record)
    return choose(TASKS, settings.pop("kind"), "task")(**settings)


def _area(scores_m: np.ndarray, there_m: np.ndarray) -> float:
    """The probability that a sample with the finding has the higher score (ties count half); NaN where all samples
    are of one kind."""
    return auroc(scores_m, ~there_m)


def _average_precision(scores_m: np.ndarray, there_m: np.ndarray) -> float:
    """The mean precision over recall; NaN where all samples are of one kind."""
    from sklearn.metrics import average_precision_score  # takes a second

    return float(average_precision_score(there_m, scores_m)) if 0 < there_m.sum() < len(there_m) else float("nan")


def _mean_of_known(values: Sequence[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else float("nan")
