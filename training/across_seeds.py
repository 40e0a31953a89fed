"""Prunings of several seeds, summed up in the folder above them: means, deviations and a sheet.

Legend: S seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.comparison import named, verdict, write_comparison
from training.pruning import stage2_dir
from utils.influence.statistics import mean_interval
from utils.records import metric_of, spelled, write_json


def spread(values_S: Sequence[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves; figures that are missing are left out."""
    there = [v for v in values_S if v is not None]
    return {
        "mean": statistics.mean(there) if there else None,
        "std": statistics.stdev(there) if len(there) > 1 else None,
        "values": list(values_S),
    }


def summarize_comparisons(folder: Path, records: list[dict[str, Any]]) -> str:
    """The comparison over seeds; returns it as lines."""
    what, S = {key: records[0][key] for key in ("algorithm", "ratio", "steps", "folds")}, len(records)
    method, ratios = what["algorithm"], [r["ratio"] for r in records]
    mixed = len(set(ratios)) > 1  # --choose_ratio chooses for each seed; what keeps all is its own control
    if mixed:
        what["ratio"] = statistics.fmean(ratios)
        records = [
            r | {"control": r["stage1"], "runs": r["runs"] | {"control": r["runs"]["stage1"]}} if r["ratio"] == 1 else r
            for r in records
        ]
    stages = ("stage1", "stage2", "control")
    metric = metric_of(records[0]["stage1"])
    key = f"test_{metric['name']}"
    figures = {name: [r[name] and r[name][key] for r in records] for name in stages}
    there = {name: values for name, values in figures.items() if None not in values}
    over = {
        name: mean_interval([a - b for a, b in zip(there["stage2"], there[name], strict=True)])
        for name in ("stage1", "control")
        if name in there
    }
    record = {
        "seeds": S,
        **what,
        "ratios": ratios,
        "runs": {name: _runs(records, name) for name in stages},
        "metric": metric,
        **{f"{name}_{key}": spread(there[name]) if name in there else None for name in figures},
        "difference": spread([r["difference"][key] for r in records]),
        "over_stage1": over["stage1"],
        "over_random": over.get("control"),
        "verdict": verdict(method, metric, over["stage1"], over.get("control"), f"over {S} seeds"),
    }
    run_dir = stage2_dir(folder, *what.values())
    if mixed:
        run_dir = run_dir.with_name(run_dir.name.replace(f"{what['ratio']:g}", "chosen", 1))
    write_comparison(folder, run_dir, record)
    means = ", ".join(
        f"{record[f'{name}_{key}']['mean']:.4f} +- {record[f'{name}_{key}']['std']:.4f} {where}"
        for name, where in (("stage1", "in stage 1"), ("stage2", f"in stage 2 ({named(record)})"))
    )
    return f"test {spelled(metric['name'])} over {S} seeds: {means}; {folder}\n{record['verdict']}"


def _runs(records: list[dict[str, Any]], name: str) -> list[str] | None:
    """The directories of a stage of each seed, from the folder above the seeds; None where one has none."""
    runs = [r["runs"][name] and f"seed-{r['seed']}/{r['runs'][name][0]}" for r in records]
    return None if None in runs else runs


def summarize_sweeps(folder: Path, records: list[dict[str, Any]]) -> str:
    """sweep.json over seeds (means and deviations in the place of one seed's accuracies); returns it as lines."""
    methods, lines, metric = {}, [], metric_of(records[0])
    key = f"test_{metric['name']}"
    for name in records[0]["methods"]:
        by_ratio = [spread(v) for v in zip(*(r["methods"][name][key] for r in records), strict=True)]
        methods[name] = {
            key: [s["mean"] for s in by_ratio],
            f"{key}_std": [s["std"] for s in by_ratio],
        }
        pairs = zip(records[0]["ratios"], by_ratio, strict=True)
        lines.append(f"{name:8s} " + "  ".join(f"{r:g}: {s['mean']:.4f} +- {s['std']:.4f}" for r, s in pairs))
    stage1 = spread([r["stage1"][key] for r in records])
    record = {
        "seeds": len(records),
        "ratios": records[0]["ratios"],
        "methods": methods,
        "stage1": {key: stage1["mean"], f"{key}_std": stage1["std"]},
        "metric": metric,
    }
    write_json(folder / "sweep.json", record)
    return "\n".join([f"test {spelled(metric['name'])} by share kept, {len(records)} seeds:", *lines])


def summarize_audits(folder: Path, records: list[dict[str, Any]]) -> str:
    """audit.json over seeds: the LDS of each; returns it as lines."""
    methods = {name: {"lds": spread([r["methods"][name]["lds"] for r in records])} for name in records[0]["methods"]}
    write_json(folder / "audit.json", {"seeds": len(records), "methods": methods})
    lines = [f"{n:8s} {m['lds']['mean']:.3f} +- {m['lds']['std']:.3f}" for n, m in methods.items()]
    return "\n".join([f"LDS over {len(records)} seeds ({folder / 'audit.json'}):", *lines])


SUMMARIES = {"audit": summarize_audits, "sweep": summarize_sweeps, "comparison": summarize_comparisons}
