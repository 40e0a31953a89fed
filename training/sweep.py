"""``--sweep``: several methods at several shares kept, from one stage 1."""

from __future__ import annotations

from typing import Any

from training.pruning import Stage1, run_stage2
from utils.progress import within
from utils.records import metric_of, write_json


def sweep(stage1: Stage1) -> dict[str, Any]:
    """``--sweep``: stage 2 of all ``--methods`` at all shares, from one stage 1; writes sweep.json."""
    config = stage1.config
    runs = [(method, ratio) for method in config.methods for ratio in config.sweep]
    key = f"test_{stage1.job.dataset.task.metric.name}"
    figures: dict[str, list[float]] = {method: [] for method in config.methods}
    for i, (method, ratio) in enumerate(runs):
        with within(f"run {i + 1} of {len(runs)}, {method}, {ratio:.4g} kept"):
            figures[method].append(run_stage2(stage1, method, ratio, reuse=True)[0][key])
    methods = {name: {key: values, f"{key}_std": None} for name, values in figures.items()}
    record = {
        "ratios": list(config.sweep),
        "methods": methods,
        "stage1": {key: stage1.summary[key]},
        "metric": metric_of(stage1.summary),
    }
    write_json(stage1.folder / "sweep.json", record)
    return record


def sweep_said(record: dict[str, Any]) -> str:
    """The record as a line a method."""
    key = f"test_{metric_of(record)['name']}"
    lines = []
    for name, entry in record["methods"].items():
        pairs = zip(record["ratios"], entry[key], strict=True)
        lines.append(f"{name:8s} " + "  ".join(f"{share:g}: {figure:.4f}" for share, figure in pairs))
    return "\n".join(lines)
