"""Fine-tuning, before and after: what each worker gained on its own class mix. Legend: N workers."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from visualization.measures import ACCURACY, metric_scale
from visualization.style import category, styled

MOST_NAMED_WORKERS = 32


@styled
def draw_finetune(record: dict[str, Any]) -> Figure:
    """``record``: 'finetune' of summary.json. One line a worker from its accuracy before to that after,
    workers in the order of the accuracy before; readable from 1 to hundreds of workers."""
    before_N, after_N = (np.asarray(record[when], dtype=float) for when in ("before", "after"))
    order = np.argsort(before_N, kind="stable")
    before_N, after_N, place_N = before_N[order], after_N[order], np.arange(len(order))
    figure = Figure(figsize=(max(5.0, min(12.0, 2 + 0.3 * len(order))), 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.vlines(place_N, before_N, after_N, color="0.7", linewidth=1.5, zorder=1)
    size = max(8, 40 - len(order) / 4)
    axes.scatter(place_N, before_N, s=size, color=category(0)["color"], marker="o", zorder=2, label="before")
    axes.scatter(place_N, after_N, s=size, color=category(1)["color"], marker="^", zorder=3, label="after")
    metric_scale(axes, ACCURACY)
    if len(order) <= MOST_NAMED_WORKERS:
        axes.set_xticks(place_N, map(str, order))
        axes.set_xlabel("worker, by accuracy before")
    else:
        axes.set(xticks=[], xlabel=f"{len(order):,} workers, by accuracy before")
    axes.set_ylabel("test accuracy, own class mix")
    what = "the head" if record["head_only"] else "the model"
    known_N = np.isfinite(before_N) & np.isfinite(after_N)
    means = f"mean {before_N[known_N].mean():.1%} before, {after_N[known_N].mean():.1%} after" if known_N.any() else ""
    axes.set_title(f"Fine-tuning {what}, {record['epochs']} local epoch{'s' * (record['epochs'] != 1)}\n{means}")
    axes.legend(loc="best")
    return figure
