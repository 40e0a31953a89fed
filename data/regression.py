"""Regression: values a sample.

Legend: n workers of a chunk, B batch, C values, R rows, m samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.task import Metric, Task, wide

BINS = 10  # quantiles of the targets that splits and partitions take for classes


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
        mean_C, std_C = self._scale(targets)
        return (targets - mean_C) / std_C

    def misfit(self, targets_m: Tensor) -> str | None:
        """Whether they are values, one known a sample at least."""
        if targets_m.dtype != torch.float32 or targets_m.shape[1:] != (2, self.num_outputs):
            return f"values are no float32, 2 x {self.num_outputs} a sample"
        if targets_m.isinf().any():
            return "values are infinite"
        return None if bool(targets_m[:, 0].isfinite().any(1).all()) else "samples without any known value"

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
        mean_C, std_C = self._scale(outputs)
        return outputs * std_C + mean_C

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor(v, dtype=like.dtype, device=like.device) for v in (self.mean_C, self.std_C))

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
