"""Multilabel: several findings a sample, each there, not there, or unknown.

Legend: n workers of a chunk, B batch, C findings, R rows, m samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.task import Metric, Task, wide
from utils.influence.statistics import auroc

UNKNOWN = 255  # the label of a finding that nobody looked for


class Multilabel(Task):
    """Several findings a sample, each there (1), not there (0) or unknown (255): uint8 targets [m, C], C logits, the
    mean binary cross-entropy over what is known."""

    kind = "multilabel"
    metrics = (Metric("macro_auroc", higher_is_better=True), Metric("mean_average_precision", higher_is_better=True))

    def misfit(self, targets_m: Tensor) -> str | None:
        """Whether they are findings."""
        if targets_m.dtype != torch.uint8 or targets_m.shape[1:] != (self.num_outputs,):
            return f"findings are no bytes, {self.num_outputs} a sample"
        odd = targets_m[(targets_m > 1) & (targets_m != UNKNOWN)]
        return f"findings must be 0, 1 or {UNKNOWN} (unknown), not {odd[0]}" if len(odd) else None

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
        return self.probabilities(outputs)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Of the findings, each by itself."""
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
