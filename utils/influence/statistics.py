"""How well scores predict: rank correlation with interval, detection of known bad samples.

Legend: M groups of the audit, n samples.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

BOOTSTRAP = 2000


def spearman(predicted_M: np.ndarray, actual_M: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one side is constant (no information)."""
    if (predicted_M == predicted_M[0]).all() or (actual_M == actual_M[0]).all():
        return 0.0
    return float(stats.spearmanr(predicted_M, actual_M).statistic)


def lds(predicted_M: np.ndarray, actual_M: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The linear datamodeling score (Park et al. 2023): Spearman correlation of predicted and actual
    changes over groups, with a 95 % percentile bootstrap interval over the groups. A retraining that diverged (NaN) is
    the worst that a removal can do: it ranks with infinity."""
    actual_M = np.where(np.isnan(actual_M), np.inf, actual_M)
    rng = np.random.default_rng(seed)
    count = len(actual_M)
    draws = rng.integers(count, size=(BOOTSTRAP, count))
    values = [spearman(predicted_M[d], actual_M[d]) for d in draws]
    low, high = np.quantile(values, [0.025, 0.975])
    return spearman(predicted_M, actual_M), (float(low), float(high))


def auroc(scores_n: np.ndarray, bad_n: np.ndarray) -> float:
    """Probability that a bad sample scores below a good one (ties count half)."""
    ranks_n = stats.rankdata(scores_n)
    bad, good = int(bad_n.sum()), int((~bad_n).sum())
    if bad == 0 or good == 0:
        return float("nan")
    above = ranks_n[~bad_n].sum() - good * (good + 1) / 2
    return float(above / (bad * good))


def found_among_lowest(scores_n: np.ndarray, bad_n: np.ndarray, share: float) -> float:
    """The share of all bad samples that are among the lowest-scored ``share`` of the samples."""
    lowest = np.argsort(scores_n, kind="stable")[: round(share * len(scores_n))]
    return float(bad_n[lowest].sum() / bad_n.sum())


def lower_cluster(scores_n: np.ndarray) -> np.ndarray:
    """Which scores are in the lower of two clusters, bool [n]: those of 2-means in one dimension, exactly (the split of
    the sorted scores with the least sum of squares within). OpenDataVal's rule of who is flagged as mislabelled (Jiang
    et al. 2023). Raises ValueError of fewer than two scores."""
    n = len(scores_n)
    if n < 2:
        raise ValueError("two clusters need two scores")
    order = np.argsort(scores_n, kind="stable")
    centred_n = scores_n[order].astype(float) - np.mean(scores_n)
    count_s, sum_s = np.arange(1, n), centred_n.cumsum()[:-1]
    between_s = sum_s**2 / count_s + sum_s**2 / (n - count_s)  # the sums of both sides are opposite
    lower_n = np.zeros(n, dtype=bool)
    lower_n[order[: between_s.argmax() + 1]] = True
    return lower_n


def f1(flagged_n: np.ndarray, bad_n: np.ndarray) -> float:
    """The harmonic mean of precision and recall; 0 where nothing is flagged and nothing bad."""
    return float(2 * (flagged_n & bad_n).sum() / max(flagged_n.sum() + bad_n.sum(), 1))


def paired_interval(right_a_m: np.ndarray, right_b_m: np.ndarray) -> tuple[float, float, float]:
    """Mean of a - b over the same test samples and its 95 % interval (normal; exact enough from a hundred samples
    on). It covers the choice of the test samples, not that of the seed."""
    difference_m = np.asarray(right_a_m, dtype=float) - np.asarray(right_b_m, dtype=float)
    mean, m = float(difference_m.mean()), len(difference_m)
    half = float(1.96 * difference_m.std(ddof=1) / np.sqrt(m)) if m > 1 else float("nan")
    return mean, mean - half, mean + half


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % t interval over seeds."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return mean, mean - half, mean + half
