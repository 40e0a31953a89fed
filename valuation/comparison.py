"""How near values of institutions come to the truth, and the tables that say so.

Cosine similarity, which is usual, is a weak judge: equal shares reach 0.987 where the truth is (8, 10, 12). So beside
it stand the relative L1 error, sum |v - phi| / sum |phi|, the largest error, and Kendall's tau.

Legend: N institutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from utils.influence.statistics import mean_interval

FIGURES = ("cosine", "relative_l1", "max_error", "kendall_tau")


def judged(values_N: np.ndarray, truth_N: np.ndarray) -> dict[str, float | None]:
    """The four figures; None where one is not defined."""
    norms = float(np.linalg.norm(values_N) * np.linalg.norm(truth_N))
    tau = stats.kendalltau(values_N, truth_N).statistic if np.ptp(values_N) and np.ptp(truth_N) else np.nan
    return {
        "cosine": float(values_N @ truth_N) / norms if norms else None,
        "relative_l1": float(np.abs(values_N - truth_N).sum() / np.abs(truth_N).sum()) if truth_N.any() else None,
        "max_error": float(np.abs(values_N - truth_N).max()),
        "kendall_tau": float(tau) if np.isfinite(tau) else None,
    }


def table(record: dict[str, Any]) -> str:
    """What is printed of one seed: a line a method."""
    names = record["institutions"]
    width = max(9, *(len(name) + 1 for name in names))
    head = f"{'':15s}" + "".join(f"{name:>{width}s}" for name in names)
    lines = [f"{head}{'cosine':>9s}{'rel. L1':>9s}{'largest':>9s}{'tau':>7s}{'seconds':>9s}"]
    if record["truth"] is not None:
        row = "".join(f"{value:{width}.4f}" for value in record["truth"])
        lines.append(f"{'truth':15s}{row}{'':34s}{record['truth_seconds']:9.1f}")
    if record.get("truth_error") is not None:
        row = "".join(f"{value:{width}.4f}" for value in record["truth_error"])
        lines.append(f"{'its std. error':15s}{row}")
    for name, found in record["methods"].items():
        row = "".join(f"{value:{width}.4f}" for value in found["values"])
        shown = [_cell(found.get(figure), digits) for figure, digits in zip(FIGURES, (4, 3, 4, 2), strict=True)]
        lines.append(f"{name:15s}{row}{shown[0]:>9s}{shown[1]:>9s}{shown[2]:>9s}{shown[3]:>7s}{found['seconds']:9.1f}")
    return "\n".join(lines)


def over_seeds(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """Mean and 95 % interval of each figure of each method over seeds."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for name in records[0]["methods"]:
        for figure in FIGURES:
            values = [record["methods"][name].get(figure) for record in records]
            if any(value is None for value in values):
                continue
            found.setdefault(name, {})[figure] = list(mean_interval(values))
    return found


def table_over_seeds(summary: dict[str, dict[str, list[float | None]]], seeds: int) -> str:
    """A line a method: mean and interval."""
    lines = [f"{'over ' + str(seeds) + ' seeds':15s}{'cosine':>26s}{'relative L1 error':>26s}{'Kendall tau':>26s}"]
    for name, figures in summary.items():
        cells = [_interval(figures.get(figure), digits) for figure, digits in
                 (("cosine", 4), ("relative_l1", 3), ("kendall_tau", 2))]  # fmt: skip
        lines.append(f"{name:15s}" + "".join(f"{cell:>26s}" for cell in cells))
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(values: Sequence[float | None] | None, digits: int) -> str:
    if values is None:
        return "-"
    mean, low, high = values
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
