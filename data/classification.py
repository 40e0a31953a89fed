"""Classification: one class a sample.

Legend: n workers of a chunk, B batch, C classes, R rows, m samples.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.task import Metric, Task, wide


class Classification(Task):
    """One class a sample: int64 targets [m], C logits, cross-entropy."""

    kind = "classification"
    metrics = (Metric("accuracy", higher_is_better=True),)
    summed = one_class = True

    def misfit(self, targets_m: Tensor) -> str | None:
        """Whether they are classes."""
        if targets_m.dim() != 1 or targets_m.dtype != torch.int64:
            return "labels are no whole numbers"
        if targets_m.min() < 0 or targets_m.max() >= self.num_outputs:
            return f"labels go from {targets_m.min()} to {targets_m.max()}, and there are {self.num_outputs} classes"
        return None

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

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Of the classes."""
        return wide(outputs).softmax(-1)

    def hits(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> np.ndarray:
        """Where the likeliest class is the true one."""
        return predicted_m == targets_m

    def score(self, predicted_m: np.ndarray, targets_m: np.ndarray) -> float:
        """Accuracy."""
        return float(self.hits(predicted_m, targets_m).mean())

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
